"""Ids on disk come back as they were, whoever wrote them, and many files are one row."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import DataError
from octavo.text.shards import (
    Dataset,
    Tokens,
    choose_dtype,
    read_tokens,
    verify,
    write_manifest,
    write_shard,
)
from octavo.text.tokenizer import Tokenizer

IDS = np.array([3, 0, 50256, 7, 65535, 1, 9, 2], dtype=np.int64)


def llmc(path, ids, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids).astype(dtype).tobytes())
    return path


def prepared(home, parts=3, tokens=50, tokenizer=None, **facts):
    """A dataset of ``parts`` shards to train on and one to validate, each with its own ids."""
    home.mkdir()
    ids = np.arange((parts + 1) * tokens) % 250
    pieces = np.split(ids, parts + 1)
    shards = [write_shard(home / f"train-{n:05d}.npy", pieces[n], eot_id=0) for n in range(parts)]
    shards += [write_shard(home / "val-00000.npy", pieces[parts], "val", eot_id=0)]
    write_manifest(home, shards, tokenizer, **facts)
    return home


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("largest", [0, 65535, 65536, 2**32 - 1])
def test_ids_come_back_whatever_they_are(tmp_path, suffix, largest):
    """65536 in uint16 is 0: nanoGPT's script wraps, silently, with a large vocabulary."""
    ids = np.array([5, largest, 1, 2])
    entry = write_shard(tmp_path / f"a{suffix}", ids)
    assert entry["dtype"] == ("uint16" if largest < 65536 else "uint32")
    assert choose_dtype(largest) == np.dtype(entry["dtype"])
    back = read_tokens(tmp_path / f"a{suffix}", np.dtype(entry["dtype"]))
    np.testing.assert_array_equal(back, ids)
    assert (entry["tokens"], entry["largest_id"]) == (4, max(5, largest))
    assert entry["bytes"] == (tmp_path / f"a{suffix}").stat().st_size


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        ([1, 65536], "uint16", "65536 does not fit uint16"),
        ([1, -1], None, "-1 is negative"),
        ([1, 2**32], None, "fits no uint32"),
        ([], None, r"shape \(0,\)"),
        ([[1]], None, r"shape \(1, 1\)"),
        ([1.0], None, "float64"),
    ],
)
def test_what_would_not_come_back_is_not_written(tmp_path, ids, dtype, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.npy", np.array(ids), dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["u1", "i2", "<u2", ">u2", "<i4", ">u4", "<i8", ">u8"])
def test_any_integer_npy_is_read_as_it_is(tmp_path, dtype):
    """S1's files of 50 million tokens have 200 MB: 4-byte ids."""
    ids = np.array([i for i in IDS if i < np.iinfo(dtype).max])
    np.save(tmp_path / "a.npy", ids.astype(dtype))
    tokens = Tokens([read_tokens(tmp_path / "a.npy")])
    assert isinstance(tokens.parts[0], np.memmap)
    assert tokens[np.arange(len(ids))].tolist() == ids.tolist()
    assert tokens.vocab_largest == ids.max()
    assert tokens.dtype.isnative


def test_nanogpts_and_llmcs_files_are_read_as_they_are(tmp_path):
    (tmp_path / "nano.bin").write_bytes(IDS.astype("<u2").tobytes())
    llmc(tmp_path / "gpt2.bin", IDS)
    llmc(tmp_path / "llama3.bin", IDS + 100_000, 20240801, 7, "<u4")
    np.testing.assert_array_equal(read_tokens(tmp_path / "nano.bin"), IDS)
    np.testing.assert_array_equal(read_tokens(tmp_path / "gpt2.bin"), IDS)
    np.testing.assert_array_equal(read_tokens(tmp_path / "llama3.bin"), IDS + 100_000)


SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@given(sizes=SIZES, data=st.data())
def test_many_files_are_one_row(sizes, data):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(sizes)[:-1]))
    assert (len(tokens), tokens.shape, tokens.ndim) == (len(whole), whole.shape, 1)
    np.testing.assert_array_equal(np.asarray(tokens), whole)
    place = st.integers(-5, len(whole) + 5)
    start, stop, first, last = (data.draw(place) for _ in range(4))
    np.testing.assert_array_equal(np.asarray(tokens[start:stop]), whole[start:stop])
    np.testing.assert_array_equal(
        np.asarray(tokens[start:stop][first:last]), whole[start:stop][first:last]
    )
    if len(whole):
        inside = st.integers(-len(whole), len(whole) - 1)
        positions = np.array(data.draw(st.lists(inside, max_size=30)), dtype=np.int64)
        got = tokens[positions[: len(positions) // 2 * 2].reshape(-1, 2)]
        np.testing.assert_array_equal(
            got, whole[positions[: len(positions) // 2 * 2]].reshape(-1, 2)
        )
        assert got.dtype == np.uint16
        assert tokens[-1] == whole[-1]
    for outside in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            tokens[np.array([outside])]


def test_slices_are_views_and_files_of_several_types_go_together():
    small, large = np.arange(4, dtype=np.uint16), np.arange(70_000, 70_003, dtype=np.int32)
    tokens = Tokens([small, large])
    assert all(np.shares_memory(part, small) for part in tokens[1:3].parts)
    assert np.asarray(tokens).tolist() == [*small, *large] == tokens[np.arange(7)].tolist()
    mixed = Tokens([np.array([1], np.int64), np.array([2], np.uint64)])
    assert mixed.dtype == np.int64  # numpy alone would make floats of them
    with pytest.raises(IndexError, match="step"):
        tokens[::2]


def test_a_prepared_dataset_knows_its_parts(tmp_path):
    tokenizer = Tokenizer.byte(separator=True)
    home = prepared(tmp_path / "data", tokenizer=tokenizer, report={"read": 7})
    dataset = Dataset.open(home)
    verify(dataset)
    assert (len(dataset.tokens("train")), len(dataset.tokens("val"))) == (150, 50)
    assert dataset.tokens("train").vocab_largest == 149
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.fingerprint == dataset.tokenizer_sha256 == tokenizer.fingerprint
    assert (dataset.vocab_size, dataset.eot_id, dataset.report) == (257, 256, {"read": 7})
    assert [shard["documents"] for shard in dataset.shards] == [1, 0, 0, 0]
    assert json.loads((home / "dataset.json").read_bytes())["dtype"] == "uint16"


def test_a_dataset_is_known_by_its_tokens_not_by_its_place_or_report(tmp_path):
    here = Dataset.open(prepared(tmp_path / "here", report={"seconds": 1})).sha256
    assert Dataset.open(prepared(tmp_path / "there", report={"seconds": 2})).sha256 == here
    assert Dataset.open(prepared(tmp_path / "less", tokens=49)).sha256 != here
    assert Dataset.open(prepared(tmp_path / "other", tokenizer=Tokenizer.byte())).sha256 != here


@pytest.mark.parametrize("tokens", [10, 200_000])
def test_files_of_others_are_known_by_their_sizes_and_samples(tmp_path, tokens):
    ids = np.zeros(tokens, np.uint16)
    hashes = []
    for n in (0, tokens - 1, None):
        (tmp_path / str(n)).mkdir()
        changed = ids.copy()
        changed[n:n] = 0
        if n is not None:
            changed[n] = 5
        np.save(tmp_path / str(n) / "a.npy", changed)
        hashes.append(Dataset.open(tmp_path / str(n) / "a.npy").sha256)
    np.save(tmp_path / "a.npy", ids[1:])
    hashes.append(Dataset.open(tmp_path / "a.npy").sha256)
    assert len(set(hashes)) == 4
    shutil.copytree(tmp_path / "None", tmp_path / "moved")
    assert Dataset.open(str(tmp_path / "moved" / "*.npy")).sha256 == hashes[2]


def files_in(dataset, split):
    return [path.name for path in dataset.files(split)]


def test_directories_of_others_are_read_as_they_are(tmp_path):
    """build-nanogpt's and S1's shards, and nanoGPT's two files beside its script."""
    names = ["edufineweb_train_000002", "edufineweb_val_000000", "edufineweb_train_000001"]
    for name in names:
        np.save(tmp_path / f"{name}.npy", IDS)
    for dataset in (Dataset.open(tmp_path), Dataset.open(str(tmp_path / "edu*.npy"))):
        assert files_in(dataset, "train") == [f"{name}.npy" for name in sorted(names)[:2]]
        assert files_in(dataset, "val") == ["edufineweb_val_000000.npy"]
        assert len(dataset.tokens("train")) == 16
        verify(dataset)
    nano = tmp_path / "shakespeare_char"
    nano.mkdir()
    for name in ("train.bin", "val.bin", "ckpt.bin"):
        (nano / name).write_bytes(IDS.astype("<u2").tobytes())
    for name in ("prepare.py", "readme.md", "input.txt", "meta.pkl"):
        (nano / name).write_bytes(b"something else")
    assert files_in(Dataset.open(nano), "train") == ["train.bin"]
    assert files_in(Dataset.open(nano), "val") == ["val.bin"]


@pytest.mark.parametrize(
    ("name", "is_val"),
    [
        ("val", True), ("fineweb_val_0", True), ("Validation-3", True), ("x.val", True),
        ("medieval_0", False), ("interval", False), ("train_0", False),
    ],
)  # fmt: skip
def test_validation_files_are_told_by_their_names(tmp_path, name, is_val):
    np.save(tmp_path / f"{name}.npy", IDS)
    np.save(tmp_path / "other.npy", IDS)
    assert (len(Dataset.open(str(tmp_path / "*.npy")).files("val")) == 1) == is_val
    # Alone it is what somebody wants to train on.
    assert len(Dataset.open(tmp_path / f"{name}.npy").files("train")) == 1


def test_a_folder_of_texts_stays_one(tmp_path):
    (tmp_path / "book.txt").write_text("once", encoding="utf-8")
    (tmp_path / "firmware.bin").write_bytes(bytes(64))
    assert Dataset.find(str(tmp_path)) is None
    assert Dataset.find(str(tmp_path / "*.txt")) is None
    assert Dataset.find(str(tmp_path / "*")) is None
    assert Dataset.find([str(tmp_path / "book.txt")]) is None
    assert Dataset.find("python-docs") is Dataset.find("-") is Dataset.find(None) is None
    with pytest.raises(DataError, match="no tokens in"):
        Dataset.open(tmp_path)


def test_texts_and_tokens_do_not_mix(tmp_path):
    home = prepared(tmp_path / "data")
    (tmp_path / "book.txt").write_text("once", encoding="utf-8")
    np.save(tmp_path / "a.npy", IDS)
    for others in ([str(home), str(tmp_path / "a.npy")], [str(tmp_path / "a.npy"), "book.txt"]):
        with pytest.raises(DataError, match="one row of tokens"):
            Dataset.find(others)
    both = Dataset.open([str(home / "train-00000.npy"), str(tmp_path / "a.npy")])
    assert len(both.tokens("train")) == 58


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), dtype=st.sampled_from(["u2", "u4"])
)
def test_writing_and_opening_round_trips(tmp_path_factory, sizes, dtype):
    home = tmp_path_factory.mktemp("data")
    whole = np.arange(sum(sizes))
    pieces = np.split(whole, np.cumsum(sizes)[:-1])
    shards = [
        write_shard(home / f"train-{n:05d}.{'bin' if n % 2 else 'npy'}", piece, dtype=dtype)
        for n, piece in enumerate(pieces)
    ]
    write_manifest(home, shards)
    dataset = Dataset.open(home)
    verify(dataset)
    np.testing.assert_array_equal(np.asarray(dataset.tokens("train")), whole)
    assert dataset.vocab_size == len(whole)
