"""A language model as a compressor: what it expects costs few bits, what surprises it many.

The file's length is the model's surprise: bits per byte made tangible. Writing and reading are one
function, `_transcribe`: both ask the same engine for the same steps in the same order, so both see
the same probabilities to the last bit. A text is cut into up to `STREAMS` equal parts that go side
by side as rows of a batch, through one coder: several times as fast, for a few bytes a part.

What the vocabulary cannot say goes as bytes: before every symbol stands whether it is one, with a
probability learned as the file goes by, which costs a few bytes in all where there is none.
"""

import dataclasses
import gzip
import hashlib
import json
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from octavo.errors import CheckpointError, DataError, ParityError
from octavo.explaining.coder import Coder, Counts, Decoder, Encoder, cumulative
from octavo.explaining.engines import open_engine
from octavo.generating.sampling import PRESETS
from octavo.generating.writing import Slot, start_ids, window_start
from octavo.language_model import LanguageModel
from octavo.text.tokenizer import Tokenizer

STREAMS = 16  # parts that go side by side
STREAM_CONTEXTS = 8  # how many contexts long a part is at least
DROP = 256  # among the escapes, after the bytes: the next token's first byte is not in the text
MAGIC = b"octz\x01"  # the last byte is the format's number
HEADER = struct.Struct(">5s8s4sHBQB")
OTHER_FIX = "use the machine, or the instructions (OCTAVO_ISA), that the file was written with"
Watch = Callable[[int, int], object]
"""Told how many of how many symbols are done; what it raises stops the rest."""


@dataclass(frozen=True)
class Header:
    """What a compressed file says of itself, and what reading it needs."""

    model: bytes
    """Of the SHA-256 of settings, tokenizer and weights as the engine reads them, 8 bytes."""
    probe: bytes
    """Of the SHA-256 of what the engine thinks of a fixed text, 4 bytes."""
    threads: int
    streams: int
    symbols: int
    engine: str
    """Kind, device, precision of the weights, version."""

    def pack(self) -> bytes:
        """As bytes."""
        *numbers, engine = dataclasses.astuple(self)
        return HEADER.pack(MAGIC, *numbers, len(engine)) + engine.encode()

    def made_with(self) -> tuple[str, str, str | None]:
        """Engine, device and packed weights, as `octavo.load` takes them."""
        engine, device, weights, _ = self.engine.split(" ", 3)
        return engine, device, None if weights == "-" else weights


def compress(lm: LanguageModel, data: bytes, watch: Watch = lambda done, of: None) -> bytes:
    """Any bytes, as `decompress` reads them with the same model on the same engine.

    Raises `ConfigError` for a model without a tokenizer and for one that does not write.
    """
    symbols = symbols_of(lm.tokenizer, data)
    parts = len(symbols) // (STREAM_CONTEXTS * lm.config.block_size)
    reader = Reader(lm, streams=max(1, min(STREAMS, parts)))
    counts = reader.threads, reader.streams, len(symbols)
    header = Header(reader.fingerprint, reader.probe(), *counts, reader.name)
    coder = Encoder()
    _transcribe(coder, reader, symbols, watch)
    body = header.pack() + coder.finish() + hashlib.sha256(data).digest()[:8]
    return body + struct.pack(">I", zlib.crc32(body))


def decompress(
    lm: LanguageModel, compressed: bytes, watch: Watch = lambda done, of: None, where: str = ""
) -> bytes:
    """The bytes that `compress` was given; ``where`` names the file in errors.

    Raises `DataError` for a damaged file, `CheckpointError` for another model and `ParityError`
    for an engine that computes something else.
    """
    header, code, digest = unpack(compressed, where)
    reader = Reader(lm, header.streams, header.threads)
    _check_same(reader, header, where)
    symbols = _transcribe(Decoder(code), reader, [None] * header.symbols, watch)
    data = bytes_of(lm.tokenizer, symbols)
    if hashlib.sha256(data).digest()[:8] != digest:
        raise ParityError("what came out has another SHA-256 than what went in", where, OTHER_FIX)
    return data


def unpack(compressed: bytes, where: str = "") -> tuple[Header, bytes, bytes]:
    """A file's header, its code, and the first bytes of the original's SHA-256.

    Raises `DataError` for a file that is damaged or none of ours.
    """
    if not compressed.startswith(MAGIC[:4]):
        raise DataError("this is no file of octavo compress", where)
    if compressed[4:5] not in (MAGIC[4:], b""):
        raise DataError(f"it has format {compressed[4]}, this octavo reads {MAGIC[4]}", where)
    body, checksum = compressed[:-4], compressed[-4:]
    if len(body) < HEADER.size or struct.pack(">I", zlib.crc32(body)) != checksum:
        raise DataError("the compressed file is damaged", where, "get another copy of it")
    _, *numbers, length = HEADER.unpack_from(body)
    end = HEADER.size + length
    header = Header(*numbers, engine=body[HEADER.size : end].decode())
    return header, body[end:-8], body[-8:]


def symbols_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Any bytes as symbols: ids, and from ``vocab_size`` on the bytes that no token stands for."""
    size = tokenizer.vocab_size
    if tokenizer.kind == "byte":
        return list(data)
    text = data.decode("utf-8", "surrogateescape")  # bytes that are no UTF-8: lone surrogates
    if tokenizer.kind == "char":
        known = {tokenizer.token_bytes(i): [i] for i in range(size)}
        pieces = (known.get(raw) or _escaped(raw, size) for raw in map(_raw, text))
    else:
        pieces = (_exact(tokenizer, part) for part in re.split("([\udc80-\udcff]+)", text) if part)
    return [symbol for piece in pieces for symbol in piece]


def bytes_of(tokenizer: Tokenizer, symbols: Sequence[int]) -> bytes:
    """The bytes that `symbols_of` was given."""
    size, parts, dropped = tokenizer.vocab_size, [], 0
    for symbol in symbols:
        if symbol == size + DROP:
            dropped = 1
        elif symbol >= size:
            parts.append(bytes([symbol - size]))
        else:
            parts.append(tokenizer.token_bytes(symbol)[dropped:])
            dropped = 0
    return b"".join(parts)


def rivals(data: bytes) -> dict[str, int | None]:
    """What other compressors make of it at their best, in bytes; None where one is not here."""
    sizes: dict[str, int | None] = {
        "gzip": len(gzip.compress(data, 9)),
        "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": None,
    }
    with suppress(ImportError):
        sizes["zstd"] = len(import_module("zstandard").ZstdCompressor(level=19).compress(data))
    with suppress(ImportError):  # Python's own, from 3.14 on
        sizes["zstd"] = len(import_module("compression.zstd").compress(data, 19))
    return sizes


class Reader:
    """A model that reads ``streams`` texts side by side and says what it expects next in each."""

    def __init__(self, lm: LanguageModel, streams: int, threads: int | None = None) -> None:
        """Open the engine, with as many ``threads`` as another reader had."""
        self.streams = streams
        self.vocab, self.block_size = lm.tokenizer.vocab_size, lm.config.block_size
        opened = open_engine(lm, streams, threads)
        self.engine, self.threads, self.name = opened.engine, opened.threads, opened.name
        self.fingerprint = _fingerprint(lm, opened.weights)
        self.slots = [self._slot(row, start_ids(lm.tokenizer, None)) for row in range(streams)]

    def tables(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """What is expected next in these rows, as `cumulative` has it: (R, V + 1)."""
        return cumulative(self._logits([self.slots[row] for row in rows]))

    def append(self, row: int, token: int) -> None:
        """What came next in a row; past block_size its oldest half is dropped."""
        slot = self.slots[row]
        slot.ids.append(token)
        if len(slot.ids) > self.block_size:
            slot.ids = slot.ids[window_start(len(slot.ids), self.block_size) :]
            self.engine.release(row)

    def probe(self) -> bytes:
        """A hash of every bit the engine gives for a fixed text, read at once and token by token.

        Other instructions, another library or another number of threads show here, where they
        make any difference.
        """
        ids = [number * 7919 % self.vocab for number in range(min(self.block_size, 24))]
        digest = hashlib.sha256()
        slot = self._slot(0, ids[: len(ids) * 2 // 3 or 1])
        for token in [*ids[len(slot.ids) :], 0]:
            digest.update(self._logits([slot]).tobytes())
            slot.ids.append(token)
        self.engine.release(0)
        return digest.digest()[:4]

    def _slot(self, row: int, ids: list[int]) -> Slot:
        return Slot(row, ids, 0, PRESETS["greedy"], len(ids), keep_logits=True)

    def _logits(self, slots: list[Slot]) -> NDArray[np.float32]:
        self.engine.step(slots)
        return np.stack([slot.logits[0] for slot in slots])


def _transcribe(
    coder: Coder, reader: Reader, symbols: Sequence[int | None], watch: Watch
) -> list[int]:
    """Code the symbols, or read those that are None: one step of the engine for each position.

    What is escaped the model does not see: it goes on as if it were not there.
    """
    count, size, streams = len(symbols), reader.vocab, reader.streams
    starts = [count * row // streams for row in range(streams + 1)]
    parts = [symbols[start:end] for start, end in pairwise(starts)]
    texts: list[list[int]] = [[] for _ in parts]
    kinds, others = [Counts(2), Counts(2)], Counts(DROP + 1)  # by what the last symbol was
    escaped = [0] * streams
    for position in range(max(map(len, parts))):
        live = {row: part[position] for row, part in enumerate(parts) if position < len(part)}
        for row, symbol in live.items():
            kind = None if symbol is None else int(symbol >= size)
            escaped[row] = kinds[escaped[row]].code(coder, kind)
            if escaped[row]:
                other = others.code(coder, None if symbol is None else symbol - size)
                texts[row].append(size + other)
        tokens = [row for row in live if not escaped[row]]
        for row, table in zip(tokens, reader.tables(tokens) if tokens else (), strict=True):
            texts[row].append(coder.code(table, live[row]))
            reader.append(row, texts[row][-1])
        watch(sum(map(len, texts)), count)
    return [symbol for text in texts for symbol in text]


def _fingerprint(lm: LanguageModel, weights: Iterable[tuple[str, np.ndarray]]) -> bytes:
    """Of all that decides what the model expects."""
    said = [dataclasses.asdict(lm.config), lm.tokenizer.fingerprint]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, array in weights:
        digest.update(name.encode())
        digest.update(array.data)
    return digest.digest()[:8]


def _check_same(reader: Reader, header: Header, where: str) -> None:
    """Refuse to read with what is not exactly what has written."""
    if reader.fingerprint != header.model:
        raise CheckpointError(
            "the file was written with another model",
            where,
            "name its run, or its checkpoint: octavo decompress RUN/checkpoints/step-... FILE OUT",
        )
    before, now = (header.engine, header.threads), (reader.name, reader.threads)
    if before != now:
        said = [f"{engine!r} with {threads} threads" for engine, threads in (before, now)]
        fix = "use the octavo and the PyTorch of then; OMP_NUM_THREADS sets PyTorch's threads"
        raise ParityError(f"the file was written by {said[0]}, this is {said[1]}", where, fix)
    if header.symbols and reader.probe() != header.probe:
        raise ParityError("this machine's engine gives other probabilities", where, OTHER_FIX)


def _exact(tokenizer: Tokenizer, part: str) -> list[int]:
    """The ids of a text that give it back byte by byte, or its bytes as escapes."""
    raw, size = _raw(part), tokenizer.vocab_size
    if not "\udc80" <= part[0] <= "\udcff":
        ids = tokenizer.encode(part)
        said = tokenizer.decode_bytes(ids)
        if said == raw:
            return ids
        if said == b" " + raw:  # as Llama's tokenizer begins every text
            return [size + DROP, *ids]
    return _escaped(raw, size)


def _escaped(raw: bytes, size: int) -> list[int]:
    return [size + byte for byte in raw]


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
