"""Files and directories that are whole or absent, whatever moment the process is killed at.

The order is always: write under a hidden name, fsync, rename, fsync the directory. What the file
system refuses becomes `ResourceError`; a path that cannot be becomes `ConfigError`.
"""

import errno
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from octavo.errors import ConfigError, ResourceError

IMPOSSIBLE_PATH = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


def failpoint(name: str) -> None:
    """What OCTAVO_FAILPOINT wants to happen here befalls the process: for tests.

    ``name`` ends it as kill -9 would, ``name:full`` is a disk without space, ``name:term`` is
    SIGTERM.
    """
    wanted, _, what = os.environ.get("OCTAVO_FAILPOINT", "").partition(":")
    if wanted != name:
        return
    if what == "term":
        signal.raise_signal(signal.SIGTERM)
    elif what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        os._exit(137)


@contextmanager
def errors(doing: str) -> Iterator[None]:
    """Turn the file system's refusals while ``doing`` something into errors for people."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors hides the errno in its text
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in IMPOSSIBLE_PATH:
            raise ConfigError(f"cannot {doing}: {reason}", fix="choose another path") from error
        raise ResourceError(
            f"cannot {doing}: {reason}",
            fix="see to free space and permissions there; what was saved before is intact",
        ) from error


def exists(path: Path) -> bool:
    """Whether something is at ``path``; unlike `Path.exists` it tells no from cannot know."""
    with errors(f"look at {path}"):
        try:
            path.stat()
        except FileNotFoundError:
            return False
        except ValueError:
            raise ConfigError(f"{str(path)!r} is no path", fix="leave out NUL characters") from None
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at ``path``: after a kill it holds the old bytes or the new ones."""
    temp = path.parent / f".tmp-{secrets.token_hex(8)}"
    with errors(f"write {path}"):
        try:
            write_synced(temp, data)
            failpoint(f"{path.name}-prepared")
            os.replace(temp, path)
            failpoint(f"{path.name}-replaced")
            sync(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    failpoint(f"{path.name}-unsynced")
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    failpoint(f"{path.name}-synced")


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden directory in ``parent``, gone afterwards unless it was published."""
    temp = parent / f".tmp-{name}-{secrets.token_hex(4)}"
    temp.mkdir(parents=True)
    failpoint("scratch-made")
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def publish(temp: Path, target: Path) -> None:
    """Let a directory whose files are synced appear as ``target``, in one step and for good."""
    sync(temp)
    failpoint("scratch-synced")
    os.rename(temp, target)
    sync(target.parent)


def discard(path: Path) -> None:
    """Delete a directory so that a kill leaves nothing half deleted under its name."""
    trash = path.parent / f".trash-{path.name}-{secrets.token_hex(4)}"
    os.rename(path, trash)
    failpoint("trash-renamed")
    shutil.rmtree(trash)
    failpoint("trash-deleted")


def sweep(folder: Path) -> None:
    """Remove what killed processes left in ``folder``, where nobody else may be writing."""
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
        failpoint("swept")
