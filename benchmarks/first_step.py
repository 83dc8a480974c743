"""Seconds from a command's start to its first optimizer step, at nanoGPT's shape for CPUs.

The commands are those that people type, `octavo train` and nanoGPT's train.py, each eager and
compiled, with an empty cache for compiled code and then with what is in it. nanoGPT's validates on
one batch before it begins.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from train_peers import SHAPES, random_text

SHAPE = SHAPES["char"]


@dataclass(frozen=True)
class Command:
    """What is typed where, and what a file then holds after the first step."""

    words: list[str]
    cwd: Path
    written: Path
    mark: str


def first_steps(clone: Path, rounds: int, threads: int) -> dict[str, list[float]]:
    """The seconds of every round, by command."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        prepare_nanogpt(random_text(data), data)
        for number in range(rounds):
            for compiled in (False, True):
                for who in ("octavo", "nanoGPT"):
                    cache = data / f"{number}-{who}-{compiled}"
                    for state in ("empty", "filled"):
                        out = cache / state
                        out.mkdir(parents=True)
                        if who == "octavo":
                            command = octavo(data, out, compiled)
                        else:
                            command = nanogpt(clone, data, out, compiled)
                        what = f"{who}, {'compiled' if compiled else 'eager'}, cache {state}"
                        found.setdefault(what, []).append(seconds(command, cache, out))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return found


def octavo(data: Path, out: Path, compiled: bool) -> Command:
    """`octavo train`, which writes a line a step."""
    sizes = {name: getattr(SHAPE, name) for name in ("n_layer", "n_head", "d_model", "block_size")}
    settings = {f"model.{name}": of for name, of in sizes.items()}
    settings |= {"model.position": "learned", "model.norm": "layernorm", "model.mlp": "gelu"}
    settings |= {"data.tokenizer": "char", "train.micro_batch_size": SHAPE.rows, "log.every": 1}
    settings |= {"train.device": "cpu", "train.compile": str(compiled).lower()}
    words = [sys.executable, "-m", "octavo", "train", str(data / "text.txt")]
    words += [f"{name}={of}" for name, of in settings.items()] + ["--out", str(out / "run")]
    return Command(words, data, out / "run" / "metrics.jsonl", '"event": "train"')


def nanogpt(clone: Path, data: Path, out: Path, compiled: bool) -> Command:
    """nanoGPT's train.py, which prints a line a step."""
    settings = {"n_layer": SHAPE.n_layer, "n_head": SHAPE.n_head, "n_embd": SHAPE.d_model}
    settings |= {"block_size": SHAPE.block_size, "batch_size": SHAPE.rows, "eval_iters": 1}
    settings |= {"gradient_accumulation_steps": 1, "device": "cpu", "dtype": "float32"}
    settings |= {"compile": compiled, "dataset": data, "out_dir": out}
    words = [sys.executable, "-u", "train.py", *(f"--{name}={of}" for name, of in settings.items())]
    return Command(words, clone, out / "printed", "iter 0:")


def seconds(command: Command, cache: Path, out: Path) -> float:
    """Until the first step; then the command is ended."""
    caches = {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    with (out / "printed").open("w") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(
            command.words,
            cwd=command.cwd,
            env={**os.environ, **caches},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not (command.written.exists() and command.mark in command.written.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"error: it ended too soon: {(out / 'printed').read_text()}")
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and the compiler's processes
        process.wait()


def prepare_nanogpt(text: Path, folder: Path) -> None:
    """The text as nanoGPT's preparation leaves it."""
    ids = np.frombuffer(text.read_bytes(), np.uint8).astype(np.uint16) - ord("!")
    ids[:-50_000].tofile(folder / "train.bin")
    ids[-50_000:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": SHAPE.vocab_size}))
