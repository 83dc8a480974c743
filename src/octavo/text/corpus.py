"""From what a user names to one text, and from the text to tokens: files, folders, records, stdin.

A text is read exactly: UTF-8, line ends kept, only a byte-order mark dropped. Folders and globs are
read in sorted order, a list in its own. Two corpora have names: ``python-docs``, the English on any
Python's disk, and ``shakespeare``, downloaded; a file of that name is called ``./shakespeare``.
"""

import csv
import glob
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from octavo.config import DataConfig
from octavo.errors import ConfigError, DataError
from octavo.settings import nearest
from octavo.text.download import fetch
from octavo.text.python_docs import python_docs
from octavo.text.tokenizer import Tokenizer

NAMED = ("python-docs", "shakespeare")
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# What counts as text in a folder; what is named, or matched by a glob, is read whatever its name.
TEXT_SUFFIXES = (
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".jsonl", ".csv",
    ".py", ".js", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".sh",
)  # fmt: skip
CHAR_BELOW = 5_000_000  # bytes of text; above, tokenizer "auto" trains a BPE


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from; ``description`` is a line that says what was read."""

    name: str
    documents: list[str]
    description: str

    @cached_property
    def text(self) -> str:
        """The documents, one blank line between two."""
        return "\n\n".join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_corpus(source: str | list[str] | None, field: str | None = None) -> Corpus:
    """Read a named corpus, files, folders, globs, ``-`` for standard input, or a list of these.

    Each line of .jsonl and row of .csv is a document, its text under ``field`` ("text" unless
    named); every other file is one document. None is data/input.txt where it exists, else
    python-docs. Raises `DataError`, naming file and line or byte, for what cannot be read as text.
    """
    if source is None:
        source = "data/input.txt" if Path("data/input.txt").is_file() else "python-docs"
    items = [source] if isinstance(source, str) else source
    name = ", ".join("standard input" if item == "-" else item for item in items)
    reader = _Reader(name, field or "text")
    for item in items:
        reader.add(item)
    return reader.corpus()


def choose_tokenizer(corpus: Corpus, data: DataConfig) -> Tokenizer:
    """The tokenizer that ``data`` asks for, trained on the corpus where it has to be.

    Raises `ConfigError` for a name that is neither a kind of tokenizer nor a path.
    """
    kind = data.tokenizer
    if kind == "auto":
        kind = "char" if len(corpus.text.encode()) < CHAR_BELOW else "bpe"
    if kind == "char":
        return Tokenizer.char(corpus.text, separator=data.separator, unseen=data.unseen)
    if kind == "byte":
        return Tokenizer.byte(separator=data.separator)
    if kind == "gpt2":
        return Tokenizer.gpt2()
    if kind == "bpe":
        return Tokenizer.train_bpe(corpus.documents, data.bpe_vocab_size)
    if os.path.exists(kind):
        return Tokenizer.load(kind)
    guess = nearest(kind, ("auto", "char", "byte", "gpt2", "bpe", *_neighbours(kind)))
    raise ConfigError(
        f"data.tokenizer is {kind!r}, which is no file",
        fix=f"did you mean {guess}?" if guess else "give auto, char, byte, gpt2, bpe or a path",
    )


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """The corpus as ids (N,): the end-of-text token between documents where there is one."""
    if tokenizer.eot_id is None:
        return tokenizer.encode_array(corpus.text)
    first, *others = [tokenizer.encode_array(document) for document in corpus.documents]
    end = np.array([tokenizer.eot_id], dtype=first.dtype)
    return np.concatenate([first, *(part for ids in others for part in (end, ids))])


def split(tokens: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens: views of the first and the last part, which never overlap."""
    n_train = int(len(tokens) * (1 - val_fraction))
    return tokens[:n_train], tokens[n_train:]


@dataclass
class _Reader:
    """What has been read so far."""

    name: str
    field: str
    documents: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)
    size: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, item: str) -> None:
        """Read one thing a user named."""
        if item == "python-docs":
            documents = python_docs()
            self.named.append("the documentation of Python {}.{}.{}".format(*sys.version_info))
            self.size += sum(len(document.encode()) for document in documents)
            self.documents += documents
        elif item == "shakespeare":
            self.named.append("Tiny Shakespeare")
            self._add_bytes(_fetch_shakespeare(), Path(item))
        elif item == "-":
            self.named.append("standard input")
            self._add_bytes(sys.stdin.buffer.read(), Path("standard input"))
        else:
            for path in self._files(item):
                self._add_file(path)

    def corpus(self) -> Corpus:
        """All of it; `DataError` when that is less than two characters."""
        documents = [document for document in self.documents if document]
        if sum(map(len, documents)) < 2:
            amount = "a single character" if documents else "no text"
            raise DataError(f"there is {amount}", f"in {self.name}", "give a text to learn from")
        return Corpus(self.name, documents, self._description(documents))

    def _description(self, documents: list[str]) -> str:
        files = [_counted(len(self.files), "file")] if self.files else []
        characters = sum(map(len, documents)) + 2 * (len(documents) - 1)
        parts = [f"read {' and '.join(files + self.named)}", _size(self.size)]
        parts.append(f"{characters:,} characters")
        if len(documents) != len(self.files) + len(self.named):
            parts.append(_counted(len(documents), "document"))
        if self.files:
            parts.append(f"from {self.name}")
        line = ", ".join(parts)
        if self.skipped:
            kinds = ", ".join(suffix or "without a suffix" for suffix in sorted(self.skipped))
            line += f"; passed over {_counted(self.skipped.total(), 'file')} ({kinds})"
        return line

    def _files(self, item: str) -> list[Path]:
        path = Path(item)
        if os.path.isdir(item):
            return self._text_files(path)
        if os.path.exists(item):
            return [path]
        if glob.has_magic(item):
            matches = [Path(match) for match in glob.glob(item, recursive=True)]
            if found := sorted((match for match in matches if match.is_file()), key=Path.as_posix):
                return found
        guess = nearest(item, [*NAMED, *_neighbours(item)])
        raise DataError(
            f"there is no text {item!r}",
            fix=f"did you mean {guess}?" if guess else f"name a file, a folder or {NAMED[0]}",
        )

    def _text_files(self, folder: Path) -> list[Path]:
        found = [path for path in folder.rglob("*") if path.is_file()]
        shown = [
            p for p in found if not any(s.startswith(".") for s in p.relative_to(folder).parts)
        ]
        texts = [path for path in shown if path.suffix.lower() in TEXT_SUFFIXES]
        self.skipped.update(p.suffix for p in shown if p.suffix.lower() not in TEXT_SUFFIXES)
        if not texts:
            raise DataError(
                f"no text among {_counted(len(shown), 'file')}",
                f"in the folder {folder}",
                f"read are {' '.join(TEXT_SUFFIXES)}; a glob reads any file",
            )
        return sorted(texts, key=Path.as_posix)

    def _add_file(self, path: Path) -> None:
        if path in self.files:
            return
        self.files.add(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        self._add_bytes(data, path)

    def _add_bytes(self, data: bytes, path: Path) -> None:
        self.size += len(data)
        text = _decode(data, path)
        records = {".jsonl": _json_records, ".csv": _csv_records}.get(path.suffix.lower())
        self.documents += records(text, self.field, path) if records else [text]


def _decode(data: bytes, path: Path) -> str:
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


def _json_records(text: str, field: str, path: Path) -> Iterator[str]:
    """The text of each line; blank lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad_record(f"is no JSON: {error}", path, number) from None
            if not isinstance(record, dict):
                raise _bad_record("is no JSON object", path, number)
            yield _text_of(record, field, path, number)


def _csv_records(text: str, field: str, path: Path) -> Iterator[str]:
    """The text of each row under the header's column."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KB it begins with
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                columns = _counted(len(rows.fieldnames or ()), "column")
                raise _bad_record(f"has not the header's {columns}", path, rows.line_num)
            yield _text_of(row, field, path, rows.line_num)
    except csv.Error as error:
        raise _bad_record(f"is no CSV: {error}", path, rows.reader.line_num) from None


def _text_of(record: dict, field: str, path: Path, number: int) -> str:
    if field not in record:
        there = ", ".join(map(str, record)) or "none"
        raise _bad_record(
            f"has no field {field!r}", path, number, f"set data.field; there: {there}"
        )
    value = record[field]
    if not isinstance(value, str):
        raise _bad_record(f"has no text under {field!r} but {value!r:.40}", path, number)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise _bad_record(f"has half a character, a lone surrogate, in {field!r}", path, number)
    return value


def _bad_record(what: str, path: Path, number: int, fix: str = "mend or remove it") -> DataError:
    return DataError(f"line {number} {what}", f"in {path}", fix)


def _fetch_shakespeare() -> bytes:
    otherwise = "without a network train on python-docs, or name a text of your own"
    return fetch("tinyshakespeare.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256, otherwise)


def _neighbours(path: str) -> list[str]:
    """What lies where ``path`` was looked for, spelled as the path was."""
    folder = os.path.dirname(path)
    with suppress(OSError, ValueError):  # ValueError: NUL in the path
        return [os.path.join(folder, name) for name in os.listdir(folder or ".")]
    return []


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else _counted(count, "byte")
