"""A run survives kills, full and failing disks and second trainers: real processes, real limits."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command_kit import python
from run_kit import save, value_of

from octavo import disk
from octavo.checkpoint import Run
from octavo.config import Config
from octavo.errors import ConfigError, ResourceError
from octavo.manifest import verify


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs" / "one", Config())


def leftovers(run: Run) -> list[str]:
    return [p.name for p in run.path.rglob(".*")]


# What the child processes share. Forked ones start in a millisecond.
CHILD = """
import os, resource, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from octavo.checkpoint import Run
from octavo.config import Config
from octavo.errors import OctavoError
from octavo.manifest import verify

def save(run, step, keep=2, size=100):
    numbers = np.full(size, step, np.float32)
    return run.save(step, {"w": numbers}, {"w.exp_avg": numbers}, {"tokens": step}, keep=keep)

def fork(function, *args):
    pid = os.fork()
    if pid == 0:
        function(*args)
        os._exit(0)
    return pid
"""


def test_creating_is_all_or_nothing(tmp_path, monkeypatch):
    points: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(disk, "failpoint", points.append)
        Run.create(tmp_path / "runs" / "first", Config(), files={"input.txt": b"x"})
    points = [point for point in points if not point.startswith(".")]
    assert len(points) == 8
    script = """
for point in sys.argv[2:]:
    os.environ["OCTAVO_FAILPOINT"] = point
    pid = fork(Run.create, f"{sys.argv[1]}/{point}/runs/one", Config())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, 137), point
"""
    python(CHILD + script, tmp_path, *points)
    for point in points:
        path = tmp_path / point / "runs" / "one"
        assert not path.exists() or Run.open(path).config == Config(), point


def test_a_read_only_parent_is_a_resource_error():
    """In a child that gives up root's rights, to which no directory is read-only."""
    script = """
os.chdir(sys.argv[1])
os.chmod(".", 0o555)
if os.getuid() == 0:
    os.setuid(65534)
try:
    Run.create("run", Config())
except OctavoError as error:
    print(error.exit_code, error)
"""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is hidden from other users
        result = python(CHILD + script, folder)
    assert result.stdout.startswith("6 cannot create the run run: Permission denied;")


def test_a_process_killed_at_any_point_of_a_save_leaves_the_old_or_the_new(run, monkeypatch):
    save(run, 1, keep=3)
    run.mark_best(1, 1.0)
    for step in (2, 3):
        save(run, step, keep=3)
    (run.folder / ".tmp-step-00000004-dead").mkdir()  # so that sweeping is passed, too
    shutil.copytree(run.path, run.path.parent / "rehearsal")
    points: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(disk, "failpoint", points.append)
        rehearsal = Run(run.path.parent / "rehearsal")
        save(rehearsal, 4, keep=1)
        rehearsal.mark_best(4, 0.5)
    points = sorted({point for point in points if not point.startswith(".")})
    assert len(points) == 17, points
    script = """
def train(run):
    save(run, 4, keep=1)
    run.mark_best(4, 0.5)

for point in sys.argv[2:]:
    path = Path(sys.argv[1]).parent / point
    shutil.copytree(sys.argv[1], path)
    os.environ["OCTAVO_FAILPOINT"] = point
    pid = fork(train, Run.open(path))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137, point
"""
    python(CHILD + script, run.path, *points)
    new = 0
    for point in points:
        survivor = Run.open(run.path.parent / point)
        steps = [verify(p).step for p in survivor.checkpoints]
        assert 1 in steps, point  # the best until step 4 is
        assert verify(survivor.best).step in (1, 4), point
        assert steps[-1] == verify(survivor.latest).step == value_of(survivor), point
        assert steps[-1] in (3, 4), point
        assert survivor.damaged == [], point
        new += steps[-1] == 4
        with survivor.locked():
            save(survivor, 5)
        assert value_of(survivor) == 5
        assert leftovers(survivor) == [], point
    assert new == 6  # the points after the rename


def test_kill_9_at_any_time_loses_nothing_that_was_acknowledged(run):
    """In-place `torch.save` left no loadable checkpoint in 76 of 100 such trials."""
    script = """
def endlessly(run, step, told):
    with run.locked():
        while True:
            step += 1
            save(run, step, size=100_000)
            os.write(told, step.to_bytes(8, "little"))

run = Run.open(sys.argv[1])
save(run, 1, size=100_000)
started = time.monotonic()
save(run, 2, size=100_000)
one_save = time.monotonic() - started
random = np.random.default_rng(0)
told, telling = os.pipe()
step = 2
for trial in range(50):
    pid = fork(endlessly, run, step, telling)
    time.sleep(random.uniform(0, 3 * one_save))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.write(telling, bytes(8))
    while acknowledged := int.from_bytes(os.read(told, 8), "little"):
        step = acknowledged
    for path in run.checkpoints:
        verify(path)
    assert run.damaged == []
    saved = run.load()
    assert saved.step in (step, step + 1), (saved.step, step)
    assert (saved.model_arrays()["w"] == saved.step).all()
    step = saved.step
print(step)
"""
    assert (
        int(python(CHILD + script, run.path).stdout) > 2
    )  # some children lived long enough to save


def test_a_full_disk_at_any_byte_leaves_the_old_checkpoints_and_no_rest(run):
    script = """
run = Run.open(sys.argv[1])
save(run, 1, keep=9, size=100)
before = sorted(p.relative_to(run.path) for p in run.path.rglob("*"))
codes = set()
for limit in range(0, 300_000, 8192):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(run, 2, keep=9, size=50_000)
    except OctavoError as error:
        assert error.exit_code == 6 and "File too large" in str(error), error
        assert sorted(p.relative_to(run.path) for p in run.path.rglob("*")) == before
        codes.add(limit)
assert max(codes) < 200_000 + 8192, max(codes)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(len(codes), [verify(path).step for path in run.checkpoints])
"""
    refused, _, steps = python(CHILD + script, run.path).stdout.partition(" ")
    assert int(refused) > 20
    assert steps == "[1, 2]\n"


def test_a_disk_that_fails_at_any_sync_leaves_the_old_or_the_new(run, monkeypatch):
    save(run, 1)
    fsync = os.fsync
    for failing in range(20):
        calls = iter(range(100))

        def broken(handle: int, failing: int = failing, calls: object = calls) -> None:
            if next(calls) == failing:
                raise OSError(5, "Input/output error")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", broken)
        try:
            save(run, 2 + failing)
        except ResourceError as error:
            assert error.what.endswith("Input/output error")  # noqa: PT017 - or it succeeds
            assert value_of(run) in (1, 2 + failing)
            assert leftovers(run) == []
        else:
            break
    assert failing == 6  # model, optimizer, state, manifest, directory, parent; then it succeeds
    assert value_of(run) == 2 + failing


def test_a_second_trainer_is_refused_and_a_killed_one_leaves_no_lock(run):
    script = """
with Run.open(sys.argv[1]).locked():
    print(os.getpid(), flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", CHILD + script, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        pid = child.stdout.readline().strip()
        with pytest.raises(ConfigError, match=f"being trained by process {pid};"), run.locked():
            pass
        child.send_signal(signal.SIGKILL)
    with run.locked(), pytest.raises(ConfigError, match=f"by process {os.getpid()};"), run.locked():
        pass
    with run.locked():
        pass
