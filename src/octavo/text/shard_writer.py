"""A row of tokens that grows on disk and becomes shards: whatever moment it is interrupted at."""

import os
from dataclasses import dataclass
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


@dataclass
class ShardWriter:
    """Appends ids to ``train-00007.part`` and, when that is full, writes ``train-00007.npy``.

    `sync` makes everything so far safe; ``waiting``, the ids in the part, is what the caller then
    remembers beside the ``shards``. Made anew with these it goes on there, and forgets what
    was written beyond.
    """

    home: Path
    split: Split
    suffix: str
    dtype: np.dtype[Any]
    size: int
    """Ids in a shard."""
    eot_id: int | None
    shards: list[Shard]
    waiting: int

    def __post_init__(self) -> None:
        self._file = open_at(self._part, self.waiting * self.dtype.itemsize)
        self._full: list[Path] = []

    def append(self, ids: np.ndarray) -> bool:
        """Write ids (N,) behind the others; whether that finished a shard."""
        before = len(self.shards)
        while len(ids):
            now = ids[: self.size - self.waiting]
            with disk.errors(f"write {self._part}"):
                self._file.write(now.astype(self.dtype).data)
            self.waiting += len(now)
            ids = ids[len(now) :]
            if self.waiting == self.size:
                self.finish()
        return len(self.shards) > before

    def finish(self) -> None:
        """Make the ids that wait a shard, if there are any."""
        if self.waiting:
            with disk.errors(f"write {self._part}"):
                self._file.flush()
            ids = np.memmap(self._part, self.dtype, "r")
            path = self._part.with_suffix(self.suffix)
            entry = write_shard(path, ids, self.split, self.dtype, self.eot_id)
            self._full.append(self._part)
            self.close()
            self.shards, self.waiting = [*self.shards, entry], 0
            self._file = open_at(self._part, 0)

    def sync(self) -> None:
        """Wait until all is on the disk."""
        with disk.errors(f"write {self._part}"):
            self._file.flush()
            disk.sync(self._part)

    def sweep(self) -> None:
        """Delete the files that became shards, once these are remembered."""
        while self._full:
            self._full.pop().unlink()
            disk.failpoint(f"{self.split}-swept")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def _part(self) -> Path:
        return self.home / f"{self.split}-{len(self.shards):05d}{PART}"
