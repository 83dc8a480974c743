"""A row of tokens that grows on disk and becomes shards: whatever moment it is interrupted at."""

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from octavo import disk
from octavo.errors import DataError
from octavo.text.shards import Shard, Split, write_shard

PART = ".part"


def open_at(path: Path, size: int) -> IO[bytes]:
    """A file that had ``size`` bytes when they were last known to be safe, to append to."""
    with disk.errors(f"write {path}"):
        file = path.open("r+b" if size else "w+b")
        if os.fstat(file.fileno()).st_size < size:
            raise DataError(f"{path.name} has become shorter", f"in {path.parent}", "begin anew")
        file.truncate(size)
        file.seek(size)
    return file


class ShardWriter:
    """Appends ids to ``train-00007.part`` and, when that is full, writes ``train-00007.npy``.

    `sync` makes everything so far safe; ``waiting``, the ids in the part, is what the caller then
    remembers beside the ``shards``. Made anew with these it goes on there, whatever followed.
    """

    def __init__(
        self,
        home: Path,
        split: Split,
        suffix: str,
        dtype: np.dtype[Any],
        size: int,
        eot_id: int | None,
    ) -> None:
        """A shard has ``size`` ids of ``dtype``."""
        self._home, self._split, self._suffix = home, split, suffix
        self._dtype, self._size, self._eot_id = dtype, size, eot_id
        self.shards: list[Shard] = []
        self.waiting = 0
        self._file: IO[bytes] | None = None
        self._full: list[Path] = []

    def go_on(self, shards: list[Shard], waiting: int) -> None:
        """Begin behind ``shards`` and ``waiting`` ids more; what is written beyond is forgotten."""
        self.shards, self.waiting = list(shards), waiting
        self._file = open_at(self._part, waiting * self._dtype.itemsize)

    def append(self, ids: np.ndarray) -> bool:
        """Write ids (N,) behind the others; whether that finished a shard."""
        finished = False
        while len(ids):
            now = ids[: self._size - self.waiting]
            with disk.errors(f"write {self._part}"):
                self._open.write(now.astype(self._dtype).data)
            self.waiting += len(now)
            ids = ids[len(now) :]
            if self.waiting == self._size:
                self.finish()
                finished = True
        return finished

    def finish(self) -> None:
        """Make the ids that wait a shard, if there are any."""
        if self.waiting:
            with disk.errors(f"write {self._part}"):
                self._open.flush()
            ids = np.memmap(self._part, self._dtype, "r")
            path = self._part.with_suffix(self._suffix)
            entry = write_shard(path, ids, self._split, self._dtype, self._eot_id)
            self._full.append(self._part)
            self.close()
            self.go_on([*self.shards, entry], 0)

    def sync(self) -> None:
        """Wait until all is on the disk."""
        with disk.errors(f"write {self._part}"):
            self._open.flush()
            disk.sync(self._part)

    def sweep(self) -> None:
        """Delete the files that became shards, once these are remembered."""
        while self._full:
            self._full.pop().unlink()
            disk.failpoint(f"{self._split}-swept")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    @property
    def _part(self) -> Path:
        return self._home / f"{self._split}-{len(self.shards):05d}{PART}"

    @property
    def _open(self) -> IO[bytes]:
        assert self._file is not None, "go_on comes first"
        return self._file
