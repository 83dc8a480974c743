"""From what a user names to one text, and from the text to tokens: files, folders, records, stdin.

A list is read in its own order, files as text/files.py reads them. Two corpora have names:
``python-docs``, the English on any Python's disk, and ``shakespeare``, downloaded; a file of that
name is called ``./shakespeare``.
"""

import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from octavo.config import DataConfig
from octavo.errors import ConfigError, DataError
from octavo.text.download import fetch
from octavo.text.files import (
    RECORD_SUFFIXES,
    byte_size,
    counted,
    decode,
    did_you_mean,
    find_files,
    read_bytes,
    records,
)
from octavo.text.python_docs import python_docs
from octavo.text.token_files import Tokens
from octavo.text.tokenizer import Tokenizer

Row = np.ndarray | Tokens
NAMED = ("python-docs", "shakespeare")
KINDS = ("auto", "char", "byte", "gpt2", "bpe")
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
    reader = _Reader(field or "text")
    for item in items:
        reader.add(item)
    documents = [document for document in reader.documents if document]
    if sum(map(len, documents)) < 2:
        amount = "a single character" if documents else "no text"
        raise DataError(f"there is {amount}", f"in {name}", "give a text to learn from")
    return Corpus(name, documents, reader.description(name, documents))


def choose_tokenizer(corpus: Corpus, data: DataConfig) -> Tokenizer:
    """The tokenizer that ``data`` asks for, trained on the corpus where it has to be.

    Raises `ConfigError` for a name that is neither a kind of tokenizer nor a path.
    """
    kind = data.tokenizer
    if kind == "auto":
        kind = "char" if len(corpus.text.encode()) < CHAR_BELOW else "bpe"
    if kind == "char":
        return Tokenizer.char(corpus.text, separator=data.separator, unseen=data.unseen)
    if kind == "bpe":
        return Tokenizer.train_bpe(corpus.documents, data.bpe_vocab_size)
    return ready_tokenizer(kind, data.separator)


def ready_tokenizer(kind: str, separator: bool = False) -> Tokenizer:
    """The tokenizer that needs no text to learn from: byte, gpt2 or a path; else `ConfigError`."""
    if kind == "byte":
        return Tokenizer.byte(separator=separator)
    if kind == "gpt2":
        return Tokenizer.gpt2()
    if os.path.exists(kind):
        return Tokenizer.load(kind)
    fix = did_you_mean(kind, KINDS, f"give {', '.join(KINDS)} or a path")
    raise ConfigError(f"data.tokenizer is {kind!r}, which is no file", fix=fix)


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> np.ndarray:
    """The corpus as ids (N,): the end-of-text token between documents where there is one."""
    if tokenizer.eot_id is None:
        return tokenizer.encode_array(corpus.text)
    first, *others = [tokenizer.encode_array(document) for document in corpus.documents]
    end = np.array([tokenizer.eot_id], dtype=first.dtype)
    return np.concatenate([first, *(part for ids in others for part in (end, ids))])


def split(tokens: Row, val_fraction: float) -> tuple[Row, Row]:
    """Training and validation tokens: views of the first and the last part, which never overlap."""
    n_train = int(len(tokens) * (1 - val_fraction))
    return tokens[:n_train], tokens[n_train:]


@dataclass
class _Reader:
    """What has been read so far."""

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
            otherwise = "without a network train on python-docs, or name a text of your own"
            data = fetch("tinyshakespeare.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256, otherwise)
            self._add_bytes(data, Path(item))
        elif item == "-":
            self.named.append("standard input")
            self._add_bytes(sys.stdin.buffer.read(), Path("standard input"))
        else:
            paths, passed_over = find_files(item, TEXT_SUFFIXES, NAMED)
            self.skipped += passed_over
            for path in paths:
                if path not in self.files:
                    self.files.add(path)
                    self._add_bytes(read_bytes(path), path)

    def description(self, name: str, documents: list[str]) -> str:
        """A line that says what was read."""
        read = [counted(len(self.files), "file")] if self.files else []
        characters = sum(map(len, documents)) + 2 * (len(documents) - 1)
        parts = [f"read {' and '.join(read + self.named)}", byte_size(self.size)]
        parts.append(f"{characters:,} characters")
        if len(documents) != len(self.files) + len(self.named):
            parts.append(counted(len(documents), "document"))
        if self.files:
            parts.append(f"from {name}")
        line = ", ".join(parts)
        if self.skipped:
            kinds = ", ".join(suffix or "without a suffix" for suffix in sorted(self.skipped))
            line += f"; passed over {counted(self.skipped.total(), 'file')} ({kinds})"
        return line

    def _add_bytes(self, data: bytes, path: Path) -> None:
        self.size += len(data)
        if path.suffix.lower() in RECORD_SUFFIXES:
            found = records(data, path)
            self.documents += [record.text(self.field, "data.field") for record in found]
        else:
            self.documents.append(decode(data, path))
