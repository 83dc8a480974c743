"""The models that one server has: by name, with their texts' way into ids."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError
from octavo.generating.sampling import PRESETS, Sampling
from octavo.generating.writing import Row, Slot
from octavo.language_model import LanguageModel, load, start_ids
from octavo.model.counts import count_parameters
from octavo.serving.limits import Limits
from octavo.serving.metrics import Metrics, ModelMetrics
from octavo.serving.refusals import Refusal
from octavo.serving.scheduler import Scheduler
from octavo.serving.schemas import MOST_ROWS
from octavo.text.chat import ChatTemplate, Message, encode_chat


class Served:
    """One model with its engine thread."""

    def __init__(self, name: str, lm: LanguageModel, limits: Limits, metrics: Metrics) -> None:
        """Raises `ConfigError` for a model without a tokenizer or one that sorts texts."""
        self.name, self.lm, self.limits = name, lm, limits
        self.tokenizer = lm.tokenizer
        self.template = ChatTemplate.load(lm.home) if lm.home else None
        self.scheduler = Scheduler(name, lm, limits, ModelMetrics(metrics, name))
        vocab = range(self.tokenizer.vocab_size)
        self._longest = max(len(self.tokenizer.token_bytes(i)) for i in vocab)
        self._created = int((lm.checkpoint or lm.home or Path()).stat().st_mtime)

    def about(self) -> dict[str, Any]:
        """Its entry in /v1/models."""
        native = type(self.scheduler.engine).__name__ == "NativeEngine"
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "octavo",
            "context": self.lm.config.block_size,
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "chat": self.template is not None,
            "engine": "native" if native else "torch",
            "weights": self.lm.weights,
            "parameters": count_parameters(self.lm.config).total,
            "presets": {
                name: {k: v for k, v in asdict(preset).items() if v != getattr(Sampling(), k)}
                for name, preset in PRESETS.items()
            },
            "max_tokens": self.limits.tokens,
        }

    def encode(self, prompt: str | list[int] | None) -> list[int]:
        """A prompt's ids. Raises `Refusal` or a `ValueError` for what cannot be one."""
        if isinstance(prompt, str):
            self._check_length(prompt)
        ids = prompt if isinstance(prompt, list) else start_ids(self.tokenizer, prompt)
        return self._check_ids(ids)

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """A conversation's ids, up to where the assistant is to go on; errors as in `encode`."""
        self._check_length("".join(message["content"] for message in messages))
        return self._check_ids(encode_chat(self.tokenizer, self._chat(), messages)[0])

    def chat_stop(self) -> str:
        """What ends the assistant's words, where the end-of-text token does not."""
        return self._chat().stop

    def rows(
        self,
        prompts: Sequence[list[int]],
        copies: int,
        max_tokens: int,
        sampling: Sampling,
        stops: list[str],
        tops: int | None,
        explained: bool,
    ) -> list[Row]:
        """A row for each copy of each prompt; copy n is drawn with n, as `octavo generate` does."""
        if max_tokens > self.limits.tokens:
            most = self.limits.tokens
            raise invalid(f"max_tokens is {max_tokens}, the server's limit is {most}", "max_tokens")
        if len(prompts) * copies > MOST_ROWS:
            message = f"{len(prompts)} prompts times n={copies} are more than {MOST_ROWS} texts"
            raise invalid(message, "n")
        logprobs = 0 if tops is None else max(1, tops)
        slots = [
            Slot(
                -1, list(ids), copy, sampling, len(ids), logprobs, max_tokens, keep_logits=explained
            )
            for ids in prompts
            for copy in range(copies)
        ]
        return [Row(number, slot, self.tokenizer, stops) for number, slot in enumerate(slots)]

    def _chat(self) -> ChatTemplate:
        if self.template is None:
            message = f"{self.name} is a base model: it has learned no conversations"
            fix = "use /v1/completions, or fine-tune it on messages"
            raise Refusal(400, "no_chat_template", f"{message}; {fix}", "messages")
        return self.template

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit, however it is encoded, before it is encoded."""
        if len(text) > self._longest * self.lm.config.block_size:
            raise self._too_long(f"{len(text)} characters")

    def _check_ids(self, ids: list[int]) -> list[int]:
        size, most = self.tokenizer.vocab_size, self.lm.config.block_size
        if len(ids) > most:
            raise self._too_long(f"{len(ids)} tokens")
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise invalid(f"there is no token {wrong}: ids are 0 to {size - 1}", "prompt")
        return ids

    def _too_long(self, size: str) -> Refusal:
        most = self.lm.config.block_size
        message = f"the prompt has {size}, {self.name} sees {most} tokens at once"
        return Refusal(400, "context_length_exceeded", message, "prompt")


class Models:
    """All models of a server."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.by_name = {each.name: each for each in served}
        self.closing = False

    def find(self, name: str | None) -> Served:
        """The model of this name, the first for None; raises `Refusal`."""
        if name is None:
            return next(iter(self.by_name.values()))
        if name not in self.by_name:
            known = ", ".join(self.by_name)
            message = f"there is no model {name[:100]!r}; there are: {known}"
            raise Refusal(404, "model_not_found", message, "model")
        return self.by_name[name]

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return all(each.scheduler.idle for each in self.by_name.values())

    @property
    def healthy(self) -> bool:
        """Whether every engine thread runs."""
        return all(each.scheduler.thread.is_alive() for each in self.by_name.values())

    def close(self) -> None:
        """End every engine thread."""
        for each in self.by_name.values():
            each.scheduler.close()


def load_models(paths: Sequence[str], limits: Limits, metrics: Metrics, **options: Any) -> Models:
    """Load runs to be served by their directories' names; ``options`` are those of `load`.

    Raises what `load` raises and `ConfigError` for two of one name.
    """
    names = [Path(path).resolve().name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two runs are called {name}", fix="a server needs one name for each")
    models = [load(path, speculate="off", **options) for path in paths]
    pairs = zip(names, models, strict=True)
    return Models([Served(name, lm, limits, metrics) for name, lm in pairs])


def invalid(message: str, param: str | None = None) -> Refusal:
    """What is wrong with a request."""
    return Refusal(400, "invalid_request", message, param)
