"""A preparation survives kills, full and read-only disks: the dataset is the same to the byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_kit import python, wait_until

from octavo import disk
from octavo.text import pipeline, streaming
from octavo.text.prepare_request import Request
from octavo.text.preparing import prepare

# What the processes of these tests share: a request with every kind of border in it.
CHILD = """
import os, random, resource, signal, sys, tempfile, time
from pathlib import Path
from octavo.errors import OctavoError
from octavo.text import pipeline, streaming
from octavo.text.prepare_request import Request
from octavo.text.preparing import prepare

pipeline.BATCH, pipeline.SAVE_EVERY, streaming.STRETCH = 6000, 0.0, 1000
folder = Path(sys.argv[1])

def request(out, **asked):
    asked = dict(tokenizer="byte", shard_tokens=9000, processes=1, val_fraction=0.1) | asked
    names = [str(folder / name) for name in ("a.jsonl", "b.txt", "c.jsonl")]
    return Request(names, folder / out, drop_duplicates=True, **asked)

def attempt(out, **asked):
    pid = os.fork()
    if pid == 0:
        prepare(request(out, **asked))
        os._exit(0)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def files(out):
    return {path.name: path.read_bytes() for path in (folder / out).iterdir()}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    lines = [json.dumps({"text": f"{n}: " + "words and words, " * (n % 60)}) for n in range(50)]
    (folder / "a.jsonl").write_text("\n".join(lines[:30] + lines[5:15]), encoding="utf-8")
    (folder / "b.txt").write_text("a long text, in stretches; " * 500, encoding="utf-8")
    (folder / "c.jsonl").write_text("\n".join(lines[25:]), encoding="utf-8")
    run("prepare(request('undisturbed'))", folder)
    return folder


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    return python(CHILD + script, *args)


def test_a_kill_at_any_point_changes_nothing(folder, monkeypatch):
    """Each step that others could see is one at which the process ends once, and is begun again."""
    points: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(disk, "failpoint", points.append)
        patch.setattr(pipeline, "BATCH", 6000)
        patch.setattr(pipeline, "SAVE_EVERY", 0.0)
        patch.setattr(streaming, "STRETCH", 1000)
        names = [str(folder / name) for name in ("a.jsonl", "b.txt", "c.jsonl")]
        asked = {"tokenizer": "byte", "shard_tokens": 9000, "processes": 1, "val_fraction": 0.1}
        prepare(Request(names, folder / "counted", drop_duplicates=True, **asked))
    points = [p for p in dict.fromkeys(points) if not p.startswith((".", "train-00002"))]
    assert {"train-00000.npy-prepared", "progress.json-replaced", "train-swept"} < set(points)
    assert {"dataset.json-prepared", "dataset.json-replaced", "cleared"} < set(points)
    script = """
killed = 0
for number, point in enumerate(sys.argv[2:]):
    os.environ["OCTAVO_FAILPOINT"] = point
    code = ended(attempt(str(number)))
    assert code in (0, 137), (point, code)
    killed += code == 137
    os.environ["OCTAVO_FAILPOINT"] = ""
    assert ended(attempt(str(number))) == 0, point
    assert files(str(number)) == files("undisturbed"), point
print(killed)
"""
    assert int(run(script, folder, *points).stdout) >= len(points) - 2


def test_a_kill_at_any_time_changes_nothing(folder):
    script = """
draw, killed = random.Random(1337), 0
started = time.monotonic()
ended(attempt("timed"))
whole = time.monotonic() - started
for trial in range(40):
    if trial >= 8 and killed >= 4:
        break
    while True:
        started, pid = time.monotonic(), attempt(f"random{trial}")
        time.sleep(draw.uniform(0, 0.8 * whole))
        os.kill(pid, signal.SIGKILL)
        if ended(pid) == 0:  # done before the kill: the machine was slower when it was timed
            whole = min(whole, time.monotonic() - started)
            break
        killed += 1
        if draw.random() < 0.3:  # sometimes it is let through
            assert ended(attempt(f"random{trial}")) == 0
    assert files(f"random{trial}") == files("undisturbed"), trial
print(killed)
"""
    assert int(run(script, folder).stdout) >= 4


def test_another_request_is_refused_and_harms_nothing(folder):
    script = """
os.environ["OCTAVO_FAILPOINT"] = "train-00002.npy-replaced"
assert ended(attempt("other")) == 137
before = files("other")
try:
    prepare(request("other", val_fraction=0.2))
except OctavoError as error:
    print(error.exit_code, error)
assert files("other") == before
os.environ["OCTAVO_FAILPOINT"] = ""
prepare(request("other"), print)
assert files("other") == files("undisturbed")
"""
    said = run(script, folder).stdout.splitlines()
    assert "val_fraction was 0.1, now 0.2; type the same command as then" in said[0]
    assert said[1].startswith("going on after 2 shards, ")


def test_a_full_disk_ends_with_6_and_the_same_command_goes_on(folder):
    """A limit on the size of files refuses a write as a full disk does, in the middle of it."""
    script = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for number, limit in enumerate((2000, 14000, 18050)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        prepare(request(f"full{number}"))
        raise SystemExit("it was not full")
    except OctavoError as error:
        print(error.exit_code, error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    prepare(request(f"full{number}"))
    assert files(f"full{number}") == files("undisturbed"), limit
"""
    said = run(script, folder).stdout.splitlines()
    assert all(line.startswith("6 cannot write ") for line in said)
    assert "File too large" in said[0]
    assert said[-1].endswith("what was done is kept, and the same command goes on")


def test_a_read_only_place_ends_with_6(folder):
    """In a child that gives up root's rights, to which no directory is read-only."""
    script = """
with tempfile.TemporaryDirectory() as place:  # pytest's own is hidden from other users
    texts = Path(place) / "a.txt"
    texts.write_text("text")
    os.chmod(place, 0o555)
    if os.getuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    try:
        prepare(Request([str(texts)], Path(place) / "out", tokenizer="byte"))
    except OctavoError as error:
        print(error.exit_code, error)
    if os.getuid() == 0:
        os.seteuid(0)
    os.chmod(place, 0o755)
"""
    said = run(script, folder).stdout
    assert said.startswith("6 cannot write ")
    assert "Permission denied" in said


def test_two_at_once_in_one_directory_are_refused(folder):
    script = """
from octavo.text.preparing import _held
with _held(folder / "twice"):
    try:
        prepare(request("twice"))
    except OctavoError as error:
        print(error.exit_code, error)
"""
    assert run(script, folder).stdout.startswith("2 ")


def test_a_progress_that_is_not_ours_is_no_crash(folder):
    script = """
(folder / "broken").mkdir()
for data in (b"", b"{", b"[]", b'{"state": {"documents": 1}}',
             b'{"state": {"documents": 1, "odd": 2}, "request": {}}'):
    (folder / "broken" / "progress.json").write_bytes(data)
    try:
        prepare(request("broken"))
        raise SystemExit(f"{data} was taken")
    except OctavoError as error:
        print(error.exit_code)
    assert os.listdir(folder / "broken") == ["progress.json"]
"""
    assert set(run(script, folder).stdout.split()) == {"3"}


def test_killed_with_its_workers_it_leaves_none_behind(folder, tmp_path):
    """A pool's workers hold each other's pipes open, and would wait for work for ever."""
    script = tmp_path / "many.py"
    tell = """
import multiprocessing
def tell(*_):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
pipeline.SMALL, pipeline.Preparation._take = 0, tell
if __name__ == "__main__":
    prepare(request("workers", processes=2))
"""
    script.write_text(CHILD + tell, encoding="utf-8")
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        process.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(map(alive, pids)))


def alive(pid: str) -> bool:
    """Whether the process runs; one that ended and nobody has asked after does not."""
    asked = ["ps", "-o", "stat=", "-p", pid]
    state = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")
