"""From what a user names to a stream of documents, of which never more than a little is in memory.

A plain text is one document, read in stretches; a line of .jsonl, a row of .csv or .parquet and a
row of a Hugging Face dataset (``hf:NAME:CONFIG:SPLIT``) are one each, their text under a field.
.jsonl and .csv may be gzipped. Bytes that are no UTF-8 and lone surrogates become U+FFFD and are
counted; a NUL in a plain text says that it is none. Behind every piece reading can go on again.
"""

import codecs
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from octavo.errors import DataError, MissingExtraError
from octavo.text import hub
from octavo.text.corpus import NAMED, TEXT_SUFFIXES, read_corpus
from octavo.text.files import Record, csv_records, find_files, json_records

STRETCH = 1 << 20  # bytes of a plain text at a time
FEW = 3  # documents expected to be chosen below which plain texts give their ends instead
BOM = b"\xef\xbb\xbf"
digest = partial(hashlib.blake2b, digest_size=8, key=b"octavo")
"""What tells documents apart: equal texts have equal digests, in whatever format they come."""

Kind = Literal["text", "jsonl", "csv", "parquet", "hub", "corpus"]
Cut = Callable[[str], int]
"""Where a text may be cut so that its parts have the whole's tokens; 0: nowhere yet."""


class Piece(NamedTuple):
    """A document, or a stretch of a long one, and how to go on behind it."""

    text: str
    position: Any
    """JSON; `read` given this goes on with the next piece."""
    done: int
    """Bytes of the source read so far."""
    first: bool = True
    last: bool = True
    digest: bytes | None = None
    """The whole document's, where it is known before: of plain texts."""
    repaired: int = 0
    """Bytes that were no UTF-8, or lone surrogates."""


@dataclass(frozen=True)
class Source:
    """A file, the bytes ``start`` to ``stop`` of a plain text, or a dataset elsewhere."""

    name: str
    kind: Kind
    path: Path
    size: int = 0
    """Bytes; 0 where nobody knows."""
    start: int = 0
    stop: int = 0
    split: Literal["train", "val"] | None = None
    """Which part its documents belong to; None: they are chosen one by one."""


def find_sources(items: Sequence[str], piped: Path) -> list[Source]:
    """The sources that ``items`` mean, each file once; standard input is in the file ``piped``.

    Raises `DataError` for a name that is none, and for a packed file of which nothing is known.
    """
    found: dict[Path | str, Source] = {}
    for item in items:
        item = hub.SHORT_NAMES.get(item, item)
        if item.startswith(hub.PREFIX):
            found[item] = Source(item, "hub", Path())
        elif item in NAMED and not os.path.exists(item):
            found[item] = Source(item, "corpus", Path())
        elif item == "-":
            found[item] = _file(piped, "standard input")
        else:
            named = (*NAMED, *hub.SHORT_NAMES)
            for path in find_files(item, (*TEXT_SUFFIXES, ".parquet", ".gz"), named)[0]:
                found[path] = _file(path, str(path))
    return list(found.values())


def with_ends_for_validation(sources: list[Source], fraction: float) -> list[Source]:
    """Cut the last ``fraction`` off each plain text, for validation, where they are few.

    Of many documents whole ones can be chosen; of one book none.
    """
    texts = [source for source in sources if source.kind == "text"]
    if not 0 < len(texts) * fraction < FEW:
        return sources
    parts = (_cut_end(s, fraction) if s.kind == "text" else [s] for s in sources)
    return [part for found in parts for part in found]


def read(source: Source, field: str, cut: Cut | None, position: Any = None) -> Iterator[Piece]:
    """The pieces of ``source``, or those behind ``position``; an empty text is a document without.

    ``cut`` says where a plain text may be cut, None: nowhere. Raises `DataError`, naming the place,
    for what cannot be read and `ResourceError` where the network fails.
    """
    readers: dict[Kind, Callable[[], Iterator[Piece]]] = {
        "text": lambda: _read_text(source, cut, position),
        "jsonl": lambda: (_from_record(*found, field) for found in _lines(source, position)),
        "csv": lambda: (_from_record(*found, field) for found in _rows(source, position or 0)),
        "parquet": lambda: _read_parquet(source, field, position or 0),
        "hub": lambda: _read_hub(source, field, position),
        "corpus": lambda: _read_corpus(source, position or 0),
    }
    try:
        yield from readers[source.kind]()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {source.name}: {reason}") from None


def benchmark_texts(source: Source, field: str, cut: Cut | None) -> Iterator[str]:
    """What a model is judged on: HellaSwag's contexts with each of their endings, or documents."""
    if source.kind != "jsonl":
        yield from (piece.text for piece in read(source, field, cut))
        return
    for record, position, done in _lines(source):
        if "endings" in record.values:
            endings = record.values["endings"]
            if not isinstance(endings, list):
                raise record.error("has endings that are no list")
            yield from (f"{record.text('ctx', '--benchmark')} {ending}" for ending in endings)
        else:
            yield _from_record(record, position, done, field).text


def after_word(text: str) -> int:
    """The last place before a blank or a line end and behind something else.

    GPT-2's rules never put both into one token, nor look over such a place in either direction.
    """
    found = re.match(r".*\S(?=[ \n])", text, re.DOTALL)
    return found.end() if found else 0


def _file(path: Path, name: str) -> Source:
    plain = path.name.lower().removesuffix(".gz")
    kinds: tuple[Kind, ...] = ("jsonl", "csv", "parquet")
    kind: Kind = next((kind for kind in kinds if plain.endswith(f".{kind}")), "text")
    if plain != path.name.lower() and kind not in ("jsonl", "csv"):
        raise DataError(f"packed are read .jsonl.gz and .csv.gz, not {name}", fix="unpack it")
    size = path.stat().st_size
    return Source(name, kind, path, size, stop=size)


def _cut_end(source: Source, fraction: float) -> list[Source]:
    """The part to learn from and the part to validate on, cut at the end of a line if it can be."""
    with source.path.open("rb") as file:
        file.seek(int(source.size * (1 - fraction)))
        at = file.tell()
        file.readline()
        if file.tell() >= source.size:
            file.seek(at)
            while (byte := file.read(1)) and 0x80 <= byte[0] < 0xC0:  # inside a character
                at += 1
        else:
            at = file.tell()
    if not 0 < at < source.size:
        return [source]
    head = replace(source, stop=at, size=at, split="train")
    return [head, replace(source, start=at, size=source.size - at, split="val")]


def _piece(text: str, *rest: Any) -> Piece:
    """A piece of the text, with U+FFFD for each surrogate; ``rest`` is what else it says."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text, repaired = re.subn("[\ud800-\udfff]", "\ufffd", text)
        return Piece(text, *rest, repaired=repaired)
    return Piece(text, *rest)


def _read_text(source: Source, cut: Cut | None, position: int | None) -> Iterator[Piece]:
    with source.path.open("rb") as file:
        at = source.start if position is None else position
        at += len(BOM) if at == 0 and file.read(len(BOM)) == BOM else 0
        known = _digest_of(file, at, source.stop) if position is None else None
        file.seek(at)
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        rest, first = "", position is None
        if first and at >= source.stop:
            yield Piece("", source.stop, source.size)
        while left := max(source.stop - file.tell(), 0):
            block = file.read(min(left, STRETCH) if cut else left)
            if b"\0" in block or not block:
                what = "NUL: this is no text" if block else "missing: the file has become shorter"
                where = file.tell() - len(block) + block.find(b"\0") * bool(block)
                raise DataError(f"byte {where} is {what}", f"in {source.name}", "leave it out")
            last = file.tell() >= source.stop
            rest += decoder.decode(block, last)
            end = len(rest) if last or cut is None else cut(rest)
            if end:
                text, rest = rest[:end], rest[end:]
                at += len(text.encode("utf-8", "surrogateescape"))
                yield _piece(text, at, at - source.start, first, last, known)
                first = False


def _digest_of(file: IO[bytes], start: int, stop: int) -> bytes:
    found = digest()
    file.seek(start)
    while block := file.read(min(STRETCH, max(stop - file.tell(), 0))):
        found.update(block)
    return found.digest()


def _lines(source: Source, position: Any = None) -> Iterator[tuple[Record, Any, int]]:
    """The objects of a .jsonl file, each with the position behind it and the bytes read."""
    before, offset = position or (0, 0)
    with source.path.open("rb", buffering=STRETCH) as raw:
        file = _unpacked(source.path, raw)
        file.seek(offset)
        lines = (line.removeprefix(BOM).decode("utf-8", "surrogateescape") for line in file)
        for record in json_records(lines, source.path, before):
            yield record, [record.line, file.tell()], raw.tell()


def _rows(source: Source, skip: int) -> Iterator[tuple[Record, Any, int]]:
    """The rows of a .csv file behind the ``skip`` first ones, as `_lines`."""
    with source.path.open("rb", buffering=STRETCH) as raw:
        file = _unpacked(source.path, raw)
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        for number, record in enumerate(csv_records(text, source.path), 1):
            if number > skip:
                yield record, number, raw.tell()


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def _from_record(record: Record, position: Any, done: int, field: str) -> Piece:
    value = record.get(field, "--field")
    if value is not None and not isinstance(value, str):
        raise record.error(f"has no text under {field!r} but {value!r:.40}")
    return _piece(value or "", position, done)


def _read_parquet(source: Source, field: str, skip: int) -> Iterator[Piece]:
    """Row group by row group, and of each only the column of texts."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("data", "reading .parquet") from None
    try:
        file = parquet.ParquetFile(source.path, buffer_size=STRETCH)
        total, row = file.metadata.num_rows, 0
        _refuse_columns(field, file.schema_arrow.names, source)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= skip:
                row += rows
                continue
            for batch in file.iter_batches(1024, row_groups=[group], columns=[field]):
                for data in batch.column(0).cast(arrow.large_binary()).to_pylist():
                    row += 1
                    if row > skip:
                        text = (data or b"").decode("utf-8", "surrogateescape")
                        yield _piece(text, row, source.size * row // total)
    except arrow.ArrowInvalid as error:
        raise DataError(f"this is no parquet: {error}", f"in {source.name}") from None
    except arrow.ArrowNotImplementedError:
        raise DataError(f"the column {field!r} holds no text", f"in {source.name}") from None


def _read_hub(source: Source, field: str, position: Any) -> Iterator[Piece]:
    for row, behind in hub.rows(source.name, position):
        _refuse_columns(field, row, source)
        if not isinstance(row[field] or "", str):
            raise DataError(f"{field!r} is no text but {row[field]!r:.40}", f"in {source.name}")
        yield _piece(row[field] or "", behind, 0)


def _refuse_columns(field: str, columns: Sequence[str] | Mapping[str, Any], source: Source) -> None:
    if field not in columns:
        there = ", ".join(columns) or "none"
        raise DataError(
            f"there is no column {field!r}", f"in {source.name}", f"set --field; there: {there}"
        )


def _read_corpus(source: Source, skip: int) -> Iterator[Piece]:
    for number, document in enumerate(read_corpus(source.name).documents[skip:], skip + 1):
        yield Piece(document, number, 0)
