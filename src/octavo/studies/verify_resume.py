"""Proof, with the user's own settings, that a run killed at a random step ends as if it never was.

Two processes train the same configuration; one of them is killed with SIGKILL once and goes on.
Every loss, every validation, the last weights and the optimizer's state must then be the same bit
for bit.
"""

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo import disk
from octavo.checkpoint import Run, refuse_occupied
from octavo.config import Config, to_yaml
from octavo.errors import ConfigError, OctavoError
from octavo.manifest import read_json, to_json
from octavo.reporting.report import read_metrics

RESULT = "verify-resume.json"
COMPARED = {"train": ("loss", "grad_norm", "lr"), "eval": ("val_loss",)}


@dataclass(frozen=True)
class Verdict:
    """What the two runs came to."""

    same: bool
    killed_at: int
    """The last step that the killed run is known to have done."""
    resumed_from: int
    steps: int
    first_difference: int | None
    """The first step whose loss, gradient norm or validation differs; None where none does."""
    undisturbed: dict[str, str]
    """SHA-256 of the last checkpoint's tensors, by file."""
    resumed: dict[str, str]
    seconds: float


def verify_resume(
    config: Config,
    out: Path,
    steps: int,
    seed: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Train ``config`` for ``steps`` steps twice under ``out``, once killed at a random step.

    The verdict is also written into the run that was killed, as verify-resume.json. Raises
    `ConfigError` for fewer than three steps and whatever ended a run that was not killed.
    """
    if steps < 3:
        raise ConfigError(f"{steps} steps leave nothing to kill", fix="give --steps 3 or more")
    started = time.monotonic()
    if config.data.source == "-":
        raise ConfigError("standard input is read only once", fix="name a file")
    refuse_occupied(out)
    recipe = out / "recipe.yaml"
    with disk.errors(f"write into {out}"):
        out.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(recipe, to_yaml(shorten(config, steps)).encode())
    kill_after = random.Random(seed).randint(1, steps - 1)
    say(f"1 of 3: {steps} steps undisturbed")
    _train(recipe, out / "undisturbed")
    say(f"2 of 3: the same, killed after step {kill_after}")
    killed_at = _train_and_kill(recipe, out / "resumed", kill_after)
    say("3 of 3: going on with what is left of it")
    _train(recipe, out / "resumed", "--resume")
    verdict = _compare(out, killed_at, steps, time.monotonic() - started)
    disk.write_atomic(out / "resumed" / RESULT, to_json(dataclasses.asdict(verdict)))
    return verdict


def shorten(config: Config, steps: int) -> Config:
    """The configuration over ``steps`` steps, each logged, a few of them saved and judged."""
    often = max(1, steps // 4)

    def within(every: int) -> int:
        return min(every or steps, often)

    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, max_steps=steps, budget=0.0, draft=False, quantize=None
        ),
        eval=dataclasses.replace(
            config.eval, every=within(config.eval.every), hellaswag=None, hellaswag_every=0
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every=within(config.checkpoint.every)),
        log=dataclasses.replace(config.log, every=1, sample_every=0, to=[]),
    )


def _command(recipe: Path, out: Path, *more: str) -> list[str]:
    words = ["train", str(recipe), "--out", str(out), "--quiet", *more]
    return [sys.executable, "-m", "octavo", *words]


def _train(recipe: Path, out: Path, *more: str) -> None:
    done = subprocess.run(_command(recipe, out, *more), capture_output=True, text=True)
    if done.returncode:
        raise _failure(done.stderr, done.returncode)


def _train_and_kill(recipe: Path, out: Path, kill_after: int) -> int:
    """Kill the run once it has logged step ``kill_after``; returns the last step it logged."""
    process = subprocess.Popen(
        _command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while _last_step(out) < kill_after and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.kill()
    _, errors = process.communicate()
    if process.returncode > 0:
        raise _failure(errors, process.returncode)
    return _last_step(out)


def _last_step(out: Path) -> int:
    """The newest step in metrics.jsonl; 0 before there is one."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue  # the line that is being written
    return 0


def _failure(errors: str, code: int) -> OctavoError:
    """What the child process said, with its exit code."""
    last = errors.strip().splitlines()[-1] if errors.strip() else f"it ended with {code}"
    error = OctavoError(last.removeprefix("error: "))
    error.exit_code = code if code > 0 else 1
    return error


def _compare(out: Path, killed_at: int, steps: int, seconds: float) -> Verdict:
    undisturbed, resumed = _losses(out / "undisturbed"), _losses(out / "resumed")
    differing = [at[0] for at in undisturbed if resumed.get(at) != undisturbed[at]]
    hashes = [_hashes(Run.open(out / name)) for name in ("undisturbed", "resumed")]
    starts = [event for event in read_metrics(out / "resumed") if event["event"] == "start"]
    return Verdict(
        same=not differing and hashes[0] == hashes[1],
        killed_at=killed_at,
        resumed_from=int(starts[-1].get("resumed_from", 0)),
        steps=steps,
        first_difference=min(differing, default=None),
        undisturbed=hashes[0],
        resumed=hashes[1],
        seconds=round(seconds, 1),
    )


def _losses(run: Path) -> dict[tuple[int, str], tuple[Any, ...]]:
    """What is compared of each step and kind of event; of a step done twice, the last."""
    return {
        (event["step"], kind): tuple(event[name] for name in COMPARED[kind])
        for event in read_metrics(run)
        if (kind := event["event"]) in COMPARED
    }


def _hashes(run: Run) -> dict[str, str]:
    assert run.latest is not None
    files = read_json(run.latest / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
