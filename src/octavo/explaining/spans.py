"""Which pieces of a text stand word for word in another, much longer one.

Exact, in one pass over the long text: numpy hashes every 16 bytes of it and looks for them among
the short text's; only where many in a row are found are the bytes themselves compared. 100 MB take
a few seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from octavo.text.token_files import watched

SEED = 16  # bytes under one hash
SHORTEST = 24  # bytes, some four words: shorter pieces stand everywhere
STRETCH = 1 << 16  # bytes hashed at a time, in the CPU's cache
BASE = 0x9E3779B97F4A7C15  # odd, its bits without pattern: 2^64 over the golden ratio
FILTER_BITS = 20


@dataclass(frozen=True, order=True)
class Span:
    """Bytes ``start`` to ``end`` of the short text; ``place`` is where a copy of them begins in the
    long one.
    """

    start: int
    end: int
    place: int


def find_spans(text: bytes, corpus: bytes) -> list[Span]:
    """Every piece of ``text`` of at least 24 bytes that stands in ``corpus`` and is part of no
    longer one that does, in order.
    """
    places: dict[bytes, int] = {}  # of each piece, where it stands
    seen: set[bytes] = set()
    for start, end in _candidates(text, corpus):
        region = corpus[start:end]
        if region in seen:  # rulers and indentation come by the thousand
            continue
        seen.add(region)
        for first, last in _pieces(region, text):
            if last - first >= SHORTEST:
                places.setdefault(region[first:last], start + first)
    return _longest(text, places)


def _candidates(text: bytes, corpus: bytes) -> list[tuple[int, int]]:
    """Where in ``corpus`` so many hashes in a row are the text's that a piece may stand there."""
    wanted = np.unique(_hashes(np.frombuffer(text, np.uint8)))
    if not len(wanted):
        return []
    shift = np.uint64(64 - FILTER_BITS)
    maybe = np.zeros(1 << FILTER_BITS, dtype=bool)
    maybe[wanted >> shift] = True
    data, found = np.frombuffer(corpus, np.uint8), [np.empty(0, np.int64)]
    starts = range(0, max(len(data) - SEED + 1, 0), STRETCH)
    for start in watched(starts, len(starts), "searching the training text"):
        hashes = _hashes(data[start : start + STRETCH + SEED - 1])
        near = np.flatnonzero(maybe[hashes >> shift])
        index = np.searchsorted(wanted[:-1], hashes[near])
        found.append(start + near[wanted[index] == hashes[near]])
    hits = np.concatenate(found)
    borders = np.flatnonzero(np.diff(hits, prepend=-2, append=hits[-1:] + 2) != 1)
    firsts, lasts = hits[borders[:-1]], hits[borders[1:] - 1]
    long = lasts - firsts >= SHORTEST - SEED
    return list(zip(firsts[long].tolist(), (lasts[long] + SEED).tolist(), strict=True))


def _hashes(data: np.ndarray) -> np.ndarray:
    """The hash of each 16 bytes in a row: (N,) to (N - 15,) uint64; equal bytes, equal hashes.

    A polynomial in BASE (Rabin & Karp 1987) whose width doubles: 1, 2, 4, 8, 16.
    """
    hashes = (data.astype(np.uint64) + np.uint64(1)) * np.uint64(BASE)
    hashes ^= hashes >> np.uint64(29)  # else the bytes' differences would survive the sums
    for width in (1, 2, 4, 8):
        hashes = hashes[:-width] * np.uint64(pow(BASE, width, 2**64)) + hashes[width:]
    return hashes


def _pieces(region: bytes, text: bytes) -> Iterator[tuple[int, int]]:
    """The (start, end) of each piece of ``region`` that stands in ``text`` and cannot be longer."""
    start = end = 0
    while end < len(region):
        if region[start : end + 1] in text:
            end += 1
            continue
        yield start, end
        while start <= end and region[start : end + 1] not in text:
            start += 1
        end += 1
    yield start, end


def _longest(text: bytes, places: dict[bytes, int]) -> list[Span]:
    """From each byte of ``text`` the longest part of a piece, where it goes beyond the last one's
    end; ``places`` says where in the other text each piece stands.
    """
    begins: dict[bytes, list[tuple[bytes, int]]] = {}
    for piece in places:
        for at in range(len(piece) - SHORTEST + 1):
            begins.setdefault(piece[at : at + SHORTEST], []).append((piece, at))
    spans, reach = list[Span](), 0
    for start in range(len(text) - SHORTEST + 1):
        if reach == len(text):
            break
        found, reach = None, max(reach, start + SHORTEST - 1)
        for piece, at in begins.get(text[start : start + SHORTEST], ()):
            if piece[at : at + reach + 1 - start] == text[start : reach + 1]:
                ahead = zip(piece[at + reach - start :], text[reach:], strict=False)
                reach += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ahead))
                found = Span(start, reach, places[piece] + at)
        spans += [found] if found else []
    return spans
