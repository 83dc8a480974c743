"""From written tokens to OpenAI's answers: whole ones, and the chunks of a stream."""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from octavo.serving.scheduler import Top, Written
from octavo.text.tokenizer import REPLACEMENT, Tokenizer


@dataclass
class Token:
    """A token and the characters it brought."""

    id: int
    text: str
    offset: int
    """Characters of the text before it."""
    top: Top
    explanation: dict[str, Any] | None = None


@dataclass
class Part:
    """What one choice has more than before."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finished: str | None = None


class Choice:
    """One text: which tokens stand for the characters that were given out.

    Characters may wait, as they may become a stop string, and be cut off with it; a token waits
    with its characters, and is cut off with all of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], tops: list[Top], echo: bool
    ) -> None:
        """With ``echo`` the text begins with the prompt, whose tokens have ``tops`` if scored."""
        self.tokenizer, self.decoder = tokenizer, tokenizer.stream()
        self.shown = self.decoded = 0
        self.waiting: list[Token] = []
        self.first = Part()
        if echo:
            self.first.text = tokenizer.decode(prompt)
            self.shown = len(self.first.text)
            for token, top in zip(prompt, tops, strict=False):
                self._decode(token, top, None)
            self.decoder, self.decoded = tokenizer.stream(), self.shown

    def add(self, written: list[Written]) -> Part:
        """What these tokens add to the text; the prompt's too the first time."""
        part, self.first = self.first, Part()
        for piece, explanation in ((each.piece, each.explanation) for each in written):
            part.text += piece.text
            self.shown += len(piece.text)
            if piece.id is not None and piece.finished != "eot":
                self._decode(piece.id, list(piece.top), explanation)
            part.finished = "stop" if piece.finished == "eot" else piece.finished
        if part.finished and self.waiting:
            self.waiting[-1].text += self.decoder.flush()
            self.waiting = [t for t in self.waiting if t.offset < self.shown or not t.text]
            for token in self.waiting:
                token.text = token.text[: self.shown - token.offset]
        ready = next(
            (i for i, t in enumerate(self.waiting) if t.offset + len(t.text) > self.shown),
            len(self.waiting),
        )
        part.tokens, self.waiting = self.waiting[:ready], self.waiting[ready:]
        return part

    def _decode(self, token: int, top: Top, explanation: dict[str, Any] | None) -> None:
        text = self.decoder.push(token)
        self.waiting.append(Token(token, text, self.decoded, top, explanation))
        self.decoded += len(text)


class Answer:
    """An answer to one request, of OpenAI's kind `chat.completion` or `text_completion`."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        seed: int,
        chat: bool,
        tops: int | None,
        explain: bool,
    ) -> None:
        """``tops`` and ``explain`` say what else is told of each token."""
        self.tokenizer, self.chat, self.tops, self.explain = tokenizer, chat, tops, explain
        prefix = "chatcmpl" if chat else "cmpl"
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "seed": seed,
        }
        self.opened: set[int] = set()

    def whole(self, parts: dict[int, list[Part]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one object."""
        choices = []
        for index, some in sorted(parts.items()):
            tokens = [token for part in some for token in part.tokens]
            text = "".join(part.text for part in some)
            choices.append(self._choice(index, Part(text, tokens, some[-1].finished), "message"))
        return {**self.head, "choices": choices, "usage": usage}

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        """An event's object for one choice."""
        return {**self._chunk_head(), "choices": [self._choice(index, part, "delta")]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event's object, where it was asked for."""
        return {**self._chunk_head(), "choices": [], "usage": usage}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head

    def _choice(self, index: int, part: Part, place: str) -> dict[str, Any]:
        text: dict[str, Any] = {"text": part.text}
        if self.chat:
            text = {place: {"content": part.text}}
            if index not in self.opened:
                self.opened.add(index)
                text[place]["role"] = "assistant"
        logprobs = None
        if self.tops is not None:
            logprobs = self._chat_logprobs(part) if self.chat else self._logprobs(part)
        choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": part.finished}
        if self.explain:
            choice["tokens"] = [
                t.explanation | {"text": t.text} for t in part.tokens if t.explanation
            ]
        return choice

    def _logprobs(self, part: Part) -> dict[str, Any]:
        name, tops = self._name, self.tops
        return {
            "tokens": [name(t.id) for t in part.tokens],
            "token_logprobs": [dict(t.top).get(t.id) for t in part.tokens],
            "top_logprobs": [{name(i): p for i, p in t.top} or None for t in part.tokens]
            if tops
            else None,
            "text_offset": [t.offset for t in part.tokens],
        }

    def _chat_logprobs(self, part: Part) -> dict[str, Any]:
        def about(token: int, logprob: float) -> dict[str, Any]:
            spelled = list(self.tokenizer.token_bytes(token))
            return {"token": self._name(token), "logprob": logprob, "bytes": spelled}

        content = [
            {
                **about(t.id, dict(t.top)[t.id]),
                "top_logprobs": [about(*pair) for pair in t.top[: self.tops]],
            }
            for t in part.tokens
        ]
        return {"content": content, "refusal": None}

    def _name(self, token: int) -> str:
        """A token as a text; as bytes where it is only part of a character."""
        data = self.tokenizer.token_bytes(token)
        text = data.decode("utf-8", errors="replace")
        spelled = "".join(f"\\x{byte:02x}" for byte in data)
        return f"bytes:{spelled}" if REPLACEMENT in text else text
