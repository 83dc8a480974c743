"""A conversation with a model on the terminal: turns, what of them still fits, slash commands.

A run that was fine-tuned on messages answers by its chat template; a base model goes on with the
text so far. Needs no torch.
"""

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.disk import write_atomic
from octavo.errors import ConfigError, ResourceError
from octavo.generating.sampling import Sampling, make_sampling
from octavo.generating.terminal import flow, typed
from octavo.generating.writing import write
from octavo.model_config import Count
from octavo.settings import convert, unknown_key
from octavo.text.chat import ChatTemplate, encode_chat

LENGTH = "max_new_tokens"
HELP = """\
/reset              forget what was said
/seed [N]           another seed: N, or a new one
/set                show the settings
/set NAME VALUE     change one, e.g. /set temperature 0.7 or /set preset nucleus
/save FILE          write what was said into a file
/quit, Ctrl-D       end
Ctrl-C stops an answer. A line that begins with // is a message that begins with /."""


class Conversation:
    """What was said to a `LanguageModel`, and how it answers.

    Raises `ConfigError` for a model that has no tokenizer or sorts texts, and `DataError` for a
    chat template that cannot be read.
    """

    def __init__(self, lm: Any, sampling: Sampling, max_new_tokens: int, stops: list[str]) -> None:
        """``stops`` end an answer besides the template's own end of a turn."""
        self.tokenizer, self.block_size = lm.tokenizer, lm.config.block_size
        self.template = ChatTemplate.load(lm.home) if lm.home else None
        self.engine = lm.open_engine(1)
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.stops = [*stops, self.template.stop] if self.template else stops
        self.turns: list[dict[str, str]] = []
        self.told = False
        self.saved: Path | None = None

    def hold(self) -> None:
        """Read lines and answer them until end of input or /quit."""
        kind = "chat with the model" if self.template else "a base model: it goes on with the text"
        for line in typed(f"{kind}; Ctrl-C stops it, Ctrl-D ends, /help says what else"):
            if line.startswith("/") and not line.startswith("//"):
                if line.split()[0] == "/quit":
                    return
                self._command(line)
            elif line:
                self.say(line.removeprefix("/") if line.startswith("//") else line)

    def say(self, message: str) -> str:
        """Print the model's answer as it is written and return it; an empty one is no turn."""
        self.turns.append({"role": "user", "content": message})
        answer = ""
        try:
            ids = self._fitting_ids()
            length = (self.max_new_tokens, self.stops)
            pieces = write(self.engine, self.tokenizer, [ids], self.sampling, *length)
            answer = flow(piece.text for piece in pieces)
        except ValueError as error:  # a character or a length that the model cannot take
            print(f"error: {error}", flush=True)
        finally:
            if answer:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()
        return answer

    @property
    def text(self) -> str:
        """All that was said as one text: each of the user's turns begins a line."""
        text = ""
        for turn in self.turns:
            begun = turn["role"] == "user" and text and not text.endswith("\n")
            text += "\n" * bool(begun) + turn["content"]
        return text

    def _fitting_ids(self) -> list[int]:
        """What to go on from, with room for a quarter of the context: older turns are dropped."""
        room = self.block_size - min(self.max_new_tokens, self.block_size // 4)
        if self.template is None:
            ids = self.tokenizer.encode(self.text)
            if len(ids) > room and not self.told:
                self.told = True
                print(f"[the text is long: the model sees only its last {room} tokens from here]")
            return ids[-room:]
        turns = list(self.turns)
        while len(ids := encode_chat(self.tokenizer, self.template, turns)[0]) > room:
            if len(turns) == 1:
                break
            del turns[:2]
        if len(ids) > self.block_size:
            message = f"that makes {len(ids)} tokens, and the model sees {self.block_size} at once"
            raise ConfigError(message, fix="say it in fewer words")
        if dropped := len(self.turns) - len(turns):
            print(f"[the context is full: the {dropped} oldest turns are forgotten]")
        self.turns = turns
        return ids

    def _command(self, line: str) -> None:
        name, *words = line.split(maxsplit=1)
        rest = words[0] if words else ""
        commands = {"/set": self._set, "/seed": self._seed, "/save": self._save}
        try:
            if name == "/help":
                print(HELP)
            elif name == "/reset":
                self.turns, self.told = [], False
                print("all is forgotten")
            elif name in commands:
                print(commands[name](rest.strip()))
            else:
                raise ConfigError(f"there is no {name}", fix="/help says what there is")
        except (ValueError, ResourceError) as error:
            print(f"error: {error}")

    def _seed(self, word: str) -> str:
        return self._set(f"seed {word or secrets.randbits(32)}")

    def _set(self, words: str) -> str:
        """Change one setting; say it, or all."""
        sampled: dict[str, Any] = asdict(self.sampling)
        known = {LENGTH: self.max_new_tokens, **sampled}
        name, _, value = words.replace("=", " ", 1).partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if not name:
            return "\n".join(f"{key} {now}" for key, now in known.items())
        if name == "preset":
            self.sampling = make_sampling(value, seed=self.sampling.seed)
        elif name == LENGTH:
            self.max_new_tokens = convert(value, Count, name)
        elif name in known:
            self.sampling = Sampling(**sampled | {name: value})
        else:
            raise unknown_key("", name, dict.fromkeys(["preset", *known], ()), "")
        return f"{name} {value}"

    def _save(self, file: str) -> str:
        """As a line of JSON, which `octavo finetune` takes; a base model's as plain text."""
        path = Path(file).expanduser()
        if not file or not self.turns:
            raise ConfigError("nothing was said yet" if file else "name a file: /save FILE")
        if path.exists() and path != self.saved:
            raise ConfigError(f"{path} is already there", fix="choose another name")
        whole = json.dumps({"messages": self.turns}, ensure_ascii=False)
        text = (whole if self.template else self.text) + "\n"
        write_atomic(path, text.encode("utf-8"))
        self.saved = path
        return f"saved as {path}"
