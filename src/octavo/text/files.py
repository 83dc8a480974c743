"""From what a user names to files, their text and their records.

A folder and a glob give their files in sorted order. A text is read exactly: UTF-8, line ends kept,
only a byte-order mark dropped. A record is a line of .jsonl or a row of .csv. What cannot be read
is a `DataError` that names the file, and the line or the byte.
"""

import csv
import glob
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
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
        if _has_lone_surrogate(value):
            raise self.error(f"has half a character, a lone surrogate, in {field!r}")
        return value

    def error(self, what: str, fix: str = "mend or remove it") -> DataError:
        """An error about this record, to be raised."""
        return _bad_record(what, self.path, self.line, fix)


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
    guess = nearest(item, [*named, *neighbours(item)])
    choices = " or ".join(["a file, a folder", named[0]] if named else ["a file", "a folder"])
    raise DataError(
        f"there is no text {item!r}", fix=f"did you mean {guess}?" if guess else f"name {choices}"
    )


def read_bytes(path: Path) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def decode(data: bytes, path: Path) -> str:
    """The text of a file's bytes; a NUL is no text."""
    try:
        nul = data.find(b"\0")
        if nul >= 0:
            raise UnicodeDecodeError("utf-8", data, nul, nul + 1, "NUL")
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8 text",
            f"in {path}",
            "convert it to UTF-8, or leave it out if it is no text",
        ) from None


def records(text: str, path: Path) -> Iterator[Record]:
    """The records of a file's text, .csv or .jsonl as its path says."""
    return (_csv_records if path.suffix.lower() == ".csv" else _json_records)(text, path)


def neighbours(path: str) -> list[str]:
    """What lies where ``path`` was looked for, spelled as the path was."""
    folder = os.path.dirname(path)
    with suppress(OSError, ValueError):  # ValueError: NUL in the path
        return [os.path.join(folder, name) for name in os.listdir(folder or ".")]
    return []


def counted(number: int, noun: str) -> str:
    """A number of things, in words: 1 file, 2,000 files."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def byte_size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else counted(count, "byte")


def _has_lone_surrogate(text: str) -> bool:
    """Whether there is half a character in it, which JSON can spell and UTF-8 cannot."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


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


def _json_records(text: str, path: Path) -> Iterator[Record]:
    """One of each line; blank lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad_record(f"is no JSON: {error}", path, number) from None
            if not isinstance(values, dict):
                raise _bad_record("is no JSON object", path, number)
            yield Record(values, path, number)


def _csv_records(text: str, path: Path) -> Iterator[Record]:
    """One of each row, under the header's names."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KB it begins with
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                columns = counted(len(rows.fieldnames or ()), "column")
                raise _bad_record(f"has not the header's {columns}", path, rows.line_num)
            yield Record(row, path, rows.line_num)
    except csv.Error as error:
        raise _bad_record(f"is no CSV: {error}", path, rows.reader.line_num) from None


def _bad_record(what: str, path: Path, line: int, fix: str = "mend or remove it") -> DataError:
    return DataError(f"line {line} {what}", f"in {path}", fix)
