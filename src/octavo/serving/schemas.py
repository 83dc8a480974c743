"""What the server takes: OpenAI's requests, held to their types to the letter.

docs/serve.md is the contract: every field, event and refusal. Numbers are numbers and finite, no
field is taken that is not named here. What OpenAI's clients send and cannot change the text is
ignored by name; what would change it and is not known here may only be absent or neutral. Bounds
of sampling settings are those of `octavo.generating.sampling.Sampling`.
"""

import dataclasses
import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from octavo.generating.sampling import Sampling
from octavo.language_model import make_sampling

DEFAULT_TOKENS = 200  # as `octavo generate` writes
MOST_ROWS = 128  # texts that one request may ask for
Tops = Annotated[int, Field(ge=0, le=20)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompts = (
    str
    | Ids
    | Annotated[list[str], Field(min_length=1, max_length=MOST_ROWS, fail_fast=True)]
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_ROWS, fail_fast=True)]
)
Nothing = Annotated[list[Any], Field(max_length=0)] | Annotated[dict[str, Any], Field(max_length=0)]


class Strict(BaseModel):
    """No field but those named, each of its very type, every number finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False
    include_obfuscation: Any = None


class TextFormat(Strict):
    """The one response format there is."""

    type: Literal["text"]


class WritingRequest(Strict):
    """What both ways of asking have in common; null is as good as absent."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    explain: bool | None = None

    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    preset: str | None = None

    # Only neutral values.
    best_of: int | None = None
    logit_bias: Nothing | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    response_format: TextFormat | None = None
    # Not heeded.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _writes_what_it_says(self) -> Self:
        if self.best_of not in (None, 1, self.copies):
            raise ValueError("best_of must be absent, 1 or n: the likeliest text is not sought")
        return self

    @property
    def copies(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @property
    def longest(self) -> int | None:
        """The most tokens that each text may have, where it was said."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with an event of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """How to draw, with a new seed where none was named; a `ConfigError` out of bounds."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return make_sampling(self.preset, **{"seed": secrets.randbits(32), **given})


class CompletionRequest(WritingRequest):
    """The body of /v1/completions."""

    prompt: Prompts | None = None
    logprobs: Tops | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None

    @property
    def tops(self) -> int | None:
        """How many likeliest tokens to report beside each one's log-probability; None: neither."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | None] | list[list[int]]:
        """One prompt each; None begins a new text."""
        prompt: Any = self.prompt
        single = prompt is None or isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if single else prompt


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation; an answer's message is taken back as it was given."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: Any = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: Any = None

    def plain(self) -> dict[str, str]:
        """As a chat template wants it."""
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(WritingRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Tops | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _logprobs_are_wanted(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def tops(self) -> int | None:
        """As for completions."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """The most tokens that the answer may have; the newer name wins."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer
