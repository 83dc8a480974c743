"""An arithmetic coder, and the one rule that makes a model's probabilities integers for it.

A text becomes one number in [0, 1): every symbol narrows an interval to its share of it, so that a
symbol of probability p costs -log2 p bits (Rissanen 1976; Martin 1979, whose byte-wise coder with a
carry this is). Encoder and decoder have one method of one shape, `code`, so that whoever calls them
does the same thing in both directions. All numbers are integers.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

WHOLE, LEAST = 1 << 64, 1 << 56  # the interval's size, and how small it may be before a byte is out
TOTAL = 1 << 28  # what a distribution's frequencies sum to, about
STEPS = 256  # in which a factor of two is measured
PER_NAT = STEPS / 0.6931471805599453  # steps in a factor of e
Table = Sequence[int] | NDArray[np.int64]
"""The symbols' shares as `cumulative` has them: from 0 up, each at least 1."""


def _power(steps: int) -> int:
    """2^(32 - steps/256) rounded down, by eight exact square roots: no machine's exp has a say."""
    power = 1 << 32 * STEPS - steps
    for _ in range(8):
        power = math.isqrt(power)
    return power


POWERS = np.array([_power(steps) for steps in range(STEPS)])


def cumulative(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    """Logits (R, V) as integers to code with: (R, V + 1).

    Token i has the share from entry i to entry i + 1 of the last entry, and at least 1 of it, even
    at -inf. Probabilities are measured in steps of a 256th of a factor of two, which costs less
    than a millionth of a bit a token; the 1 costs V/TOTAL. After one multiplication and one
    rounding, which IEEE 754 fixes, everything is integers.
    """
    exact = logits.astype(np.float64)
    below = (exact.max(axis=1, keepdims=True) - exact) * PER_NAT
    steps = np.minimum(below, 33 * STEPS).astype(np.int64)
    weights = POWERS[steps % STEPS] >> steps // STEPS
    shares = 1 + weights * TOTAL // weights.sum(axis=1, keepdims=True)
    table = np.zeros((len(shares), shares.shape[1] + 1), dtype=np.int64)
    np.cumsum(shares, axis=1, out=table[:, 1:])
    return table


class Encoder:
    """Writes symbols into a number."""

    def __init__(self) -> None:
        self._low, self._range, self._out = 0, WHOLE, bytearray()

    def code(self, table: Table, symbol: int | None) -> int:
        """Narrow the interval to the share of ``symbol``, and return it."""
        assert symbol is not None
        step = self._range // int(table[-1])
        self._low += step * int(table[symbol])
        self._range = step * int(table[symbol + 1] - table[symbol])
        while self._range < LEAST:
            self._put()
            self._range <<= 8
        return symbol

    def finish(self) -> bytes:
        """The shortest number in the interval, as bytes."""
        self._low += LEAST - 1
        self._put()
        return bytes(self._out)

    def _put(self) -> None:
        """Move the highest byte out, and add what ran over to those before it."""
        carry, self._low = divmod(self._low, WHOLE)
        last = len(self._out)
        while carry:
            last -= 1
            carry, self._out[last] = divmod(self._out[last] + carry, 256)
        self._out.append(self._low >> 56)
        self._low = self._low << 8 & WHOLE - 1


class Decoder:
    """Reads the symbols back out of what `Encoder.finish` gave."""

    def __init__(self, code: bytes) -> None:
        self._code, self._next, self._range = code, 8, WHOLE
        self._above = int.from_bytes(code[:8].ljust(8, b"\0"))  # the number, less the low end

    def code(self, table: Table, symbol: int | None = None) -> int:
        """Find in whose share the number lies, and return that symbol; None was given for it."""
        assert symbol is None
        step = self._range // int(table[-1])
        symbol = bisect_right(table, min(self._above // step, int(table[-1]) - 1)) - 1
        self._above -= step * int(table[symbol])
        self._range = step * int(table[symbol + 1] - table[symbol])
        while self._range < LEAST:
            byte = self._code[self._next] if self._next < len(self._code) else 0
            self._above, self._range = self._above << 8 | byte, self._range << 8
            self._next += 1
        return symbol


Coder = Encoder | Decoder


class Counts:
    """Symbols whose distribution is learned as they come, each from once."""

    GAIN, MOST = 32, 1 << 16  # what a symbol seen weighs, and when the past begins to fade

    def __init__(self, size: int) -> None:
        self._counts = [1] * size

    def code(self, coder: Coder, symbol: int | None) -> int:
        """Code a symbol by the counts so far, and count it."""
        symbol = coder.code([0, *accumulate(self._counts)], symbol)
        self._counts[symbol] += self.GAIN
        if sum(self._counts) > self.MOST:
            self._counts = [(count + 1) // 2 for count in self._counts]
        return symbol
