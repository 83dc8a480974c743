"""Any byte that changes after a checkpoint was saved is noticed, and so is any file."""

import dataclasses
import random
from pathlib import Path

import pytest

from octavo.errors import CheckpointError
from octavo.manifest import (
    MANIFEST,
    Manifest,
    fingerprint,
    naming_a_way_out,
    read_manifest,
    seal,
    valid_checkpoints,
    verify,
)

PARTS = ("model.safetensors", "optimizer.safetensors", "state.json")


def write_checkpoint(path: Path, order: int = 1, **changes: object) -> Manifest:
    path.mkdir()
    for name in PARTS:
        (path / name).write_bytes(random.randbytes(500))
    manifest = Manifest(
        step=order,
        order=order,
        files={name: fingerprint(path / name) for name in PARTS},
        config={"model": {"n_layer": 2, "dropout": 0.1, "rope_scaling": None}},
        tokenizer="é",
        facts={"threads": 2, "betas": [0.9, 1e-300], "nan": float("inf")},
        versions={"numpy": "2"},
    )
    manifest = dataclasses.replace(manifest, **changes)
    (path / MANIFEST).write_bytes(seal(dataclasses.asdict(manifest)))
    return manifest


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    manifest = write_checkpoint(tmp_path / "step-1")
    assert read_manifest(tmp_path / "step-1") == verify(tmp_path / "step-1") == manifest


def test_every_flipped_bit_is_noticed(tmp_path):
    """`torch.load` notices 5 of 300 such flips, and safetensors no more."""
    path = tmp_path / "step-1"
    write_checkpoint(path)
    tried = 0
    for name in (*PARTS, MANIFEST):
        sound = (path / name).read_bytes()
        for offset in range(0, len(sound), max(len(sound) // 100, 1)):
            flipped = bytearray(sound)
            flipped[offset] ^= 1 << random.randrange(8)
            (path / name).write_bytes(flipped)
            tried += 1
            with pytest.raises(CheckpointError, match=name) as caught:
                verify(path)
            assert "\n" not in str(caught.value)
        (path / name).write_bytes(sound)
    assert tried >= 400
    verify(path)


@pytest.mark.parametrize("name", [*PARTS, MANIFEST])
def test_a_truncated_or_missing_file_is_noticed_without_reading_it_all(tmp_path, name):
    path = tmp_path / "step-1"
    write_checkpoint(path)
    sound = (path / name).read_bytes()
    for length in (0, 1, len(sound) // 2, len(sound) - 1):
        (path / name).write_bytes(sound[:length])
        with pytest.raises(CheckpointError, match=name):
            read_manifest(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_manifest(path)
    assert valid_checkpoints(tmp_path) == []


def test_a_file_too_many_is_noticed_but_the_systems_own_are_not(tmp_path):
    path = tmp_path / "step-1"
    write_checkpoint(path)
    (path / ".DS_Store").write_bytes(b"finder")
    verify(path)
    (path / "model.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"model\.pt has 2 bytes, not none"):
        read_manifest(path)


def test_another_format_is_told_from_damage(tmp_path):
    write_checkpoint(tmp_path / "step-1", format=2)
    with pytest.raises(CheckpointError, match="has format 2, this octavo reads 1"):
        read_manifest(tmp_path / "step-1")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"order": None},
        {"files": []},
        {"files": {"state.json": 3}},
        {"files": {"state.json": {}}},
        {"config": {}},
        {"config": {"model": 3}},
        {"config": []},
        {"files": {"../../../etc/passwd": {"bytes": 1, "sha256": "0"}}},
    ],
)
def test_a_sealed_manifest_of_nonsense_is_refused(tmp_path, changes):
    path = tmp_path / "step-1"
    manifest = write_checkpoint(path)
    for field, value in changes.items():  # past Manifest's own check, as an attacker would be
        object.__setattr__(manifest, field, value)
    (path / MANIFEST).write_bytes(seal(dataclasses.asdict(manifest)))
    with pytest.raises(CheckpointError):
        read_manifest(path)
    assert valid_checkpoints(tmp_path) == []


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' * 9999])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "step-1"
    write_checkpoint(path)
    (path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(path)


def test_checkpoints_are_listed_in_the_order_of_saving(tmp_path):
    for name, order in (("step-7", 1), ("step-3", 3), ("step-10", 2)):
        write_checkpoint(tmp_path / name, order)
    assert [path.name for path, _ in valid_checkpoints(tmp_path)] == ["step-7", "step-10", "step-3"]


def test_an_error_names_the_newest_other_checkpoint_that_is_sound_to_the_last_byte(tmp_path):
    for order in (1, 2, 3, 4):
        write_checkpoint(tmp_path / f"step-{order}", order)
    for order in (3, 4):  # same size, other bytes: only the hash tells
        (tmp_path / f"step-{order}" / PARTS[0]).write_bytes(bytes(500))
    with pytest.raises(CheckpointError) as caught, naming_a_way_out(tmp_path / "step-4"):
        verify(tmp_path / "step-4")
    assert caught.value.fix == f"use a sound one: {tmp_path / 'step-2'}"
