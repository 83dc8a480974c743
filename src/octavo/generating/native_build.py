"""The native engine's library: carried by the wheel, or compiled once by the system's compiler.

It lies in octavo's cache under a name that holds a hash of the sources, the flags and the compiler,
so that a change of any makes a new one; it appears under that name whole or not at all, and
processes that build it at once do not disturb each other. A library beside the sources, which a
wheel carries, serves if it was made from these very sources. At the top only the standard library
is imported: the wheel is built where nothing else is.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("native.cpp", "kernels.h", "sampling.h")
# No -march=native: the library picks its instructions when it runs, so any machine can carry it.
# No contraction: a * b + c is rounded twice on every machine.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
COMPILERS = ("g++", "clang++", "c++")
QUIET_SECONDS = 1.0  # a build that takes longer says so


class NoLibraryError(Exception):
    """There is no native library here that can write this, for the reason given."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, built now if it has to be. Raises `NoLibraryError`; other engines can write."""
    carried = HERE / f"_native-{source_key()}.so"
    if carried.exists():
        try:
            return ctypes.CDLL(str(carried))
        except OSError:  # made for another C library: this system's compiler may do
            pass
    try:
        return ctypes.CDLL(str(built()))
    except OSError as error:
        raise NoLibraryError(f"the library cannot be used: {error}") from None


def built() -> Path:
    """The library in the cache, compiled if it is not there. Raises `NoLibraryError`."""
    from octavo.text.download import cache_dir

    compiler = find_compiler()
    version = _run([*compiler, "--version"]).stdout
    key = hashlib.sha256(repr((source_key(), compiler, version)).encode()).hexdigest()[:16]
    path = cache_dir() / f"native-{key}.so"
    if not path.exists():
        try:
            _compile_aside(compiler, path)
        except OSError as error:
            reason = f"{path.parent} cannot be written: {error.strerror}"
            raise NoLibraryError(reason) from None
    return path


def source_key() -> str:
    """A hash of the sources, the flags and the kind of machine."""
    digest = hashlib.sha256(repr((FLAGS, sys.platform, platform.machine())).encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """$CXX, or the first of g++, clang++, c++ that is there. Raises `NoLibraryError`."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise NoLibraryError("there is no C++ compiler (g++, clang++ or c++)")


def compile_library(compiler: list[str], path: Path, *more: str) -> None:
    """Compile the sources into the library ``path``, with ``more`` flags beside the usual ones.

    Raises `NoLibraryError` with the reason.
    """
    command = [*compiler, *FLAGS, *more, str(HERE / SOURCES[0]), "-o", str(path)]
    result = _run(command)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error:" in line]
        reason = (lines or result.stderr.splitlines() or [f"exit code {result.returncode}"])[0]
        raise NoLibraryError(f"{compiler[0]} failed: {reason}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NoLibraryError(f"the compiler {command[0]} does not run: {error}") from None


def _compile_aside(compiler: list[str], path: Path) -> None:
    from octavo.disk import scratch, sync

    notice = threading.Timer(
        QUIET_SECONDS, print, ["compiling the native engine, once ..."], {"file": sys.stderr}
    )
    notice.daemon = True
    notice.start()
    try:
        with scratch(path.parent, path.name) as folder:
            compile_library(compiler, folder / path.name)
            sync(folder / path.name)
            os.replace(folder / path.name, path)
    finally:
        notice.cancel()
