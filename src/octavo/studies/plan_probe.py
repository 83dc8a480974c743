"""A run in small, in a process of its own: what two steps need and how long everything takes.

The process gets the run's settings, a few of its own rows and its tokenizer, and does with them
what `train` does: builds the learner, steps, validates, samples, saves, draws the report. Its
memory is counted from before the model was built.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.checkpoint import Run
from octavo.config import Config, load_config, to_yaml
from octavo.errors import OctavoError, ResourceError
from octavo.language_model import choose_device, load_base
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.batches import Batches
from octavo.text.tokenizer import Tokenizer
from octavo.training.display import Display
from octavo.training.hardware import peak_memory
from octavo.training.keeper import Keeper, sample, validate
from octavo.training.learner import build_learner, choose_precision, optimizer_step
from octavo.training.loss import cross_entropy
from octavo.training.memory import VALIDATED
from octavo.training.metrics import MetricsLog
from octavo.training.task import Task

STEPS = 2  # the second has the optimizer's averages in memory
SECONDS = 4.0  # of further steps, for their speed
MOST_PASSES = 4  # micro-batches in a step; more take their multiple of the time
SAMPLED = 40  # tokens written
M_MMAP_THRESHOLD = -3  # glibc's name for it in mallopt


@dataclass(frozen=True)
class Probe:
    """What was measured: bytes above the process before the model, seconds of each thing once."""

    step_bytes: int
    peak_bytes: int
    """With a validation."""
    start: float
    """From nothing to a learner that is ready."""
    step: float
    validation: float
    sample: float
    save: float
    end: float
    """To draw the report."""


def probe(task: Task, beside: Path, seconds: float = SECONDS) -> Probe:
    """Measure ``task`` in a child process; what it saves lies in ``beside``, and goes again.

    The speed of a step is the mean over ``seconds``, and at least one.

    Raises `ResourceError` where the child was killed, which is how too little memory ends, and an
    `OctavoError` with its last line where it failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=beside) as folder:
        _pack(task, Path(folder))
        program = [sys.executable, "-m", "octavo.studies.plan_probe"]
        command = [*program, folder, str(seconds), str(time.time())]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode < 0:
        raise ResourceError(
            f"two steps of this run were killed by signal {-done.returncode}",
            fix="it is too large for the memory there is",
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OctavoError(f"two steps of this run failed: {last}")
    return _in_full(Probe(**json.loads(done.stdout.splitlines()[-1])), task)


def _in_full(small: Probe, task: Task) -> Probe:
    """The seconds of whole steps, validations and samples, of which the child did a part."""
    train, log = task.config.train, task.config.log
    validated = len(_few(task.val[0])) / len(task.val[0]) if task.val is not None else 1.0
    return dataclasses.replace(
        small,
        step=small.step * train.grad_accum / min(train.grad_accum, MOST_PASSES),
        validation=small.validation / validated,
        sample=small.sample * log.sample_tokens / min(log.sample_tokens, SAMPLED),
    )


def _few(windows: np.ndarray) -> np.ndarray:
    """As many validation windows as are scored at once."""
    return windows[: max(VALIDATED // windows.shape[1], 1)]


def _pack(task: Task, folder: Path) -> None:
    """Put what the child needs into ``folder``."""
    config = task.config
    passes = min(config.train.grad_accum, MOST_PASSES)
    x, y = task.batches.rows(0, STEPS * passes * config.train.micro_batch_size)
    rows: dict[str, Any] = {"x": x, "y": y}
    if task.val is not None:
        rows |= {"val_x": _few(task.val[0]), "val_y": _few(task.val[1])}
    np.savez(folder / "rows.npz", **rows)
    small = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, grad_accum=passes),
        log=dataclasses.replace(
            config.log, to=[], sample_tokens=min(config.log.sample_tokens, SAMPLED)
        ),
        eval=dataclasses.replace(config.eval, hellaswag=None, hellaswag_every=0),
    )
    (folder / "config.yaml").write_text(to_yaml(small), encoding="utf-8")
    if task.tokenizer is not None:
        task.tokenizer.save(folder / "tokenizer.json")
    about = {"eot_id": task.mask_id, "windows": task.batches.windows}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


class _Rows(Batches):
    """The few rows that were packed, over and over."""

    def __init__(self, x: np.ndarray, y: np.ndarray, eot_id: int | None, windows: int) -> None:
        self.x, self.y, self.eot_id, self.windows = x, y, eot_id, windows
        self.block_size = x.shape[1]

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        index = self.starts(first, count)
        return self.x[index], self.y[index]

    def starts(self, first: int, count: int) -> np.ndarray:
        """Which of them; a spike is told with it."""
        return (first + np.arange(count)) % len(self.x)


def _unpack(folder: Path, config: Config) -> Task:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    tokenizer = folder / "tokenizer.json"
    with np.load(folder / "rows.npz") as rows:
        val = (rows["val_x"], rows["val_y"]) if "val_x" in rows else None
        batches = _Rows(rows["x"], rows["y"], about["eot_id"], about["windows"])
    return Task(
        config=config,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer.exists() else None,
        batches=batches,
        val=val,
        data={"tokens": 0, "val_tokens": 0, "sha256": None},
        files={},
        base=load_base(config.finetune).model if config.finetune.base else None,
    )


def measure(folder: Path, seconds: float, began: float) -> Probe:
    """In the child: everything that a run does, once; ``began`` is when the process was started."""
    config = load_config(folder / "config.yaml")
    device, quiet = choose_device(config.train.device), Display(quiet=True)
    task = _unpack(folder, config)
    begun, memory = time.perf_counter(), Growth(config, device)
    waited = time.perf_counter() - begun  # for what a run does not do
    learner = build_learner(task, device, quiet)
    run = Run.create(folder / "run", config, task.tokenizer)
    log = MetricsLog(run.path, config)
    keeper = Keeper(learner, run, log, quiet)
    keeper.announce()
    start = time.time() - began - waited

    def step() -> None:
        started = time.perf_counter()
        keeper.step(optimizer_step(learner), time.perf_counter() - started)

    for _ in range(STEPS):
        step()
    step_bytes, started, steps = memory.needed(), time.perf_counter(), 0
    while not steps or time.perf_counter() - started < seconds:
        step()
        steps += 1
    step_seconds = (time.perf_counter() - started) / steps
    writes = task.tokenizer is not None and not config.finetune.labels
    validation = _timed(lambda: validate(learner)) if task.val else 0.0
    sampling = _timed(lambda: sample(learner)) if writes else 0.0
    saving = _timed(keeper.save)
    peak_bytes = max(step_bytes, memory.grown())
    drawing = _timed(keeper.draw)
    log.close()
    return Probe(step_bytes, peak_bytes, start, step_seconds, validation, sampling, saving, drawing)


def _timed(what: Callable[[], Any]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


class Growth:
    """How far this process's memory has grown: the allocator's on CUDA, else the resident set.

    A tiny model is trained before, so that what PyTorch loads at its first step is not counted.
    Until `needed` is asked, glibc gives back at once what is freed, as it always does with large
    tensors; else small ones would count twice where their freed room is too small for others.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        _keep_freed(2**16)
        _train_tiny(choose_precision(config.train.precision, device), device)
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")
        _forget_peak()

    def needed(self) -> int:
        """Bytes at the highest so far; from now on the allocator does as it likes."""
        grown = self.grown()
        _keep_freed(2**25)
        return grown

    def grown(self) -> int:
        """Bytes at the highest since this was made."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return _resident("VmHWM") - self.before


def _train_tiny(precision: torch.dtype, device: torch.device) -> None:
    small = ModelConfig(vocab_size=8, block_size=64, n_layer=1, n_head=2, d_model=128)
    tiny = GPT(small).to(device)
    ids = torch.zeros(8, 64, dtype=torch.long, device=device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        loss = cross_entropy(tiny, ids, ids)
    loss.backward()
    torch.optim.AdamW(tiny.parameters()).step()


def _keep_freed(most: int) -> None:
    """Let glibc keep freed blocks of up to ``most`` bytes; 2**25 is what it comes to by itself."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, most)


def _resident(name: str) -> int:
    """Bytes of this process now (VmRSS) or at its highest (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text(encoding="ascii"))
        assert found is not None
        return int(found[1]) * 1024
    return peak_memory(torch.device("cpu"))


def _forget_peak() -> None:
    """Let VmHWM begin anew at what is there now, where Linux can."""
    refs = Path("/proc/self/clear_refs")
    if os.access(refs, os.W_OK):
        refs.write_text("5", encoding="ascii")


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
    print(json.dumps(dataclasses.asdict(found)))
