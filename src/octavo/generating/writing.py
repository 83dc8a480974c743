"""Many rows of text at once, over any engine: what is written, when it may be shown, where it ends.

An engine knows slots and ids; a reader wants characters. Between the two stands `write`: it gives
rows to slots, turns ids into whole characters and holds back what may be the beginning of a stop
string. Needs no torch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from octavo.errors import ConfigError
from octavo.generating.sampling import Sampling
from octavo.text.tokenizer import Decoder, Tokenizer

Finished = Literal["eot", "stop", "length"]
"""Why a row ended: the end-of-text token, a stop string, or max_new_tokens."""


@dataclass
class Slot:
    """One row being written: a row of the engine's cache, and how its tokens are drawn."""

    index: int
    """The cache row, 0 .. engine.slots - 1; the same until the engine is told to release it."""
    ids: list[int]
    """The prompt and what was written after it; never empty, and only ever appended to."""
    n: int
    """Which copy of its prompt this is; keys the draws."""
    sampling: Sampling
    """How the next id is drawn."""
    prompt_length: int
    """How many of ids were given."""
    logprobs: int = 0
    """How many of the most probable ids to report in top; 0: none."""
    top: list[tuple[int, float]] = field(default_factory=list)
    """(id, log-probability) of the last step, best first and the drawn one among them."""


class Engine(Protocol):
    """What writes: the PyTorch engine, the native engine, or anything of this shape."""

    slots: int
    """How many rows can be written at once."""

    def step(self, slots: list[Slot]) -> list[int]:
        """Draw the next id of each slot, which the caller appends; reads what is not cached yet."""
        ...

    def release(self, index: int) -> None:
        """Forget what the cache holds for this slot."""
        ...


@dataclass(frozen=True)
class Piece:
    """What one new token adds to one row."""

    row: int
    """prompt number x n + copy number."""
    text: str
    """New characters, whole ones; empty while they may still become a stop string."""
    id: int | None = None
    """The token; None for a row that ends before its first."""
    finished: Finished | None = None
    """Set on a row's last piece."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the likeliest tokens and of this one, where asked for."""


def write(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    n: int = 1,
    logprobs: int = 0,
) -> Iterator[Piece]:
    """Continue every prompt ``n`` times; yield a `Piece` a token, rows in step, each in order.

    A row ends with the end-of-text token, which has no text; at the stop string completed first,
    whose text is cut off wherever tokens begin and end; or after ``max_new_tokens``. Rows beyond
    ``engine.slots`` wait for a free one. Without a tokenizer pieces have ids and no text. Closing
    the iterator stops the writing and frees the slots.

    Raises `ConfigError` at once for an empty prompt, an empty stop string or a negative number.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    _check(prompts, max_new_tokens, stops, n, logprobs, tokenizer is not None)
    copies = [
        Slot(-1, [int(i) for i in prompt], copy, sampling, len(prompt), logprobs)
        for prompt in prompts
        for copy in range(n)
    ]
    if not max_new_tokens:
        return iter([Piece(row, "", finished="length") for row in range(len(copies))])
    rows = [_Row(i, slot, tokenizer, stops, max_new_tokens) for i, slot in enumerate(copies)]
    return _drive(engine, rows)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    n: int = 1,
) -> list[str]:
    """The whole text of every row of `write`, whose arguments and errors these are."""
    texts = [""] * (len(prompts) * n)
    for piece in write(engine, tokenizer, prompts, sampling, max_new_tokens, stop, n):
        texts[piece.row] += piece.text
    return texts


def window_start(length: int, block_size: int) -> int:
    """Where the window of a text of ``length`` ids begins.

    A model sees block_size ids at most. When they are full the oldest half is dropped, so that the
    rest is read again once every half block and not with every token.
    """
    half = max(1, block_size // 2)
    return max(0, -((block_size - length) // half) * half)


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Split into what may be shown and what must wait; True when a stop string ended the text.

    Of several the one completed first counts, of those the longest: what one would see character
    by character. What waits is the longest end that a stop string may begin with.
    """
    found = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    if found:
        return text[: min(found)[1]], "", True
    begun = (k for s in stops for k in range(1, len(s)) if text.endswith(s[:k]))
    border = len(text) - max(begun, default=0)
    return text[:border], text[border:], False


class _Row:
    """One row's text so far: what was decoded, what waits, how many tokens may still come."""

    def __init__(
        self, row: int, slot: Slot, tokenizer: Tokenizer | None, stops: list[str], left: int
    ) -> None:
        self.row, self.slot, self.stops, self.left = row, slot, stops, left
        self.eot = tokenizer.eot_id if tokenizer else None
        self.decoder: Decoder | None = tokenizer.stream() if tokenizer else None
        self.waiting = ""

    def push(self, token: int) -> Piece:
        """Append a token and return what it adds."""
        self.slot.ids.append(token)
        self.left -= 1
        ended = token == self.eot
        finished: Finished | None = "eot" if ended else None if self.left else "length"
        new = self.decoder.push(token) if self.decoder and not ended else ""
        if self.decoder and finished:
            new += self.decoder.flush()
        text, self.waiting, stopped = split_at_stop(self.waiting + new, self.stops)
        if stopped:
            finished = "stop"
        elif finished:
            text += self.waiting
        return Piece(self.row, text, token, finished, tuple(self.slot.top))


def _drive(engine: Engine, rows: list[_Row]) -> Iterator[Piece]:
    """Step all rows that have a slot; a row that ends leaves its slot to the next that waits."""
    waiting, free = deque(rows), deque(range(engine.slots))
    active: list[_Row] = []
    try:
        while waiting or active:
            while waiting and free:
                active.append(waiting.popleft())
                active[-1].slot.index = free.popleft()
            drawn = engine.step([row.slot for row in active])
            still = []
            for row, token in zip(active, drawn, strict=True):
                piece = row.push(token)
                if piece.finished:
                    engine.release(row.slot.index)
                    free.append(row.slot.index)
                else:
                    still.append(row)
                yield piece
            active = still
    finally:  # closed early, interrupted, or the engine failed
        for row in active:
            engine.release(row.slot.index)


def _check(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: list[str],
    n: int,
    logprobs: int,
    has_text: bool,
) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(
                f"prompt {number} is empty", fix="give at least one token to go on from"
            )
    counts = {"max_new_tokens": (max_new_tokens, 0), "n": (n, 1), "logprobs": (logprobs, 0)}
    for name, (value, low) in counts.items():
        if value < low:
            raise ConfigError(f"{name} is {value}", fix=f"give {low} or more")
    if "" in stops:
        raise ConfigError("a stop string is empty", fix="leave it out")
    if stops and not has_text:
        raise ConfigError(
            f"the stop string {stops[0]!r} needs text, and this model has no tokenizer",
            fix="leave --stop out",
        )
