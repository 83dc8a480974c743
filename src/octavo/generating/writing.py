"""Many rows of text at once, over any engine: what is written, when it may be shown, where it ends.

An engine knows slots and ids; a reader wants characters. Between the two stands `write`: it gives
rows to slots, turns ids into whole characters and holds back what may be the beginning of a stop
string. Needs no torch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ConfigError
from octavo.generating.sampling import Sampling
from octavo.text.tokenizer import Decoder, Tokenizer

STRIDE = 32  # tokens asked of an engine at once: what it writes between two looks at its readers

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
    left: int = 2**31 - 1
    """How many tokens are still wanted, at least one; a step never returns more."""
    eot: int | None = None
    """The end-of-text id: nothing is drawn after it."""
    draft: list[int] = field(default_factory=list)
    """A guess at the ids that come next, for one step; empty: none. The caller sets and clears it.

    The engine reads it together with what is unread, in one pass, and draws the token of each
    position with that position's own number: while a drawn token is the draft's it goes on to the
    next. So the draft decides how much one pass returns and never what.
    """
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each id the last step returned its (id, log-probability) pairs, best first and the drawn
    one among them; an empty list for each where logprobs is 0."""
    keep_logits: bool = False
    """Whether to report in logits what each id was drawn from."""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    """For each id the last step returned the model's logits (V,); empty unless they were wanted."""


class Engine(Protocol):
    """What writes: the PyTorch engine, the native engine, or anything of this shape."""

    slots: int
    """How many rows can be written at once."""

    def step(self, slots: list[Slot], most: int = 1) -> list[list[int]]:
        """Draw the next ids of each slot: at least one and at most ``most`` each.

        The caller appends them to the slot's ids, all or only the first few, and at most one other
        id before the next step. Reads what is not cached yet; `Slot.draft` says what a draft
        changes: the accepted ids and one more are returned, and the cache keeps nothing that was
        not accepted. What lies beyond ``most``, the slot's ``left`` or the end of the window is
        left out of a draft. A slot gets fewer ids at its end-of-text, after ``left`` of them, and
        when the engine's slice of time is over (about 25 ms, so that text flows and whoever waits
        can stop it). Every slot's ``top`` and ``logits`` are set.
        """
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


def start_ids(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """The prompt's ids; without one, what a new text begins after: end-of-text, or a newline."""
    if prompt is None and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    if prompt == "":
        raise ConfigError("the prompt is empty", fix="give some text, or no prompt at all")
    if prompt is None:
        try:
            return tokenizer.encode("\n")
        except ValueError:
            return [0]  # a vocabulary without a newline: any first symbol will do
    return tokenizer.encode(prompt)


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
    """Continue every prompt ``n`` times; yield a `Piece` a token, rows in step as far as the engine
    writes them so, each in order and its first at once.

    A row ends with the end-of-text token, which has no text; at the stop string completed first,
    whose text is cut off wherever tokens begin and end; or after ``max_new_tokens``. Rows beyond
    ``engine.slots`` wait for a free one. Without a tokenizer pieces have ids and no text. Closing
    the iterator stops the writing and frees the slots.

    Raises `ConfigError` at once for an empty prompt, an empty stop string or a negative number.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    _check(prompts, max_new_tokens, stops, n, logprobs, tokenizer is not None)
    copies = [
        Slot(-1, [int(i) for i in prompt], copy, sampling, len(prompt), logprobs, max_new_tokens)
        for prompt in prompts
        for copy in range(n)
    ]
    if not max_new_tokens:
        return iter([Piece(row, "", finished="length") for row in range(len(copies))])
    rows = [Row(i, slot, tokenizer, stops) for i, slot in enumerate(copies)]
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


def no_token(wrong: int, vocab_size: int) -> ConfigError:
    """What every engine says of an id that is not in the model's vocabulary."""
    where = f"its vocabulary is 0 to {vocab_size - 1}"
    return ConfigError(f"the model has no token {wrong}", where)


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


class Row:
    """One row's text so far: what was decoded, what waits.

    Its number ``row`` is in every `Piece`; ``stops`` are the stop strings.
    """

    def __init__(self, row: int, slot: Slot, tokenizer: Tokenizer | None, stops: list[str]) -> None:
        self.row, self.slot, self.stops = row, slot, stops
        self.decoder: Decoder | None = tokenizer.stream() if tokenizer else None
        slot.eot = tokenizer.eot_id if tokenizer else None
        self.waiting = ""

    def push(self, token: int, top: list[tuple[int, float]]) -> Piece:
        """Append a token and return what it adds."""
        slot = self.slot
        slot.ids.append(token)
        slot.left -= 1
        ended = token == slot.eot
        finished: Finished | None = "eot" if ended else None if slot.left else "length"
        new = self.decoder.push(token) if self.decoder and not ended else ""
        if self.decoder and finished:
            new += self.decoder.flush()
        text, self.waiting, stopped = split_at_stop(self.waiting + new, self.stops)
        if stopped:
            finished = "stop"
        elif finished:
            text += self.waiting
        return Piece(self.row, text, token, finished, tuple(top))


def _drive(engine: Engine, rows: list[Row]) -> Iterator[Piece]:
    """Step all rows that have a slot; a row that ends leaves its slot to the next that waits.

    What an engine wrote past the token that ended its row, at a stop string, is thrown away.
    """
    waiting, free = deque(rows), deque(range(engine.slots))
    active: list[Row] = []
    try:
        while waiting or active:
            while waiting and free:
                active.append(waiting.popleft())
                active[-1].slot.index = free.popleft()
            stepped = list(active)
            begins = any(len(row.slot.ids) == row.slot.prompt_length for row in stepped)
            drawn = engine.step([row.slot for row in stepped], 1 if begins else STRIDE)
            for nth, tokens in enumerate(zip_longest(*drawn)):
                for row, token in zip(stepped, tokens, strict=True):
                    if token is None or row not in active:
                        continue
                    piece = row.push(token, row.slot.top[nth])
                    if piece.finished:
                        active.remove(row)
                        engine.release(row.slot.index)
                        free.append(row.slot.index)
                    yield piece
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


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two texts have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
