"""From what a user names to files, their text and their records.

A folder and a glob give their files in sorted order. A text is read exactly: UTF-8, line ends kept,
only a byte-order mark dropped. A record is a line of .jsonl or a row of .csv. What cannot be read
is a `DataError` that names the file, and the line or the byte.
"""

import csv
import glob
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import DataError
from octavo.settings import nearest

RECORD_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Record:
    """One line of .jsonl or row of .csv, and where it stands."""

    values: dict[str, Any]
    path: Path
    line: int

    def get(self, field: str, setting: str) -> Any:
        """What is under ``field``; where it is missing the error says that ``setting`` names it."""
        if field not in self.values:
            there = ", ".join(map(str, self.values)) or "none"
            raise self.error(f"has no field {field!r}", f"set {setting}; there: {there}")
        return self.values[field]

    def text(self, field: str, setting: str) -> str:
        """The text under ``field``, as `get`."""
        value = self.get(field, setting)
        if not isinstance(value, str):
            raise self.error(f"has no text under {field!r} but {value!r:.40}")
        if re.search("[\ud800-\udfff]", value):  # JSON can spell it, and UTF-8 cannot
            raise self.error(f"has half a character, a lone surrogate, in {field!r}")
        return value

    def error(self, what: str, fix: str = "mend or remove it") -> DataError:
        """An error about this record, to be raised."""
        return DataError(f"line {self.line} {what}", f"in {self.path}", fix)


def find_files(
    item: str, suffixes: Sequence[str], named: Sequence[str] = ()
) -> tuple[list[Path], Counter[str]]:
    """The files that ``item`` means: itself, a folder's with these ``suffixes``, or a glob's.

    Also counts, by suffix, the folder's files passed over. ``named`` is what else the user could
    have meant by a name that is no file.
    """
    path = Path(item)
    if os.path.isdir(item):
        return _files_in(path, suffixes)
    if os.path.exists(item):
        return [path], Counter()
    if glob.has_magic(item):
        matches = [Path(match) for match in glob.glob(item, recursive=True)]
        if found := sorted((match for match in matches if match.is_file()), key=Path.as_posix):
            return found, Counter()
    choices = f"a file, a folder or {named[0]}" if named else "a file or a folder"
    raise DataError(f"there is no text {item!r}", fix=did_you_mean(item, named, f"name {choices}"))


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about an unknown ``name``: the nearest of ``known`` and of the files there."""
    folder, files = os.path.dirname(name), []
    with suppress(OSError, ValueError):  # ValueError: NUL in the path
        files = [os.path.join(folder, file) for file in os.listdir(folder or ".")]
    guess = nearest(name, [*known, *files])
    return f"did you mean {guess}?" if guess else otherwise


def read_bytes(path: Path) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def decode(data: bytes, path: Path) -> str:
    """The text of a file's bytes; a NUL is no text."""
    try:
        if (nul := data.find(b"\0")) >= 0:
            raise UnicodeDecodeError("utf-8", data, nul, nul + 1, "NUL")
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8 text",
            f"in {path}",
            "convert it to UTF-8, or leave it out if it is no text",
        ) from None


def read_records(source: str | Sequence[str]) -> tuple[list[Record], str, str]:
    """The records of .jsonl and .csv files, folders and globs of them, or a list of these.

    A file named twice is read once. Also says in words how much was read, and the SHA-256 of the
    files' bytes, joined.
    """
    found: list[Record] = []
    size, digest = 0, hashlib.sha256()
    items = [source] if isinstance(source, str) else source
    paths = dict.fromkeys(path for item in items for path in find_files(item, RECORD_SUFFIXES)[0])
    for path in paths:
        if path.suffix.lower() not in RECORD_SUFFIXES:
            raise DataError(f"{path} holds no records", fix=f"give {' or '.join(RECORD_SUFFIXES)}")
        data = read_bytes(path)
        size += len(data)
        digest.update(data)
        found += records(data, path)
    return found, f"read {counted(len(paths), 'file')}, {byte_size(size)}", digest.hexdigest()


def records(data: bytes, path: Path) -> Iterator[Record]:
    """The records in a file's bytes, .csv or .jsonl as its path says."""
    text = decode(data, path)
    if path.suffix.lower() == ".csv":
        return csv_records(io.StringIO(text, newline=""), path)
    return json_records(text.split("\n"), path)


def json_records(lines: Iterable[str], path: Path, before: int = 0) -> Iterator[Record]:
    """One of each line behind the ``before`` first ones; blank lines are passed over."""
    for number, line in enumerate(lines, before + 1):
        if line.strip():
            here = Record({}, path, number)
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise here.error(f"is no JSON: {error}") from None
            if not isinstance(values, dict):
                raise here.error("is no JSON object")
            yield Record(values, path, number)


def csv_records(lines: Iterable[str], path: Path) -> Iterator[Record]:
    """One of each row, under the header's names."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KB it begins with
    rows = csv.DictReader(lines, strict=True)
    try:
        for row in rows:
            record = Record(row, path, rows.line_num)
            if None in row or None in row.values():
                columns = counted(len(rows.fieldnames or ()), "column")
                raise record.error(f"has not the header's {columns}")
            yield record
    except csv.Error as error:
        raise Record({}, path, rows.reader.line_num).error(f"is no CSV: {error}") from None


def counted(number: int, noun: str) -> str:
    """A number of things, in words: 1 file, 2,000 files."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def byte_size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else counted(count, "byte")


def _files_in(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    shown = [p for p in found if not any(s.startswith(".") for s in p.relative_to(folder).parts)]
    texts = [path for path in shown if path.suffix.lower() in suffixes]
    if not texts:
        raise DataError(
            f"no text among {counted(len(shown), 'file')}",
            f"in the folder {folder}",
            f"read are {' '.join(suffixes)}; a glob reads any file",
        )
    passed = Counter(p.suffix for p in shown if p.suffix.lower() not in suffixes)
    return sorted(texts, key=Path.as_posix), passed
