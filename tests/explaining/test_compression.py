"""A model as a compressor: every byte comes back, for as many bits as the model is surprised."""

import math
import struct
import zlib

import numpy as np
import pytest
import run_kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import CheckpointError, ConfigError, DataError, ParityError
from octavo.explaining import compression
from octavo.explaining.compression import bytes_of, compress, decompress, rivals, symbols_of, unpack
from octavo.generating.writing import window_start
from octavo.language_model import load, start_ids
from octavo.text.tokenizer import Tokenizer
from octavo.training.packing import pack_run, weights_of

TEXT = "the cat sat on the mat, and that is that.\n" * 12
TOKENIZERS = {
    "char": Tokenizer.char(TEXT),
    "char replacing": Tokenizer.char(TEXT, separator=True, unseen="replace"),
    "byte": Tokenizer.byte(separator=True),
    "bpe": Tokenizer.train_bpe([TEXT], 290),
}
HARD = {
    "empty": b"",
    "one byte": b"t",
    "plain": TEXT.encode(),
    "unknown": "the čat ☃ sat 😀\r\n on the\x00mat".encode(),
    "mark": b"\xef\xbb\xbfthe \xef\xbf\xbd cat",
    "no utf-8": b"the \xff\xfe cat \xc3 sat \xed\xa0\x80 on \xe2\x82",
    "special": b"one<|endoftext|>two <|endoftext|>",
    "binary": bytes(range(256)) * 2,
}


def make_run(path, tokenizer, **changes):
    shape = {"block_size": 8, "tie_embeddings": True} | changes
    return run_kit.make_run(path, tokenizer, **shape)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every kind of tokenizer on every engine, loaded once."""
    found = {}
    for name, tokenizer in TOKENIZERS.items():
        run = make_run(tmp_path_factory.mktemp("run") / "run", tokenizer)
        for engine in ("native", "torch"):
            found[name, engine] = load(run, "cpu", engine=engine)
    return found


@pytest.fixture
def lm(models):
    return models["char", "native"]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_it_comes_back_byte_for_byte(models, kind, engine, name):
    lm = models[kind, engine]
    assert decompress(lm, compress(lm, HARD[name])) == HARD[name]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.binary(max_size=80) | st.text("the caX☃\r\n", max_size=300).map(str.encode))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_come_back(models, kind, data):
    lm = models[kind, "native"]
    assert decompress(lm, compress(lm, data)) == data


def windows_surprise(lm, ids):
    """Bits of the ids, each after its window as the house slides it, without any cache."""
    text = start_ids(lm.tokenizer, None)
    found = 0.0
    for token in ids:
        logits = lm.logits(text[window_start(len(text), lm.config.block_size) :])[-1]
        logits = logits[: lm.tokenizer.vocab_size].astype(np.float64)
        found -= logits[token] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        text.append(token)
    return found / math.log(2)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_file_is_as_long_as_the_model_is_surprised(models, kind, engine, monkeypatch):
    """So a file's size is a measurement of the model, and the model reads its own windows."""
    monkeypatch.setattr(compression, "STREAMS", 1)
    lm = models[kind, engine]
    _, code, _ = unpack(compress(lm, TEXT.encode()))
    wanted = windows_surprise(models[kind, "torch"], lm.tokenizer.encode(TEXT)) / 8
    assert wanted - 1 < len(code) < wanted * 1.001 + 4


def test_parts_side_by_side_cost_what_the_model_forgets_at_their_beginnings(lm, monkeypatch):
    found = {}
    for streams in (1, 16):
        monkeypatch.setattr(compression, "STREAMS", streams)
        header, code, _ = unpack(compress(lm, TEXT.encode()))
        found[header.streams] = len(code)
    few, many = sorted(found)
    assert (few, many) == (1, len(TEXT) // (8 * 8))
    assert abs(found[many] - found[few]) < 12 * many


def test_what_the_vocabulary_lacks_costs_about_its_bytes(lm):
    """An escape was once 28 bits: a photograph became three times as large."""
    data = np.random.default_rng(0).bytes(6_000)
    assert len(compress(lm, data)) < 6_000 * 1.04 + 200


def test_writing_twice_gives_the_same_file(models):
    for lm in models.values():
        assert compress(lm, TEXT.encode()) == compress(lm, TEXT.encode())


def test_llamas_space_before_every_text_is_not_in_the_file():
    tokenizer = Tokenizer(run_kit.sentencepiece("<0x0A>"))
    for text in ("ab a", " ab", "  a", "b \n", "a☃"):
        symbols = symbols_of(tokenizer, text.encode())
        assert bytes_of(tokenizer, symbols) == text.encode()
    symbols = symbols_of(tokenizer, b"ab a\xffab")
    assert sum(symbol == tokenizer.vocab_size + compression.DROP for symbol in symbols) == 2
    assert bytes_of(tokenizer, symbols) == b"ab a\xffab"


def test_packed_weights_are_found_again(models, tmp_path):
    run = make_run(tmp_path / "run", TOKENIZERS["char"])
    plain = load(run, "cpu", engine="torch")
    pack_run(plain, weights_of(plain), "int8")
    packed = load(run, "cpu", weights="int8")
    file = compress(packed, TEXT.encode())
    engine, device, weights = unpack(file)[0].made_with()
    assert (engine, device, weights) == ("native", "cpu", "int8")
    assert decompress(load(run, device, weights=weights, engine=engine), file) == TEXT.encode()
    with pytest.raises(CheckpointError, match="another model"):
        decompress(models["char", "native"], file)


def test_another_model_is_refused(lm, tmp_path):
    file = compress(lm, TEXT.encode())
    others = [
        make_run(tmp_path / "weights", TOKENIZERS["char"], seed=1),
        make_run(tmp_path / "settings", TOKENIZERS["char"], block_size=16),
        make_run(tmp_path / "tokens", Tokenizer.char(TEXT.replace("c", "C"))),
    ]
    for run in others:
        with pytest.raises(CheckpointError, match=r"another model; in book\.octz"):
            decompress(load(run, "cpu", engine="native"), file, where="in book.octz")


def test_another_engine_is_refused(models, lm, monkeypatch):
    file = compress(lm, TEXT.encode())
    with pytest.raises((CheckpointError, ParityError)):
        decompress(models["char", "torch"], file)
    monkeypatch.setattr(compression.Reader, "probe", lambda reader: b"else")
    with pytest.raises(ParityError, match="other probabilities"):
        decompress(lm, file)


def test_another_library_and_other_threads_are_refused(models, monkeypatch):
    import torch

    lm = models["char", "torch"]
    file = compress(lm, TEXT.encode())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(ParityError, match=r"with 1 thread.* 3 threads"):
        decompress(lm, file)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ParityError, match=r"torch cpu - 9\.9"):
        decompress(lm, file)


def test_the_native_engine_reads_with_the_threads_it_wrote_with(lm, monkeypatch):
    monkeypatch.setenv("OCTAVO_THREADS", "2")
    file = compress(lm, TEXT.encode())
    monkeypatch.setenv("OCTAVO_THREADS", "1")
    assert unpack(file)[0].threads == 2
    assert decompress(lm, file) == TEXT.encode()


def test_every_kind_of_damage_is_seen_before_anything_is_read(lm, monkeypatch):
    file = compress(lm, TEXT.encode())
    monkeypatch.setattr(compression, "Reader", None)
    for at in range(len(file)):
        flipped = file[:at] + bytes([file[at] ^ 16]) + file[at + 1 :]
        for bad in (flipped, file[:at]):
            with pytest.raises(DataError, match="; in book"):
                decompress(lm, bad, where="in book")


def test_a_later_format_is_named(lm):
    with pytest.raises(DataError, match="format 2, this octavo reads 1"):
        unpack(b"octz\x02 and what not")


def test_a_result_that_is_not_the_original_is_refused(lm):
    """The last line of defence: all checks passed, and yet other bytes came out."""
    body = compress(lm, TEXT.encode())[:-12] + b"elsewise"
    file = body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(ParityError, match="another SHA-256"):
        decompress(lm, file)


def test_a_model_that_knows_only_ids_cannot(tmp_path):
    run = make_run(tmp_path / "run", TOKENIZERS["char"])
    lm = load(run, "cpu", engine="native")
    lm._tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        compress(lm, b"text")


def test_rivals_are_named_even_where_they_are_not_installed(monkeypatch):
    sizes = rivals(TEXT.encode())
    assert sizes.keys() == {"gzip", "xz", "zstd"}
    assert 0 < sizes["gzip"] < len(TEXT)
    assert 0 < sizes["xz"] < len(TEXT)

    class Zstandard:
        class ZstdCompressor:
            def __init__(self, level):
                assert level == 19

            def compress(self, data):
                return data[:7]

    def here(name):
        if name == "zstandard":
            return Zstandard
        raise ImportError(name)

    monkeypatch.setattr(compression, "import_module", here)
    assert rivals(TEXT.encode())["zstd"] == 7
