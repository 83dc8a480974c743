"""Which documents came before, and which runs of 13 tokens of one text also stand in another.

Of both only 64-bit hashes are kept. Ten million documents hold a pair that is wrongly taken for
equal with a chance of three in a million (n² / 2^65); of 8 million runs looked for in ten billion
tokens 0.004 are found by mistake (m · n / 2^64). Thirteen tokens are what GPT-3's authors took
(Brown et al. 2020, appendix C; there of words).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from octavo.text.batches import mixed
from octavo.text.token_files import Tokens

N = 13
MOST = 1 << 23  # hashes kept of one text, 64 MB
STRETCH, CHUNK = 1 << 20, 1 << 14  # tokens read at a time, and hashed at a time, in the CPU's cache
BASE = 0x9E3779B97F4A7C15  # odd, its bits without pattern: 2^64 over the golden ratio
FILTER_BITS = 24


class Seen:
    """Digests of documents met so far: sorted rows, each more than twice as long as the next."""

    def __init__(self, digests: np.ndarray) -> None:
        """``digests`` (N,) uint64 were met before."""
        self._rows: list[np.ndarray] = []
        self.add(digests)

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Meet more (N,) uint64; says of each whether it was met before, (N,) bool."""
        _, first = np.unique(digests, return_index=True)
        again = np.ones(len(digests), dtype=bool)
        again[first] = False
        for row in self._rows:
            again |= row[np.searchsorted(row[:-1], digests)] == digests
        new = np.sort(digests[~again])
        while len(new) and self._rows and len(self._rows[-1]) <= 2 * len(new):
            new = np.sort(np.concatenate([self._rows.pop(), new]))
        self._rows += [new] if len(new) else []
        return again


class NGrams:
    """The different runs of 13 tokens of a text, and which of them were found elsewhere.

    Of more than ``most`` those with the lowest hashes are kept: a fair sample. No run goes over the
    end of a document.
    """

    def __init__(
        self, rows: Iterable[np.ndarray | Tokens], eot_id: int | None, most: int = MOST
    ) -> None:
        """``rows`` are the text's ids, each row (T,); runs do not go from one to the next."""
        self._below = 2**64  # hashes from here on are left out
        kept, news, waiting = np.empty(0, np.uint64), [], 0
        for ids in (stretch for row in rows for stretch in stretches(row)):
            hashes = _hashes(ids)[~_has(ids, -1 if eot_id is None else eot_id)]
            news.append(self._sampled(hashes))
            waiting += len(news[-1])
            if waiting > most:
                kept = self._thinned(np.concatenate([kept, *news]), most)
                news, waiting = [], 0
        self.hashes = self._thinned(np.concatenate([kept, *news]), most)
        self.found = np.zeros(len(self.hashes), dtype=bool)
        bits = min(max(8 * len(self.hashes), 2).bit_length(), FILTER_BITS)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, dtype=bool)
        self._filter[self.hashes >> self._shift] = True

    @property
    def sampled(self) -> float:
        """The part of all different runs that was kept."""
        return self._below / 2**64

    @property
    def share(self) -> float | None:
        """The part of them that `look_in` found; None where the text is too short to have any."""
        return float(self.found.mean()) if len(self.found) else None

    def look_in(self, hashes: np.ndarray) -> None:
        """Mark those that are among ``hashes`` (N,)."""
        hashes = self._sampled(hashes)
        hashes = hashes[self._filter[hashes >> self._shift]]  # nearly all end here, cheaply
        if len(hashes):
            places = np.searchsorted(self.hashes[:-1], hashes)
            self.found[places[self.hashes[places] == hashes]] = True

    def _sampled(self, hashes: np.ndarray) -> np.ndarray:
        return hashes if self._below == 2**64 else hashes[hashes < np.uint64(self._below)]

    def _thinned(self, hashes: np.ndarray, most: int) -> np.ndarray:
        hashes = np.sort(hashes)  # numpy's unique takes fifty times as long
        hashes = hashes[np.diff(hashes, prepend=~hashes[:1]) != 0]
        while len(hashes) > most:
            self._below //= 2
            hashes = self._sampled(hashes)
        return hashes


def share_found(
    texts: Mapping[str, Iterable[np.ndarray | Tokens]],
    tokens: Tokens,
    eot_id: int | None,
    threads: int = 1,
    show: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, float | int | None]]:
    """Of each text's different runs of 13 tokens: how many, which share stands in ``tokens``.

    ``sampled`` is the part of them that was looked for. A text is rows of ids, as for `NGrams`.
    """
    wanted = {name: NGrams(rows, eot_id) for name, rows in texts.items()}

    def look(start: int) -> int:
        for ids in stretches(tokens[start : start + STRETCH + N - 1], CHUNK):
            hashes = _hashes(ids)
            for ngrams in wanted.values():
                ngrams.look_in(hashes)
        return min(start + STRETCH, len(tokens))

    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter
        for done in pool.map(look, range(0, len(tokens), STRETCH)):
            show(done)
    return {
        name: {"ngrams": len(found.hashes), "share": found.share, "sampled": found.sampled}
        for name, found in wanted.items()
    }


def stretches(row: np.ndarray | Tokens, size: int = STRETCH) -> Iterator[np.ndarray]:
    """A row of ids in parts that hold each run of 13 once: each begins with the last's last 12."""
    row = np.asarray(row) if len(row) <= STRETCH + N else row
    for start in range(0, len(row) - N + 1, size):
        yield np.asarray(row[start : start + size + N - 1])


def _hashes(ids: np.ndarray) -> np.ndarray:
    """The hash of each 13 ids in a row: (T,) to (T - 12,) uint64.

    A polynomial in BASE (Rabin & Karp 1987) of the mixed ids, whose width doubles: 1, 3, 6, 13.
    """
    single = hashes = mixed(ids.astype(np.uint64))
    width = 1
    for bit in f"{N:b}"[1:]:
        hashes = hashes[:-width] * np.uint64(pow(BASE, width, 2**64)) + hashes[width:]
        width *= 2
        if bit == "1":
            hashes = hashes[:-1] * np.uint64(BASE) + single[width:]
            width += 1
    return mixed(hashes)


def _has(ids: np.ndarray, token: int) -> np.ndarray:
    """Whether ``token`` is among each 13 ids in a row: (T,) to (T - 12,)."""
    before = np.concatenate([[0], np.cumsum(ids == token)])
    return before[N:] > before[:-N]
