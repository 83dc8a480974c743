"""A file or directory is whole or absent: tried by killing real processes at every named point."""

import os
from pathlib import Path

import pytest
from command_kit import python

from octavo import disk
from octavo.errors import ConfigError, ResourceError

REPLACE = """
import sys
from pathlib import Path
from octavo.disk import write_atomic
write_atomic(Path(sys.argv[1]), b"new" * 1000)
"""


def test_a_replaced_file_is_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_bytes(b"old")
    points: list[str] = []
    monkeypatch.setattr(disk, "failpoint", points.append)
    disk.write_atomic(tmp_path / "report.html", b"old")
    points = [point for point in points if not point.startswith(".")]
    assert len(points) == 4

    seen = set()
    for point in points:
        path.write_bytes(b"old")
        python(REPLACE, path, ends=137, env=os.environ | {"OCTAVO_FAILPOINT": point})
        seen.add(path.read_bytes())
    assert seen == {b"old", b"new" * 1000}


def test_a_refused_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "best.json"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        disk.write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]
    assert path.read_bytes() == b"old"


def test_discarding_is_finished_by_the_next_sweep(tmp_path, monkeypatch):
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".tmp-abc").write_bytes(b"half")

    def killed(point: str) -> None:
        if point == "trash-renamed":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "failpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            disk.discard(tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()
    disk.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


def test_scratch_is_gone_unless_published(tmp_path):
    with disk.scratch(tmp_path, "run") as temp:
        (temp / "file").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []
    with disk.scratch(tmp_path / "new" / "folders", "run") as temp:
        disk.write_synced(temp / "file", b"x")
        disk.publish(temp, tmp_path / "run")
    assert (tmp_path / "run" / "file").read_bytes() == b"x"
    assert list((tmp_path / "new" / "folders").iterdir()) == []


def test_a_path_that_cannot_be_is_a_usage_error(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_bytes(b"")
    for path in (loop, loop / "x", tmp_path / ("x" * 300), tmp_path / "file" / "x"):
        with pytest.raises(ConfigError, match="choose another path"):
            disk.exists(path)
    with pytest.raises(ConfigError, match="NUL"):
        disk.exists(Path("runs/\0"))
    assert disk.exists(tmp_path / "file")
    assert not disk.exists(tmp_path / "nothing")
