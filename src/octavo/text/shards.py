"""Datasets of token ids on disk: prepared by octavo, or by others and read as they are.

A prepared dataset is a directory: ``train-00000.npy`` ..., ``val-00000.npy`` ..., one row each of
little-endian uint16 or uint32 (or ``.bin``, the same without a header), the ``tokenizer.json`` and
``dataset.json``, written last, which has each file's tokens, largest id and a SHA-256 of every
16 MB. What is damaged, or belongs to another tokenizer, is a `DataError` that says where.
"""

import glob
import hashlib
import io
import json
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from octavo import disk
from octavo.errors import DataError
from octavo.manifest import to_json
from octavo.text.files import find_files
from octavo.text.token_files import SUFFIXES, Tokens, choose_dtype, largest_id, read_tokens, watched
from octavo.text.tokenizer import Tokenizer

MANIFEST = "dataset.json"
PROGRESS = "progress.json"  # what a preparation that is not finished has instead
FORMAT, VERSION = "octavo-tokens", 1
BLOCK = 1 << 24  # bytes of a file under one SHA-256
SAMPLE, SAMPLES = 1 << 16, 4  # bytes looked at in a file without hashes, and in how many places
PART = re.compile(r"(?<![a-z])(train|val)", re.IGNORECASE)
VAL = re.compile(r"(?<![a-z])val", re.IGNORECASE)
Split = Literal["train", "val"]
Source = str | Path | Sequence[str] | None


class Shard(TypedDict):
    """What dataset.json says of one of its files."""

    file: str
    split: Split
    dtype: str
    tokens: int
    documents: int
    """End-of-text tokens in it; -1 where nobody has looked, as in files of others."""
    largest_id: int
    """-1 where nobody has looked."""
    bytes: int
    sha256: list[str]
    """One of each 16 MB; none in files of others."""


def write_shard(
    path: Path | str,
    ids: np.ndarray | Sequence[int],
    split: Split = "train",
    dtype: np.dtype[Any] | str | None = None,
    eot_id: int | None = None,
) -> Shard:
    """Write the ids (N,) as ``.npy`` or raw ``.bin``, whole or not at all; returns its entry.

    ``dtype`` is uint16 or uint32, None: what the largest id needs. ``documents`` in the entry are
    the end-of-text tokens. Raises `DataError` for ids that would wrap, `ResourceError` where the
    disk refuses.
    """
    path, array = Path(path), np.asarray(ids)
    if not array.size or array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"a shard is a row of ids, not {array.dtype} of shape {array.shape}")
    largest = largest_id(array)
    chosen = np.dtype(choose_dtype(largest) if dtype is None else dtype).newbyteorder("<")
    if largest > np.iinfo(chosen).max:
        raise DataError(f"the id {largest} does not fit {chosen}", fix="prepare it as uint32")
    file, row = io.BytesIO(), np.ascontiguousarray(array, chosen)
    if path.suffix == ".npy":
        np.save(file, row)
    else:
        file.write(row.data)
    data = file.getvalue()
    disk.write_atomic(path, data)
    return Shard(
        file=path.name,
        split=split,
        dtype=chosen.name,
        tokens=len(array),
        documents=int((array == eot_id).sum()) if eot_id is not None else 0,
        largest_id=largest,
        bytes=len(data),
        sha256=[_sha256(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)],
    )


def write_manifest(
    directory: Path | str,
    shards: Sequence[Shard],
    tokenizer: Tokenizer | None = None,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Make ``directory``, where the shards lie, a dataset: tokenizer.json, then dataset.json."""
    directory = Path(directory)
    if tokenizer is not None:
        tokenizer.save(directory)
    largest = max(shard["largest_id"] for shard in shards)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": tokenizer.fingerprint if tokenizer else None,
        "vocab_size": tokenizer.vocab_size if tokenizer else largest + 1,
        "eot_id": tokenizer.eot_id if tokenizer else None,
        "dtype": max(shard["dtype"] for shard in shards),
        "shards": list(shards),
        "report": dict(report or {}),
    }
    disk.write_atomic(directory / MANIFEST, to_json(content))


@dataclass(frozen=True)
class Dataset:
    """Token files that belong together; `open` has seen that each is there in full length."""

    name: str
    shards: list[Shard]
    home: Path | None = None
    """The directory that holds all of it, where there is one."""
    tokenizer_sha256: str | None = None
    """The fingerprint of the tokenizer that made the ids, where it is known."""
    vocab_size: int | None = None
    eot_id: int | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Source) -> "Dataset":
        """A prepared dataset, a directory of .npy and .bin files, such files, a glob or a list.

        Files of others are read in sorted order; a name that says val or validation is the
        validation part. Raises `DataError` for anything that is damaged or holds no tokens.
        """
        if dataset := cls.find(source):
            return dataset
        raise DataError(
            f"there are no tokens in {source}",
            fix="name a prepared dataset, or .npy or .bin files of token ids",
        )

    @classmethod
    def find(cls, source: Source) -> "Dataset | None":
        """Like `open`, but None where ``source`` names something else than tokens."""
        items = [source] if isinstance(source, str | Path) else list(source or [])
        homes = [Path(item) for item in items if os.path.isdir(item)]
        prepared = [home for home in homes if (home / MANIFEST).is_file()]
        for home in homes:
            if home not in prepared and (home / PROGRESS).is_file():
                raise _unfinished(home)
        if prepared and len(items) == 1:
            return cls(str(items[0]), home=prepared[0], **_read_manifest(prepared[0]))
        files = [_token_files(str(item)) for item in items]
        if prepared or (any(files) and not all(files)):
            raise DataError(
                f"{', '.join(map(str, items))} cannot be read as one row of tokens",
                fix="name one prepared dataset alone, or only files of tokens, or only texts",
            )
        if not any(files):
            return None
        paths = [path for found in files for path in found]
        home = homes[0] if len(homes) == len(items) == 1 else None
        return cls(", ".join(map(str, items)), _foreign(paths), home)

    def path(self, shard: Shard) -> Path:
        """Where a shard's file is."""
        return (self.home or Path()) / shard["file"]

    def files(self, split: Split) -> list[Path]:
        """The files of one part, absolute."""
        shards = (shard for shard in self.shards if shard["split"] == split)
        return [self.path(shard).resolve() for shard in shards]

    def tokens(self, split: Split) -> Tokens:
        """The ids of one part as one row, memory-mapped; empty where there is no such part."""
        shards = [shard for shard in self.shards if shard["split"] == split]
        parts = [read_tokens(self.path(shard), _dtype(shard)) for shard in shards]
        largest = [shard["largest_id"] for shard in shards]
        return Tokens(parts, max(largest) if min(largest, default=-1) >= 0 else None)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer.json beside the files; `DataError` where another one made them."""
        if self.home is None or not (self.home / "tokenizer.json").is_file():
            return None
        tokenizer = Tokenizer.load(self.home)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `DataError`, with both hashes, if another tokenizer than this made the ids."""
        if self.tokenizer_sha256 not in (None, tokenizer.fingerprint):
            raise DataError(
                f"the tokenizer has the SHA-256 {tokenizer.fingerprint}, "
                f"the tokens were made with {self.tokenizer_sha256}",
                f"in {self.name}",
                "use the tokenizer.json they were prepared with, or prepare them again",
            )

    @cached_property
    def sha256(self) -> str:
        """What tells these tokens from others: of the manifest, or of sizes and samples."""
        if self.shards[0]["sha256"]:
            known = (self.shards, self.tokenizer_sha256, self.vocab_size, self.eot_id)
            return _sha256(json.dumps(known).encode())
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{Path(shard['file']).name} {shard['bytes']}\n".encode())
            for start in np.linspace(0, max(shard["bytes"] - SAMPLE, 0), SAMPLES):
                digest.update(_read_at(self.path(shard), int(start), SAMPLE))
        return digest.hexdigest()


def verify(dataset: Dataset, sample: int | None = None) -> None:
    """Compare every byte with the SHA-256 in dataset.json and every id with the vocabulary.

    ``sample`` compares only so many 16 MB blocks, drawn anew each time. Raises `DataError` that
    names the file, and the bytes or the position. Sizes, types and counts `Dataset.open` has seen.
    """
    blocks = [(shard, n) for shard in dataset.shards for n in range(len(shard["sha256"]))]
    if sample is not None:
        blocks = random.Random().sample(blocks, min(sample, len(blocks)))
    for shard, number in watched(blocks, len(blocks), "comparing SHA-256"):
        _verify_block(dataset.path(shard), shard, number)
    if sample is None:
        size = dataset.tokenizer.vocab_size if dataset.tokenizer else dataset.vocab_size
        for shard in watched(dataset.shards, len(dataset.shards), "looking at the ids"):
            _verify_ids(dataset.path(shard), shard, size or 2**63)


def _verify_block(path: Path, shard: Shard, number: int) -> None:
    start = number * BLOCK
    found = _sha256(_read_at(path, start, BLOCK))
    if found != shard["sha256"][number]:
        stop = min(start + BLOCK, shard["bytes"])
        raise DataError(
            f"{shard['file']} is damaged in bytes {start} to {stop - 1} (16 MB block {number}): "
            f"their SHA-256 is {found[:16]}..., not {shard['sha256'][number][:16]}...",
            f"in {path.parent}",
            "copy the file again, or prepare the dataset again",
        )


def _read_at(path: Path, start: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise DataError(f"cannot read {path} at byte {start}: {error.strerror}") from None


def _verify_ids(path: Path, shard: Shard, vocab_size: int) -> None:
    position = 0
    for ids in Tokens([read_tokens(path, _dtype(shard))]).chunks():
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            at = int(outside.argmax())
            raise DataError(
                f"{shard['file']} holds the id {ids[at]} at position {position + at}, "
                f"the vocabulary has the ids 0 to {vocab_size - 1}",
                f"in {path.parent}",
                "prepare the dataset again with the right tokenizer",
            )
        position += len(ids)


def _unfinished(home: Path) -> DataError:
    """Its shards could be read, and nobody would see that half of the text is missing."""
    try:
        command = json.loads((home / PROGRESS).read_bytes())["go_on"]
    except (OSError, ValueError, LookupError, TypeError):
        command = "octavo data prepare"
    return DataError("this preparation is not finished", f"in {home}", f"go on with: {command}")


def _token_files(item: str) -> list[Path]:
    """The token files that ``item`` means; none where it means something else."""
    if os.path.isdir(item):
        files = [p for p in sorted(Path(item).glob("[!.]*")) if p.is_file()]
        shards = [path for path in files if path.suffix.lower() in SUFFIXES]
        named = [path for path in shards if PART.search(path.stem)]
        others = [path for path in files if path not in shards and path.name != "tokenizer.json"]
        return named or ([] if others else shards)
    if item.lower().endswith(SUFFIXES) or glob.has_magic(item):
        paths = find_files(item, SUFFIXES)[0]
        return paths if all(path.suffix.lower() in SUFFIXES for path in paths) else []
    return []


def _foreign(paths: list[Path]) -> list[Shard]:
    """Entries for files that others made; where all are named val, all are for training."""
    val = {path for path in paths if VAL.search(path.stem)}
    val = val if len(val) < len(paths) else set()
    return [
        Shard(
            file=os.path.abspath(path),
            split="val" if path in val else "train",
            dtype=tokens.dtype.name,
            tokens=len(tokens),
            documents=-1,
            largest_id=-1,
            bytes=path.stat().st_size,
            sha256=[],
        )
        for path, tokens in zip(paths, map(read_tokens, paths), strict=True)
    ]


def _read_manifest(home: Path) -> dict[str, Any]:
    """The fields of the `Dataset` in a directory, whose files are seen to be what it says."""
    path = home / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise DataError(
                f"{MANIFEST} has the format {content['format']} {content['version']}, "
                f"this octavo reads {FORMAT} {VERSION}"
            )
        if not content["shards"]:
            raise DataError(f"{MANIFEST} names no shards")
        for shard in content["shards"]:
            _check_shard(home, shard)
        fields = ("shards", "tokenizer_sha256", "vocab_size", "eot_id", "report")
        return {name: content[name] for name in fields}
    except DataError as error:
        raise DataError(error.what, error.where or f"in {home}", error.fix) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{MANIFEST} cannot be read ({type(error).__name__}: {error})",
            f"in {home}",
            "prepare the dataset again",
        ) from None


def _check_shard(home: Path, shard: Shard) -> None:
    """Raise `DataError` unless the file has the size, type and number of tokens in its entry."""
    hashes = math.ceil(shard["bytes"] / BLOCK)
    if shard["split"] not in ("train", "val") or len(shard["sha256"]) != hashes:
        raise ValueError(f"the entry of {shard['file']} is not whole")
    path = home / shard["file"]
    size = path.stat().st_size if path.is_file() else "no"
    if size != shard["bytes"]:
        raise DataError(
            f"{shard['file']} has {size} bytes, {MANIFEST} says {shard['bytes']}",
            fix="copy the file again, or prepare the dataset again",
        )
    tokens = read_tokens(path, _dtype(shard))
    if (tokens.dtype.name, len(tokens)) != (shard["dtype"], shard["tokens"]):
        raise DataError(
            f"{shard['file']} holds {len(tokens)} tokens of {tokens.dtype}, "
            f"{MANIFEST} says {shard['tokens']} of {shard['dtype']}"
        )


def _dtype(shard: Shard) -> np.dtype[Any]:
    return np.dtype(shard["dtype"]).newbyteorder("<")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
