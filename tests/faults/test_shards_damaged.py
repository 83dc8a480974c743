"""Damaged token files are refused where they are opened or verified, by name and place."""

import os

import numpy as np
import pytest
from command_kit import python
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import DataError
from octavo.text import shards as shards_module
from octavo.text.shards import Dataset, read_tokens, verify, write_manifest, write_shard
from octavo.text.tokenizer import Tokenizer

IDS = np.arange(1, 41)


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    shards = [write_shard(home / f"train-{n:05d}.npy", IDS + n) for n in range(2)]
    shards += [write_shard(home / "val-00000.bin", IDS, "val")]
    write_manifest(home, shards, Tokenizer.byte(separator=True))
    verify(Dataset.open(home))
    return home


def llmc(ids):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.astype("<u2").tobytes()


def npy(path, ids):
    np.save(path, ids)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["npy", "llm.c"])
def test_a_file_truncated_anywhere_is_refused_at_open(tmp_path, kind):
    path = tmp_path / ("a.npy" if kind == "npy" else "a.bin")
    whole = npy(path, IDS.astype("<u2")) if kind == "npy" else llmc(IDS)
    # Less than an llm.c header is raw ids to nanoGPT's rule; what follows it is counted.
    cuts = range(len(whole)) if kind == "npy" else range(1024, len(whole))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.(npy|bin)") as refused:
            read_tokens(path)
        assert refused.value.exit_code == 3
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="40 tokens of uint16, 80 bytes, but 81 follow"):
        read_tokens(path)


def test_a_raw_file_of_odd_bytes_or_none_is_refused(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(bytes(7))
    with pytest.raises(DataError, match=r"2-byte ids, not 7 bytes.*train\.bin"):
        read_tokens(path)
    for empty in (path, tmp_path / "a.npy"):
        empty.write_bytes(b"")
        with pytest.raises(DataError, match=empty.name):
            read_tokens(empty)
    np.save(tmp_path / "a.npy", np.empty(0, np.uint16))
    with pytest.raises(DataError, match="no tokens: the header says 0 of uint16"):
        read_tokens(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"cannot read .*b\.npy: No such file"):
        read_tokens(tmp_path / "b.npy")


def test_a_raw_file_of_4_byte_ids_is_not_read_as_twice_as_many(tmp_path):
    """Every second token would be 0, and a model would learn that."""
    (tmp_path / "train.bin").write_bytes(np.arange(100, 200, dtype="<u4").tobytes())
    with pytest.raises(DataError, match="4-byte ids"):
        read_tokens(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), "holds float64"),
        (np.zeros((2, 2), np.uint16), r"shape \(2, 2\)"),
        (np.uint16(3), r"shape \(\)"),
        (np.array([{"pickled": 1}]), "holds object"),
        (np.array([True]), "holds bool"),
    ],
)
def test_what_is_no_row_of_integers_is_refused(tmp_path, array, message):
    """A pickled array is not opened: it could run anything."""
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_tokens(tmp_path / "a.npy")


def test_llmc_headers_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    whole = bytearray(llmc(IDS))
    for at, value, message in ((1, 2, "has version 1, not 2"), (2, 39, "39 tokens"), (2, -1, "-1")):
        header = np.frombuffer(whole[:1024], "<i4").copy()
        header[at] = value
        path.write_bytes(header.tobytes() + whole[1024:])
        with pytest.raises(DataError, match=message):
            read_tokens(path)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(["a.npy", "a.bin"]), st.booleans())
def test_whatever_bytes_are_ids_or_an_error(tmp_path_factory, data, name, with_magic):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"\x93NUMPY\x01\x00" + data if with_magic else data)
    try:
        tokens = read_tokens(path)
    except DataError:
        return
    assert tokens.ndim == 1
    assert tokens.dtype.kind in "iu"


def test_every_flipped_bit_is_found(home):
    """Some at open, the rest by verifying; each names its file."""
    for file in ("train-00001.npy", "val-00000.bin"):
        whole = (home / file).read_bytes()
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << at % 8
            (home / file).write_bytes(changed)
            with pytest.raises(DataError, match=file) as refused:
                verify(Dataset.open(home))
            assert refused.value.exit_code == 3
        (home / file).write_bytes(whole)
    verify(Dataset.open(home))


def test_a_flipped_bit_is_placed_within_16_mb(tmp_path):
    ids = np.zeros(20_000_000, np.uint16)
    entry = write_shard(tmp_path / "train-00000.npy", ids)
    write_manifest(tmp_path, [entry])
    assert len(entry["sha256"]) == 3  # 40 MB
    with (tmp_path / "train-00000.npy").open("r+b") as file:
        file.seek(20_000_000)
        file.write(b"\1")
    dataset = Dataset.open(tmp_path)
    place = r"train-00000\.npy is damaged in bytes 16777216 to 33554431 \(16 MB block 1\)"
    for sample in (None, 8):  # eight are more than there are: all of them
        with pytest.raises(DataError, match=place):
            verify(dataset, sample)


def test_a_sample_looks_at_so_many_blocks(home, monkeypatch):
    seen = []
    monkeypatch.setattr(shards_module, "_verify_block", lambda *block: seen.append(block))
    for _ in range(20):
        verify(Dataset.open(home), sample=2)
    assert len(seen) == 40
    assert {shard["file"] for _, shard, _ in seen} == {
        "train-00000.npy", "train-00001.npy", "val-00000.bin",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"train-00001\.npy has no bytes, dataset\.json says 208"),
        (lambda path: os.truncate(path, 207), "has 207 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has 209 bytes"),
        (lambda path: np.save(path, IDS.astype("<i2")), "40 tokens of int16.* 40 of uint16"),
        (lambda path: np.save(path, IDS.astype(">u2")), "damaged in bytes 0 to 207"),
        (lambda path: np.save(path, (IDS + 2).astype("<u2")), "damaged in bytes 0 to 207"),
    ],
)
def test_another_file_under_the_name_of_a_shard_is_found(home, damage, message):
    damage(home / "train-00001.npy")
    with pytest.raises(DataError, match=message):
        verify(Dataset.open(home))


def test_an_id_outside_the_vocabulary_is_placed(tmp_path):
    tokenizer = Tokenizer.byte()
    ids = np.arange(300)
    write_manifest(tmp_path, [write_shard(tmp_path / "train-00000.npy", ids)], tokenizer)
    with pytest.raises(DataError, match=r"train-00000\.npy holds the id 256 at position 256.* 255"):
        verify(Dataset.open(tmp_path))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    tokenizer.save(foreign)
    np.save(foreign / "train.npy", np.array([1, -1, 2]))
    with pytest.raises(DataError, match="holds the id -1 at position 1"):
        verify(Dataset.open(foreign))
    with pytest.raises(DataError, match="-1 is negative"):
        _ = Dataset.open(foreign / "train.npy").tokens("train").vocab_largest


def test_a_tokenizer_put_in_place_of_another_is_found(home):
    other = Tokenizer.byte()
    before = Tokenizer.byte(separator=True).fingerprint
    other.save(home)
    with pytest.raises(DataError, match=f"{other.fingerprint}.*{before}"):
        verify(Dataset.open(home))


def test_a_damaged_manifest_is_refused(home):
    path = home / "dataset.json"
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"dataset\.json"):
            Dataset.open(home)
    for old, new in (
        (b'"version": 1', b'"version": 2'),
        (b'"octavo-tokens"', b'"other-tokens"'),
        (b'"tokens": 40', b'"tokens": "40"'),
        (b'"uint16"', b'"uint17"'),
        (b'"train-00000.npy"', b"7"),
        (b'"shards": [', b'"shards": [7, '),
        (b'"sha256": [', b'"sha256": ["7", '),
        (b'"sha256"', b'"sha512"'),
        (b'"split": "val"', b'"split": "test"'),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(DataError, match=r"in .*data"):
            Dataset.open(home)
    path.write_bytes(b"[]")
    with pytest.raises(DataError, match="cannot be read"):
        Dataset.open(home)


CHILD = """
import os, resource, signal, sys
import numpy as np
from octavo.errors import OctavoError
from octavo.text.shards import write_shard
"""


def test_a_shard_is_whole_or_absent_after_a_kill(tmp_path):
    for point, there in (("prepared", False), ("replaced", True)):
        path = tmp_path / f"{point}.npy"
        script = f"os.environ['OCTAVO_FAILPOINT'] = '{path.name}-{point}'\n"
        python(CHILD + script + "write_shard(sys.argv[1], np.arange(9))", path, ends=137)
        assert path.exists() == there
        if there:
            np.testing.assert_array_equal(read_tokens(path), np.arange(9))


def test_a_full_disk_leaves_no_shard(tmp_path):
    script = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_shard(sys.argv[1], np.arange(60_000))
except OctavoError as error:
    print(error.exit_code, error)
"""
    assert python(CHILD + script, tmp_path / "a.npy").stdout.startswith("6 cannot write")
    assert not list(tmp_path.iterdir())
