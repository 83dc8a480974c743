"""From a row of tokens to batches: which windows are seen and in which order, by arithmetic alone.

The order is a function of the seed and the row's number. No generator is drawn from and nothing
need be kept, so a run goes on at any row, and several processes share one order by slicing it.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from octavo.errors import DataError
from octavo.text.token_files import Tokens

TOGETHER = 1024  # rows
ROUNDS = 6  # of the Feistel network; four suffice in theory (Luby and Rackoff 1988)


class Batches:
    """Windows of ``block_size`` tokens and their successors, in an endless keyed order of rows.

    ``tokens`` is any one-dimensional array of integers, a memory map too, or `Tokens`. With
    sampling="epoch" the ``windows`` tile the tokens: each token is predicted once an epoch, in a
    new order every time; the last ``dropped`` tokens fill no window and are not predicted. With
    "random" a row starts anywhere, and an epoch is only a number of rows. Where ``eot_id`` is
    given, the first token of a document is not predicted from the end of another. Raises
    `DataError` when there is no window.
    """

    def __init__(
        self,
        tokens: np.ndarray | Tokens,
        block_size: int,
        seed: int,
        sampling: Literal["epoch", "random"] = "epoch",
        eot_id: int | None = None,
    ) -> None:
        _check(tokens, block_size)
        self.tokens, self.block_size = tokens, block_size
        self.seed, self.sampling, self.eot_id = seed, sampling, eot_id
        self.windows, self.dropped = divmod(len(tokens) - 1, block_size)

    def __len__(self) -> int:
        return self.windows

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``first`` to ``first + count``: inputs and targets, int64, each (count, T)."""
        return _gather(self.tokens, self.starts(first, count), self.block_size, self.eot_id)

    def starts(self, first: int, count: int) -> np.ndarray:
        """The positions (count,) in ``tokens`` where these rows begin."""
        row = first + np.arange(count)
        if self.sampling == "random":  # from 64 bits the remainder's bias is invisible
            places = np.uint64(len(self.tokens) - self.block_size)
            return (_keyed(self.seed, row) % places).astype(np.int64)
        return shuffled(row, self.windows, self.seed) * self.block_size


class Epochs:
    """For a loop of one's own: ``for x, y in epochs`` is an epoch, or what is left of one.

    ``x`` and ``y`` have ``batch_size`` rows; all the state is the number of the next row.
    """

    def __init__(self, batches: Batches, batch_size: int, row: int = 0) -> None:
        self.batches, self.batch_size, self.row = batches, batch_size, row

    def __len__(self) -> int:
        """Batches in an epoch; the last one may be smaller."""
        return math.ceil(self.batches.windows / self.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        end = (self.row // len(self.batches) + 1) * len(self.batches)
        while self.row < end:
            first, self.row = self.row, min(self.row + self.batch_size, end)
            yield self.batches.rows(first, self.row - first)

    def state_dict(self) -> dict[str, int]:
        """Where it is: what was given out is not given again after `load_state_dict`."""
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another one was."""
        self.row = state["row"]


def document_mask(x: np.ndarray, eot_id: int) -> np.ndarray:
    """Where each token of ``x`` (B, T) may look: into its own document; bool (B, 1, T, T).

    The end-of-text token ends its document. With rotary positions or none a document's logits are
    those it has alone; learned positions go on counting through the row.
    """
    ends = x == eot_id
    document = ends.cumsum(1) - ends  # (B, T): how many documents end before this token
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & np.tri(x.shape[1], dtype=bool)


def shuffled(row: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Which of ``n`` things each row is: each is one once an epoch, in a new keyed order."""
    return np.array([_drawn(r // TOGETHER, n, seed)[r % TOGETHER] for r in row.tolist()], np.int64)


@functools.lru_cache(maxsize=4)
def _drawn(part: int, n: int, seed: int) -> np.ndarray:
    """`shuffled` of the ``part``th `TOGETHER` rows, which take little longer than one."""
    epoch, index = np.divmod(part * TOGETHER + np.arange(TOGETHER), n)
    return _permute(index, n, _keyed(seed, epoch))


def fixed_windows(
    tokens: np.ndarray | Tokens, block_size: int, count: int, eot_id: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``count`` windows evenly spread over ``tokens``, the same ones every time.

    They start at floor(linspace(0, len - block_size - 2, count)); a short text has fewer places to
    start. Returns inputs and targets as `Batches` does; `DataError` where no window fits.
    """
    _check(tokens, block_size)
    last = max(0, len(tokens) - block_size - 2)
    starts = np.unique(np.floor(np.linspace(0, last, count)).astype(np.int64))
    return _gather(tokens, starts, block_size, eot_id)


def _check(tokens: np.ndarray | Tokens, block_size: int) -> None:
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"tokens are a row of integers, not {tokens.dtype} of shape {tokens.shape}")
    if len(tokens) < block_size + 1:
        raise DataError(
            f"a window takes block_size + 1 = {block_size + 1} tokens, the text has {len(tokens)}",
            fix="give more text or a smaller model.block_size",
        )


def _gather(
    tokens: np.ndarray | Tokens, starts: np.ndarray, block_size: int, eot_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    rows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (count, T + 1)
    x, y = rows[:, :-1].copy(), rows[:, 1:].copy()
    if eot_id is not None:
        y[x == eot_id] = -100
    return x, y


def _permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 ... n - 1, computed where it is needed instead of shuffled.

    A Feistel network permutes the smallest square 4^h that holds n; an image outside 0 ... n - 1 is
    permuted again until it lies inside (cycle walking: Black and Rogaway 2002).
    """
    half = max(1, math.ceil((n - 1).bit_length() / 2))
    low = np.uint64((1 << half) - 1)
    image = index.astype(np.uint64)
    outside = np.ones(len(index), dtype=bool)
    while outside.any():
        value, keys = image[outside], key[outside]
        left, right = value >> np.uint64(half), value & low
        for number in range(ROUNDS):
            left, right = right, left ^ (_keyed(keys, number, right) & low)
        image[outside] = left << np.uint64(half) | right
        outside = image >= n
    return image.astype(np.int64)


def _keyed(*parts: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each combination of ``parts``."""
    state = np.zeros(1, dtype=np.uint64)  # an array, as only arrays wrap without a warning
    for part in parts:
        state = mixed(state ^ np.asarray(part).astype(np.uint64))
    return state


def mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of ``x``: SplitMix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
