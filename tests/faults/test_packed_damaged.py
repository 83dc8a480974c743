"""A packed file that is damaged, of another version or another model is found when it is opened."""

import json
import random
import shutil

import numpy as np
import pytest

from octavo import packed
from octavo.errors import CheckpointError, ConfigError
from octavo.packed import Storage, add_facts, open_packed, packed_path, stream_tensors

FLIPS = 300
MADE_FROM = "5b6ba8028a2e2dea03726e5f"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with one int8 and one int4 matrix, a norm, and nothing else."""
    folder = tmp_path_factory.mktemp("made")
    draw = np.random.default_rng(0)
    tensors = {
        "a": (
            Storage("int8"),
            (draw.integers(-127, 128, (5, 7), dtype=np.int8), np.ones(5, np.float32)),
        ),
        "b": (
            Storage("int4", 32),
            (draw.integers(-8, 8, (20, 64), dtype=np.int8), np.ones((20, 2), np.float16)),
        ),
        "n": (Storage("fp32"), (np.ones(7, np.float32), None)),
    }
    plan = {name: (storage, numbers[0].shape) for name, (storage, numbers) in tensors.items()}
    facts = {"format": packed.FORMAT, "version": packed.VERSION, "precision": "auto"}
    facts |= {"group": "32", "tied": '{"c": "b"}', "weights_sha256": MADE_FROM}
    numbers = [(name, pair) for name, (_, pair) in tensors.items()]
    packed.write_packed(folder, plan, numbers, facts)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def refused(run, precision="auto", made_from=MADE_FROM):
    with pytest.raises(CheckpointError) as error:
        open_packed(run, precision, made_from)
    assert f"octavo quantize {run} --to {precision}" in str(error.value)
    assert error.value.exit_code == 4
    return str(error.value)


def test_what_is_sound_is_opened(run):
    file = open_packed(run, "auto", MADE_FROM)
    assert [stored.storage.kind for stored in file.tensors.values()] == ["int8", "int4", "fp32"]
    assert file.tied == {"c": "b"}


def test_every_flipped_bit_is_found(run):
    path = packed_path(run, "auto")
    sound = path.read_bytes()
    draw = random.Random(0)
    for _ in range(FLIPS):
        data = bytearray(sound)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert "is damaged" in refused(run)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_file_cut_short_or_gone_is_found(run, left):
    path = packed_path(run, "auto")
    path.write_bytes(path.read_bytes()[:left])
    assert "is damaged" in refused(run)
    path.unlink()
    assert "cannot read auto.safetensors" in refused(run)


def test_a_json_file_that_is_damaged_is_found(run):
    path = packed_path(run, "auto").with_suffix(".json")
    text = path.read_text(encoding="utf-8")
    for broken in ("", text[:-10], "[]", "{}", text.replace('"bytes"', '"bites"')):
        path.write_text(broken, encoding="utf-8")
        refused(run)


def test_without_its_json_file_nothing_is_packed(run):
    packed_path(run, "auto").with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match="holds no auto weights; pack them: octavo quantize"):
        open_packed(run, "auto", MADE_FROM)
    with pytest.raises(ConfigError, match="unknown precision 'int3'"):
        open_packed(run, "int3", MADE_FROM)


@pytest.mark.parametrize("changes", [{"version": "2"}, {"version": None}, {"format": "other"}])
def test_a_version_from_the_future_is_refused(run, changes):
    add_facts(packed_path(run, "auto"), changes)
    assert "this octavo reads octavo-packed 1" in refused(run)


def test_another_models_file_is_refused_with_both_hashes(run):
    said = refused(run, made_from="0123456789abcdef0123")
    assert MADE_FROM[:16] in said
    assert "0123456789abcdef" in said


def rewrite(run, arrays, **metadata):
    """A file of these arrays whose hash is sound, as somebody else's program may write it."""
    path = packed_path(run, "auto")
    layout = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    plain = {"weights_sha256": MADE_FROM, "tied": "{}", "tensors": "{}"}
    stream_tensors(path, layout, arrays.items(), plain | metadata)
    add_facts(path, {"file": packed.fingerprint(path)})


ROW = np.ones((1, 8, 16, 2), np.int8)
SCALES = np.ones(16, np.float32)


def test_the_rewritten_file_is_sound_where_its_description_is(run):
    described = json.dumps({"w": ["int8", 0, [16, 16]]})
    rewrite(run, {"w": ROW, "w.scale": SCALES}, tensors=described)
    assert open_packed(run, "auto", MADE_FROM).tensors["w"].shape == (16, 16)


@pytest.mark.parametrize(
    "description",
    [
        ["int8", 0, [17, 16]],  # more rows than there are
        ["int8", 0, [16, 20]],
        ["int4", 16, [16, 16]],
        ["int4", 0, [16, 16]],
        ["int4", 5, [16, 16]],
        ["int2", 0, [16, 16]],
        ["fp32", 0, [16, 16]],
        ["int8", 0, [16]],
        ["int8", 0, [-16, 16]],
        ["int8", 0, "ab"],
        "int8",
        7,
    ],
)
def test_arrays_that_are_not_as_described_never_reach_a_kernel(run, description):
    """A kernel believes the shapes: one row too many would be read beyond the file's end."""
    rewrite(run, {"w": ROW, "w.scale": SCALES}, tensors=json.dumps({"w": description}))
    assert "is not ours" in refused(run)


@pytest.mark.parametrize("arrays", [{"w": ROW}, {"w": ROW, "w.scale": SCALES[:15]}, {}])
def test_scales_that_are_missing_or_too_few_are_found(run, arrays):
    rewrite(run, arrays, tensors=json.dumps({"w": ["int8", 0, [16, 16]]}))
    assert "is not ours" in refused(run)


@pytest.mark.parametrize(
    "metadata", [{"tensors": "{"}, {"tied": "["}, {"tied": '{"a": "b"}'}, {"tensors": "[]"}]
)
def test_metadata_that_is_nonsense_is_refused(run, metadata):
    rewrite(run, {"w": ROW, "w.scale": SCALES}, **metadata)
    assert "is not ours" in refused(run)
