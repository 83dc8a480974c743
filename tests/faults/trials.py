"""Training runs that are killed, stopped or out of disk: forked children of one process.

python tests/faults/trials.py '{"kills": 100, ...}' FOLDER [SETTING...] prints as JSON what became
of so many of each. The tests ask for a few, `benchmarks/faults.py` for many. An undisturbed run
says how every other must end: the same weights, optimizer and state, losses and validations, bit
for bit.
"""

import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = int(os.environ.get("OCTAVO_FAULTS", "1"))  # how many times as many trials as usual
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs.\n" * 40
SETTINGS = (
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "model.dropout=0.2", "train.max_steps=24", "train.micro_batch_size=2", "train.grad_accum=2",
    "optim.warmup=2", "optim.lr=1e-2", "eval.every=8", "eval.windows=8", "checkpoint.every=3",
    "checkpoint.keep=2", "log.every=1", "log.sample_every=8", "log.sample_tokens=2",
)  # fmt: skip
KILLED = -signal.SIGKILL
Facts = dict[str, Any]


def ask(what: dict[str, int], *settings: str, on_disk: bool = False) -> dict[str, Facts]:
    """What became of so many trials of each kind, made by a process of their own.

    Their files lie in memory, where the system has a place for that, unless ``on_disk``: there
    nothing is waited for.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) and not on_disk else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        os.chmod(folder, 0o755)
        words = [sys.executable, __file__, json.dumps(what), folder, *settings]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- what every trial is made of


class Bench:
    """A configuration, the undisturbed run of it, and runs that are disturbed."""

    def __init__(self, folder: Path, *settings: str) -> None:
        from octavo.config import load_config

        self.folder = folder
        text = folder / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        named = [f"data.source={json.dumps(str(text))}", *settings]
        self.config = load_config(None, [*SETTINGS, *named])
        started = time.monotonic()
        assert wait(self.start(folder / "undisturbed")) == 0
        self.seconds = time.monotonic() - started
        self.expected = ending(folder / "undisturbed")

    def start(self, out: Path, failpoint: str = "", before: Callable[[], object] = dict) -> int:
        """Train into ``out``, or go on with what is there, in a child; gives its process id.

        The child meets ``failpoint``, and does what ``before`` says before it begins.
        """
        from octavo.errors import OctavoError
        from octavo.training.loop import train

        def run() -> int:
            os.environ["OCTAVO_FAILPOINT"] = failpoint
            before()
            try:
                train(self.config, out, resume=(out / "config.yaml").exists(), quiet=True)
            except OctavoError as error:
                print(f"{out.name}: {error}", file=sys.stderr)
                return error.exit_code
            return 0

        return fork(run)

    def half(self) -> Path:
        """A run killed half way, when it had saved, validated and sampled, once in a save."""
        out = self.folder / "half"
        assert wait(self.start(out, failpoint="logged-sample")) == 137
        (out / "checkpoints" / ".tmp-step-00000009-dead").mkdir()
        return out

    def ends_alike(self, out: Path) -> bool:
        """Whether ``out``, gone on to its end, is the undisturbed run; it is removed."""
        alike = wait(self.start(out)) == 0 and ending(out) == self.expected
        shutil.rmtree(out)
        return alike


def fork(function: Callable[[], int]) -> int:
    """Call the function in a child, which ends with what it returns; gives its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function())
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return pid


def wait(pid: int) -> int:
    """How the child ended: its exit code, or less than 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ending(out: Path) -> Facts:
    """All of a run that a disturbance must not change."""
    from octavo.checkpoint import Run
    from octavo.reporting.report import read_metrics

    run, events = Run.open(out), read_metrics(out)
    saved = run.load()
    assert saved.manifest.files.keys() > {"model.safetensors", "optimizer.safetensors"}
    tensors = [n for n in saved.manifest.files if n.endswith(".safetensors")]
    logged = {"train": ("loss", "grad_norm", "lr"), "eval": ("val_loss",), "end": ("reason",)}
    return {
        "files": {name: saved.manifest.files[name]["sha256"] for name in tensors},
        "state": {name: value for name, value in saved.state.items() if name != "seconds"},
        "best": json.loads((run.folder / "best.json").read_bytes()),
        "events": [
            [e["event"], e["step"], *(e[name] for name in logged[e["event"]])]
            for e in events
            if e["event"] in logged
        ],
    }


def newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 without one; -1 where any is damaged or was undone."""
    from octavo.checkpoint import Run
    from octavo.manifest import verify

    run = Run(out)
    steps = [verify(path).step for path in run.checkpoints]
    told = [event["step"] for event in events(out, "save")]
    step = max(steps, default=0)
    return -1 if run.damaged or step < max(told, default=0) else step


# ---- the trials


def kills(bench: Bench, count: int) -> Facts:
    """`kill -9` at random times, again and again until the run is through, over many runs."""
    draw = random.Random(1337)
    killed = lost = runs = different = 0
    while killed < count:
        out, step, code = bench.folder / f"run-{runs}", 0, KILLED
        while code == KILLED:
            pid = bench.start(out)
            if killed < count:
                time.sleep(draw.uniform(0, 0.7 * bench.seconds))
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            killed += code == KILLED
            before, step = step, newest(out)
            lost += step < before
        different += code != 0 or ending(out) != bench.expected
        runs += 1
        shutil.rmtree(out)
    return {"killed": killed, "lost": lost, "runs": runs, "different": different}


def points(bench: Bench, count: int) -> Facts:
    """The end of the process at every named point of a new run, and of one that goes on."""
    half = bench.half()
    fresh, later = _points_of(bench, None), _points_of(bench, half)
    lost, different = [], []
    for start, point in [(None, p) for p in fresh if p not in later] + [(half, p) for p in later]:
        out = bench.folder / "run"
        if start:
            shutil.copytree(start, out)
        step = newest(out)
        code = wait(bench.start(out, failpoint=point))
        lost += [point] * (code != 137 or newest(out) < step)
        different += [point] * (not bench.ends_alike(out))
    return {"points": sorted({*fresh, *later}), "lost": lost, "different": different}


def _points_of(bench: Bench, start: Path | None) -> list[str]:
    """The failpoints that a run passes, but for those whose names are drawn by chance."""
    from octavo import disk

    out, log = bench.folder / "run", bench.folder / "points"
    if start:
        shutil.copytree(start, out)

    def record() -> None:
        file = log.open("a", encoding="utf-8", buffering=1)
        disk.failpoint = lambda name: file.write(f"{name}\n")

    assert wait(bench.start(out, before=record)) == 0
    shutil.rmtree(out)
    names = dict.fromkeys(log.read_text(encoding="utf-8").split())
    log.unlink()
    return [name for name in names if not name.startswith(".")]


def full_disks(bench: Bench, count: int) -> Facts:
    """No file may grow beyond 64 KB, 128 KB, ...: as on a full disk, in the middle of a write."""
    half = bench.half()
    step = newest(half)
    codes, lost, different = [], 0, 0
    for number in itertools.count():
        out = bench.folder / f"full-{number}"
        shutil.copytree(half, out)
        codes.append(wait(bench.start(out, before=lambda size=number << 16: limit(size))))
        lost += newest(out) < step
        different += not bench.ends_alike(out)
        if codes[-1] != 6:
            return {"codes": codes, "lost": lost, "different": different}


def limit(size: int | None) -> None:
    """Let no file of this process grow beyond ``size`` bytes; None: as large as it may."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def room_again(bench: Bench, count: int) -> Facts:
    """A disk that is full for three steps, in which one save and many lines are refused."""
    from octavo.training import loop

    step = loop.optimizer_step

    def fill_up(learner: Any, *rest: Any) -> Any:
        limit(0 if learner.progress.step in (10, 11, 12) else None)
        return step(learner, *rest)

    def patch() -> None:
        loop.optimizer_step = fill_up

    out = bench.folder / "full-for-a-while"
    code = wait(bench.start(out, before=patch))
    same = ending(out) == bench.expected
    return {"code": code, "same": same, "kept": newest(out)}


def stops(bench: Bench, count: int) -> Facts:
    """SIGTERM at random times after the first step: how long until the run is saved and gone."""
    draw = random.Random(1337)
    codes: dict[int, int] = {}
    saved, seconds, allowed, different = [], [], [], 0
    for number in range(count):
        out = bench.folder / f"stopped-{number}"
        pid = bench.start(out)
        while not events(out, "train"):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.5 * bench.seconds))
        started, clock = time.monotonic(), time.time()
        os.kill(pid, signal.SIGTERM)
        code = wait(pid)
        codes[code] = codes.get(code, 0) + 1
        if code == 75:
            seconds.append(time.monotonic() - started)
            saved.append((out / "checkpoints").stat().st_mtime - clock)  # the last one's renaming
            allowed.append(step_and_save(bench, out))
        different += not bench.ends_alike(out)
    facts = {"codes": codes, "different": different, "seconds": seconds}
    return facts | {"saved_seconds": saved, "step_and_save_seconds": allowed}


def step_and_save(bench: Bench, out: Path) -> float:
    """Seconds of the slower of the last two steps of a run, and of its last save."""
    tokens = bench.config.train.batch_size * bench.config.model.block_size
    steps = [tokens / event["tokens_per_s"] for event in events(out, "train")[-2:]]
    return max(steps) + events(out, "save")[-1]["save_seconds"]


def events(out: Path, kind: str) -> list[Facts]:
    """What ``out`` has logged of one kind."""
    log = out / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n") if log.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith(b"}")]  # a kill may tear one
    return [event for event in whole if event["event"] == kind]


def signals(bench: Bench, count: int) -> Facts:
    """SIGTERM within a save, a validation, and just after each of them."""
    found: Facts = {}
    for point in ("model.safetensors-unsynced", "logged-save", "validating", "logged-eval"):
        out = bench.folder / point
        code = wait(bench.start(out, failpoint=f"{point}:term"))
        saves = [event["step"] for event in events(out, "save")]
        found[point] = {"code": code, "saves": saves, "alike": bench.ends_alike(out)}
    return found


def compiling(bench: Bench, count: int) -> Facts:
    """SIGTERM while the first step is compiled: there is no run yet."""
    plain, out = bench.config, bench.folder / "compiling"
    bench.config = dataclasses.replace(plain, train=dataclasses.replace(plain.train, compile=True))
    code = wait(bench.start(out, failpoint="compiling:term"))
    bench.config = plain
    return {"code": code, "there": out.exists()}


def second_signal(bench: Bench, count: int) -> Facts:
    """Two SIGTERM within one validation."""
    from octavo import disk

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    def patch() -> None:
        disk.failpoint = lambda name: name == "validating" and twice()

    out = bench.folder / "twice"
    return {"code": wait(bench.start(out, before=patch)), "alike": bench.ends_alike(out)}


def read_only(bench: Bench, count: int) -> Facts:
    """A run that goes on in a directory where its user may not write."""
    from octavo.training.loop import train

    out = bench.half()
    before = {path.name for path in out.iterdir()}

    def give_up_rights() -> None:
        train(bench.config, bench.folder / "warm", quiet=True)  # imports what is closed to others
        os.chmod(out, 0o555)
        if os.getuid() == 0:  # to whom no directory is read-only
            os.setuid(65534)

    code = wait(bench.start(out, before=give_up_rights))
    os.chmod(out, 0o755)
    same = before == {path.name for path in out.iterdir()}
    return {"code": code, "untouched": same, "alike": bench.ends_alike(out)}


def flips(bench: Bench, count: int) -> Facts:
    """Single bits of a run's checkpoint and of a dataset's shards: how many go unseen."""
    import numpy as np

    from octavo.checkpoint import Run
    from octavo.errors import OctavoError
    from octavo.manifest import verify
    from octavo.text import shards

    checkpoint, home = Run(bench.folder / "undisturbed").checkpoints[-1], bench.folder / "data"
    home.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, 4000)
    entries = [shards.write_shard(home / f"train-{n:05d}.npy", ids + n) for n in range(2)]
    shards.write_manifest(home, [*entries, shards.write_shard(home / "val-00000.bin", ids, "val")])
    checks: dict[Path, Callable[[], object]] = {
        **{path: lambda: verify(checkpoint) for path in sorted(checkpoint.iterdir())},
        **{home / e["file"]: lambda: shards.verify(shards.Dataset.open(home)) for e in entries},
    }
    draw, unseen = random.Random(1337), []
    for _ in range(count):
        path, check = draw.choice(list(checks.items()))
        sound = path.read_bytes()
        flipped = bytearray(sound)
        flipped[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            check()
            unseen.append(path.name)
        except OctavoError as error:
            unseen += [path.name] * (path.name not in str(error))
        path.write_bytes(sound)
    return {"flips": count, "unseen": unseen}


if __name__ == "__main__":
    import torch
    import torch._dynamo  # what the children would each import again

    import octavo.reporting.page
    import octavo.training.loop  # noqa: F401

    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # its pictures take half a second
    torch.set_num_threads(1)
    asked, place, *settings = sys.argv[1:]
    bench, results = Bench(Path(place), *settings), {}
    for what, count in json.loads(asked).items():
        begun = time.monotonic()
        results[what] = globals()[what](bench, count)
        results[what]["trial_seconds"] = round(time.monotonic() - begun, 1)
    print(json.dumps(results))
