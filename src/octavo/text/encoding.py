"""Texts to token ids through many processes, in their own order whatever the number of processes.

Processes, not threads: between two texts the tokenizer is Python, and one process runs one thread
of that at a time.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from octavo.errors import ResourceError
from octavo.text.streaming import Cut, Piece, after_word, digest
from octavo.text.tokenizer import Tokenizer

Label = TypeVar("Label")
WAITING = 3  # batches a process has before it, so that it never waits for the next


class Encoded(NamedTuple):
    """The tokens of some pieces, and what was counted on the way."""

    ids: np.ndarray
    """(N,) of all pieces, the end-of-text token behind each document's last."""
    sizes: np.ndarray
    """(pieces, 3) int64: each one's tokens, bytes of UTF-8 and characters."""
    digests: np.ndarray
    """(documents,) uint64, of those that begin here."""


def encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Encoded:
    """The tokens of ``pieces``."""
    end = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype=np.int64)
    rows, sizes, digests = [tokenizer.encode_array("")], [], []
    for piece in pieces:
        data = piece.text.encode()
        if piece.first:
            digests.append(piece.digest or digest(data).digest())
        ids = tokenizer.encode_array(piece.text)
        rows.append(ids)
        if piece.last:
            rows.append(end.astype(ids.dtype))
        sizes.append((len(ids) + piece.last * len(end), len(data), len(piece.text)))
    counted = np.array(sizes, dtype=np.int64).reshape(-1, 3)
    return Encoded(np.concatenate(rows), counted, np.frombuffer(b"".join(digests), "<u8"))


def encode_all(
    batches: Iterable[tuple[Label, Sequence[Piece]]], file: Path, processes: int
) -> Generator[tuple[Label, Encoded]]:
    """`encode` each batch, in order; a few batches are read ahead.

    Raises `ResourceError` when the system ended a process, most often for want of memory.
    """
    if processes == 1:
        tokenizer = Tokenizer.load(file)
        yield from ((label, encode(tokenizer, pieces)) for label, pieces in batches)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    waiting: deque[tuple[Label, Future[Encoded]]] = deque()
    try:
        for label, pieces in batches:
            waiting.append((label, pool.submit(_encode, file, pieces)))
            if len(waiting) > WAITING * processes:
                label, future = waiting.popleft()
                yield label, future.result()
        for label, future in waiting:
            yield label, future.result()
    except BrokenProcessPool:
        raise ResourceError(
            "a process that makes tokens was ended, most often for want of memory",
            fix="give fewer --processes",
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cut_for(tokenizer: Tokenizer) -> Cut | None:
    """Where a text may be cut without a change in its tokens; None: nowhere is known to be safe."""
    if tokenizer.kind in ("char", "byte"):
        return len
    return after_word if tokenizer.is_gpt2_kind else None


def _encode(file: Path, pieces: Sequence[Piece]) -> Encoded:
    return encode(_load(file), pieces)


_load = functools.cache(Tokenizer.load)  # in a worker, which knows only one


def _begin_worker() -> None:
    """Leave Ctrl-C to the process that asked, and end when that is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
