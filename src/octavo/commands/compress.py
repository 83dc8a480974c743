"""`octavo compress`: a model as a compressor."""

import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.commands.shared import Option, add_common, exactly, print_facts, progress
from octavo.errors import ConfigError, ResourceError

WORDS = "RUN FILE OUT"
PAGE = """\
Compress a file with a language model: what it expects costs few bits, what surprises it many. The
size is the model's surprise in bits, beside what gzip, xz and zstd make of the same file.

  octavo compress runs/my book.txt book.octz
  octavo compress runs/my book.txt book.octz --weights int8     with packed weights: faster
  octavo decompress runs/my book.octz book.txt

Any file comes back byte for byte; what the model knows nothing of may grow. Reading takes the same
model on the same engine, and as long as writing: the model reads every token in both. Up to 16
parts of a long file go side by side, which is several times as fast and costs a few bytes a part.
OCTAVO_ENGINE=torch takes PyTorch, where the other machine has no compiler."""


def add_options(option: Option) -> None:
    add_common(option, "weights", "base", "device", "json")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.disk import write_atomic
    from octavo.explaining.compression import compress, rivals
    from octavo.language_model import load
    from octavo.text.files import read_bytes

    path, source, out = three_words(args.words)
    data = read_bytes(source)
    lm = load(path, args.device, args.base, speculate="off", weights=args.weights)
    start = time.perf_counter()
    with progress("compressing") as watch:
        compressed = compress(lm, data, watch)
    seconds = time.perf_counter() - start
    write_atomic(out, compressed)
    sizes = {"octavo": len(compressed), **rivals(data)}
    said = "\n".join(_lines(source.name, data, sizes, seconds))
    print_facts(_facts(data, sizes, seconds), args.json, said)


def three_words(words: list[str]) -> tuple[str, Path, Path]:
    """The run, the file and where the result goes, which is free and can be written."""
    run, *paths = exactly(words, WORDS)
    source, out = map(Path, paths)
    if out.exists():
        raise ConfigError(f"{out} is there already", fix="name another, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is no directory", fix="choose another path")
    if not os.access(out.parent, os.W_OK):
        raise ResourceError(f"{out.parent} cannot be written", fix="choose another path")
    return run, source, out


def _facts(data: bytes, sizes: dict[str, int | None], seconds: float) -> dict[str, Any]:
    size = sizes["octavo"] or 0
    return {
        "bytes": len(data),
        "compressed_bytes": size,
        "ratio": len(data) / size,
        "seconds": seconds,
        "bytes_per_s": len(data) / seconds,
        "sizes": sizes,
        "bits_per_byte": {name: 8 * n / len(data) for name, n in sizes.items() if n and data},
    }


def _lines(file: str, data: bytes, sizes: dict[str, int | None], seconds: float) -> Iterator[str]:
    """One for each compressor, the smallest first."""
    yield f"{file}: {len(data):,} bytes, {len(data) / seconds:,.0f} bytes a second"
    for name, size in sorted(sizes.items(), key=lambda item: item[1] or 2**62):
        if size is None:
            yield f"  {name:<8}   not here (pip install zstandard)"
        elif data:
            bits, ratio = 8 * size / len(data), len(data) / size
            yield f"  {name:<8}{size:>14,} bytes {bits:8.3f} bits a byte {ratio:8.2f} : 1"
        else:
            yield f"  {name:<8}{size:>14,} bytes"
