"""Token ids in files, memory-mapped, and many files as one long row that is never copied.

Any one-dimensional integer ``.npy`` of either byte order, nanoGPT's raw little-endian uint16
``.bin``, and llm.c's ``.bin``, which begins with 256 int32. A file that is not whole, or not one of
these, is a `DataError` that says the type and both numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from octavo.errors import DataError

T = TypeVar("T")
SUFFIXES = (".npy", ".bin")
UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
# llm.c's magic numbers with their version and type (its dataloader.h). Read as two uint16 they are
# ids above 55,000, which no raw file of GPT-2's tokens begins with.
LLMC = {20240520: (1, UINT16), 20240801: (7, UINT32)}
LLMC_HEADER = 256 * 4  # bytes: magic, version, number of tokens, zeros
CHUNK = 1 << 22  # ids looked at together when all of them are


def choose_dtype(largest_id: int) -> np.dtype[Any]:
    """The narrower of uint16 and uint32 that holds ``largest_id``; neither ever wraps."""
    if not 0 <= largest_id < 2**32:
        raise DataError(f"the id {largest_id} fits no uint32", fix="ids are 0 to 4294967295")
    return UINT16 if largest_id < 2**16 else UINT32


def read_tokens(path: Path | str, raw: np.dtype[Any] = UINT16) -> np.ndarray:
    """The ids (N,) in a file, memory-mapped; ``raw`` is the type in a ``.bin`` without a header.

    Raises `DataError` for a file that is truncated, too long, empty, or no row of integers.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            npy = path.suffix.lower() == ".npy"
            dtype, count = _npy_header(file) if npy else _bin_header(file, size, raw)
            start = file.tell()
            _check_length(dtype, count, size - start)
            tokens = np.memmap(file, dtype, "r", offset=start, shape=count)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except DataError as error:
        raise DataError(error.what, f"in {path}", error.fix) from None
    return tokens


def _npy_header(file: IO[bytes]) -> tuple[np.dtype[Any], int]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0}
    readers[2, 0] = np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy's, and those of Python's tokenizer, which it calls
        reason = str(error).partition("\n")[0]
        raise DataError(f"the header of this .npy is damaged: {reason}") from None
    if dtype.kind not in "iu" or len(shape) != 1:
        raise DataError(
            f"tokens are a row of integers, this .npy holds {dtype} of shape {shape}",
            fix="save them as one row of uint16 or uint32",
        )
    return dtype, shape[0]


def _bin_header(file: IO[bytes], size: int, raw: np.dtype[Any]) -> tuple[np.dtype[Any], int]:
    magic, version, count = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
    if magic in LLMC:
        known, dtype = LLMC[magic]
        if version != known:
            raise DataError(
                f"a .bin with llm.c's magic number {magic} has version {known}, not {version}"
            )
        file.seek(LLMC_HEADER)
        return dtype, count
    file.seek(0)
    if size % raw.itemsize:
        raise DataError(f"a .bin of {raw} has whole {raw.itemsize}-byte ids, not {size} bytes")
    head = np.frombuffer(file.read(8192), raw)
    file.seek(0)
    if raw == UINT16 and len(head) > 64 and head[::2].any() and not head[1::2].any():
        raise DataError(
            "every second uint16 of this raw .bin is 0: these are 4-byte ids",
            fix="save them as .npy, which says its type",
        )
    return raw, size // raw.itemsize


def _check_length(dtype: np.dtype[Any], count: int, size: int) -> None:
    if count < 1:
        raise DataError(f"it holds no tokens: the header says {count} of {dtype}")
    if count * dtype.itemsize != size:
        raise DataError(
            f"the header says {count} tokens of {dtype}, {count * dtype.itemsize} bytes, "
            f"but {size} follow it",
            fix="copy or prepare the file again",
        )


class Tokens:
    """Many arrays of ids as one row: what `Batches` needs of an array, and no copy.

    A slice is a `Tokens` of parts of the same arrays; an array of positions, of any shape, gives
    the ids there; `numpy.asarray` copies only what crosses a border.
    """

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray], largest: int | None = None) -> None:
        """``largest`` is the largest id where it is known already."""
        self.parts = [part for part in parts if len(part)]
        lengths = np.array([len(part) for part in self.parts], dtype=np.int64)
        self.ends = lengths.cumsum()
        self.begins = self.ends - lengths
        common = np.result_type(*self.parts) if self.parts else UINT16
        self.dtype = common if common.kind in "iu" else np.dtype(np.int64)  # uint64 with int64
        self._largest = largest

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self),)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._slice(*key.indices(len(self)))
        positions = np.asarray(key)
        positions = np.where(positions < 0, positions + len(self), positions)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"a position outside the {len(self)} tokens")
        ids = np.empty(positions.shape, self.dtype)
        part_of = np.searchsorted(self.ends, positions, side="right")
        for number in np.unique(part_of):
            here = part_of == number
            ids[here] = self.parts[number][positions[here] - self.begins[number]]
        return ids[()]

    def _slice(self, start: int, stop: int, step: int) -> "Tokens":
        if step != 1:
            raise IndexError(f"a slice of tokens has the step 1, not {step}")
        begun = zip(self.parts, self.begins.tolist(), strict=True)
        return Tokens([part[max(start - at, 0) : max(stop - at, 0)] for part, at in begun])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.parts[0] if len(self.parts) == 1 else np.concatenate([*self.parts, EMPTY])
        return np.array(whole, self.dtype if dtype is None else dtype, copy=copy)

    def chunks(self) -> Iterator[np.ndarray]:
        """All ids in order, a few million at a time."""
        for part in self.parts:
            yield from (part[start : start + CHUNK] for start in range(0, len(part), CHUNK))

    @cached_property
    def vocab_largest(self) -> int:
        """The largest id; every one is looked at where it is not known."""
        if self._largest is None:
            chunks = list(self.chunks())
            every = watched(chunks, len(chunks), "looking at the ids")
            self._largest = max(map(largest_id, every))
        return self._largest


def largest_id(ids: np.ndarray) -> int:
    """The largest of some ids; `DataError` where one is negative."""
    if ids.min() < 0:
        raise DataError(f"the id {ids.min()} is negative", fix="prepare the tokens again")
    return int(ids.max())


def watched(pieces: Iterable[T], total: int, doing: str) -> Iterable[T]:
    """The pieces, with a progress bar on a terminal for as long as they last."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    off = not console.is_terminal
    return track(pieces, doing, total, console=console, transient=True, disable=off)


EMPTY = np.empty(0, np.uint8)  # of the narrowest type: it widens nothing it is put behind
