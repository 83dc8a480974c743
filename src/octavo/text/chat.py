"""Conversations as text: a chat template, kept in the tokenizer's files as Hugging Face keeps it.

A template is a piece of Jinja2 in ``tokenizer_config.json``. It may come with a model from
anywhere, so it runs in Jinja2's sandbox. `DEFAULT` is for models that never learned chat tokens:
its markers are the role's name, a colon and line ends, which any tokenizer can spell.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import DataError, first_line
from octavo.manifest import to_json
from octavo.text.files import decode, read_bytes
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, str]
"""``role``, such as system, user or assistant, and ``content``."""
Piece = tuple[str, bool]
"""A stretch of text, and whether the model is to learn to write it."""

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
DEFAULT = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token else '\\n\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt else '' }}"
)
"""``User:``, its words and a blank line, then ``Assistant:``, its words and the end-of-text token;
where the tokenizer has none a blank line ends those too, and makes a good stop string."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written as one text."""

    source: str = DEFAULT
    bos_token: str = ""
    eos_token: str = ""

    @property
    def stop(self) -> str:
        """What ends the assistant's words: the end-of-text token, a blank line where none is."""
        return self.eos_token or "\n\n"

    @classmethod
    def default(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """Ours, ending the assistant's turns with the tokenizer's end-of-text token."""
        if tokenizer.eot_id is None:
            return cls()
        return cls(eos_token=tokenizer.token_bytes(tokenizer.eot_id).decode())

    @classmethod
    def load(cls, directory: Path | str) -> "ChatTemplate | None":
        """The template of a tokenizer's directory, None where there is none.

        Raises `DataError` for files that cannot be read and for what is no Jinja2.
        """
        directory = Path(directory)
        config = _read_config(directory / CONFIG)
        # A file of its own comes first, as for transformers.
        source = _read(directory / TEMPLATE) or config.get("chat_template")
        if isinstance(source, list):  # several, each with a name
            named = [entry for entry in source if isinstance(entry, dict)]
            source = next((e.get("template") for e in named if e.get("name") == "default"), None)
        if source is None:
            return None
        if not isinstance(source, str):
            raise DataError("chat_template is no text", f"in {directory / CONFIG}", "remove it")
        tokens = {name: _token(config.get(name)) for name in ("bos_token", "eos_token")}
        template = cls(source, **tokens)
        try:
            template._compiled  # noqa: B018 - so that what is wrong shows here
        except DataError as error:
            raise DataError(error.what, f"in {directory}", error.fix) from None
        return template

    def files(self) -> dict[str, bytes]:
        """The files that a tokenizer's directory holds of it."""
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        own = {name: token for name, token in tokens.items() if token}
        plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {CONFIG: to_json(plain | own | {"chat_template": self.source})}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as a text; with ``add_generation_prompt`` the assistant goes on from it.

        Raises `DataError` where the template fails or refuses.
        """
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
                raise_exception=_refuse,
            )
        except DataError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            reason = first_line(error)
            raise DataError(f"the chat template cannot render the conversation: {reason}") from None

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The rendered conversation, cut where the assistant begins and ends to write.

        Each assistant's turn is what its message adds to the text that asks for it. A conversation
        that another role ends is followed by the text that asks for the assistant's next words.
        Raises `DataError` where a longer conversation does not begin as the shorter one did.
        """
        _check(messages)
        pieces, text = [], ""
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = self.render(messages[:number], add_generation_prompt=True)
                answered = self.render(messages[: number + 1])
                pieces += [(_added(text, asked), False), (_added(asked, answered), True)]
                text = answered
        if messages[-1]["role"] != "assistant":
            pieces.append((_added(text, self.render(messages, add_generation_prompt=True)), False))
        return pieces

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # As transformers sets it up, JSON without HTML's escapes too, but for the clock: a text is
        # the same every day.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            return environment.from_string(self.source)
        except (TemplateSyntaxError, RecursionError) as error:
            line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise DataError(
                f"the chat template is no Jinja2: {error}{line}", fix="mend it or remove it"
            ) from None


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """The conversation's ids, and for each whether the assistant writes it.

    Ends with the text that asks for the assistant's words unless they are the last: then the ids
    are a prompt to write on from. Raises `DataError` as `ChatTemplate.pieces`, and for a message
    that spells a special token, which would let its writer end or open a turn.
    """
    pieces = template.pieces(messages)
    for message in messages:
        spelled = [name for name in tokenizer.special_tokens if name in message["content"]]
        if spelled:
            raise DataError(f"a message contains the special token {spelled[0]}", fix="remove it")
    return encode_pieces(tokenizer, pieces, special=True)


def encode_pieces(
    tokenizer: Tokenizer, pieces: Sequence[Piece], special: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids of the joined pieces, no token across a border, and whether each is to be learned.

    What comes before a border is encoded as it is when a model writes on from there, and what comes
    after it as it goes on there, where the tokenizer allows both: SentencePiece's would otherwise
    begin every piece with a space.
    """
    text = ""
    ids: list[int] = []
    learned: list[bool] = []
    for piece, to_learn in pieces:
        text += piece
        whole = tokenizer.encode(text, special)
        goes_on = whole[: len(ids)] == ids
        new = whole[len(ids) :] if goes_on else tokenizer.encode(piece, special)
        ids += new
        learned += [to_learn] * len(new)
    return ids, learned


def _check(messages: Sequence[Message]) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            "a conversation is a list of messages", fix='[{"role": "user", "content": "Hi"}, …]'
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} is no object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"message {number} has no text under {key!r}")
        if message["role"] == "assistant" and not message["content"]:
            raise DataError(f"message {number}, the assistant's, is empty")


def _added(before: str, after: str) -> str:
    """What ``after`` has more than ``before``."""
    if not after.startswith(before):
        raise DataError(
            "the chat template writes the beginning of a conversation differently once it goes on",
            "so what the assistant wrote cannot be told apart",
            "use a template that only adds to the text",
        )
    return after[len(before) :]


def _read(file: Path) -> str | None:
    """A file's text, None where there is none."""
    return decode(read_bytes(file), file) if file.exists() else None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(file) or "{}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}", fix="restore or remove it") from None
    if not isinstance(config, dict):
        raise DataError(f"{file} is no JSON object", fix="restore or remove it")
    return config


def _token(entry: Any) -> str:
    """A special token's text: an entry is it, or an object that holds it, or null."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _refuse(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise DataError(f"the chat template refuses the conversation: {' '.join(message.split())}")
