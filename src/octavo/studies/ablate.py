"""Small fair studies: every combination of some settings, under several seeds, judged alike.

Each arm is an ordinary run, so a study that was stopped goes on where it stopped. Seeds are the
outer loop: what is finished is a whole table, or nearly. All arms get the same tokens, or the same
time: then a probe measures each arm's speed and ``train.max_steps`` follows from it, so that every
learning-rate schedule still ends. What came of it is read by `ablation`.
"""

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.disk import errors, write_atomic
from octavo.errors import ConfigError, Preempted
from octavo.language_model import choose_device
from octavo.manifest import read_json, to_json
from octavo.model.counts import count_parameters
from octavo.settings import parse_yaml, shown
from octavo.text.token_files import watched
from octavo.training.display import Display
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.loop import train
from octavo.training.metrics import last_event
from octavo.training.request import read_request
from octavo.training.task import Task, flatten, prepare

GRID = (
    "model.position=learned,rope",
    "model.mlp=gelu,swiglu",
    "model.norm=layernorm,rmsnorm",
)
STUDY = "study.json"  # what was asked for, and the steps of each arm
TOKENIZER = "tokenizer.json"  # of a BPE learned from the text: once, not by every run
PROBE_SECONDS, PROBE_ROUNDS = 1.0, 5
UNDISTURBED = 0.1  # quantile of the steps' times that counts: other work only makes steps slower
DECIDED_HERE = {"train.seed": "--seeds", "train.max_steps": "--equal and --minutes"}

Vary = dict[str, list[Any]]
"""Settings and the values each is given."""


@dataclass(frozen=True)
class Arm:
    """One combination: what it is called, its values, and a run of it without a seed yet."""

    name: str
    values: dict[str, Any]
    task: Task

    @property
    def parameters(self) -> int:
        """How many it has."""
        return count_parameters(self.task.config.model).total

    @property
    def tokens_a_step(self) -> int:
        """What one optimizer step sees."""
        config = self.task.config
        return config.train.batch_size * config.model.block_size


@dataclass(frozen=True)
class Study:
    """What is compared: arms, the seeds of each, and how many steps each arm makes."""

    out: Path
    vary: Vary
    arms: list[Arm]
    seeds: list[int]
    equal: Literal["tokens", "time"]
    minutes: float | None = None
    """Training time of each run, where time is what is equal."""
    steps: dict[str, int] = dataclasses.field(default_factory=dict)

    def run(self, arm: Arm, seed: int) -> Path:
        """Where a run of the study lies."""
        return self.out / arm.name / f"seed-{seed}"

    def config(self, arm: Arm, seed: int) -> Config:
        """The settings of a run of the study."""
        config = arm.task.config
        steps = self.steps[arm.name]
        train = dataclasses.replace(config.train, seed=seed, max_steps=steps, budget=0.0)
        log = dataclasses.replace(config.log, sample_every=0)
        data = config.data
        if (self.out / TOKENIZER).exists():
            data = dataclasses.replace(data, tokenizer=str((self.out / TOKENIZER).resolve()))
        return dataclasses.replace(config, train=train, log=log, data=data)

    @property
    def jobs(self) -> list[tuple[Arm, int]]:
        """Every run, seed by seed: a study that is stopped has about as many of each arm."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def read_vary(words: Sequence[str], fixed: Sequence[str]) -> Vary:
    """``section.name=a,b`` words as settings and values; without any the usual grid.

    ``fixed`` are the settings given for all arms, which the usual grid leaves alone. Raises
    `ConfigError` for a word that varies nothing.
    """
    named = {word.partition("=")[0] for word in fixed}
    words = words or [word for word in GRID if word.partition("=")[0] not in named]
    vary: Vary = {}
    for word in words:
        key, _, text = word.partition("=")
        values = parse_yaml(f"[{text}]", f"in --vary {word}")
        if key in DECIDED_HERE:
            raise ConfigError(
                f"{key} is not for --vary", fix=f"it follows from {DECIDED_HERE[key]}"
            )
        if key in vary or key in named:
            raise ConfigError(f"{key} is given twice", fix="vary it, or set it for all arms")
        if len(values) < 2 or any(value in values[:n] for n, value in enumerate(values)):
            raise ConfigError(
                f"--vary {word} is nothing to compare",
                fix=f"give two values or more, apart by commas: {key}=A,B",
            )
        vary[key] = values
    if not vary:
        raise ConfigError("nothing is left to vary", fix="say what with --vary section.name=a,b")
    return vary


def plan_study(
    words: list[str],
    settings: list[str],
    vary: Vary,
    seeds: int,
    out: str | None = None,
    equal: Literal["tokens", "time"] = "tokens",
    minutes: float | None = None,
) -> Study:
    """Build every configuration, read the text, and choose each arm's steps; train nothing.

    Where ``out`` holds a study it must be this one, but for the number of seeds. Raises
    `ConfigError` naming the arm whose settings cannot go together.
    """
    if seeds < 1 or (minutes is not None and (equal != "time" or minutes <= 0)):
        raise ConfigError("--seeds is at least 1, --minutes belongs to --equal time")
    base = read_request(words, settings)
    if base.run is not None or base.config.data.source == "-":
        raise ConfigError(
            "a study begins with a configuration or a text, read for every run of it",
            fix="octavo ablate CONFIG.yaml, or octavo ablate my.txt",
        )
    folder = Path(out) if out else Path("runs") / f"ablation-{base.name}"
    arms = _build_arms(words, settings, vary, folder)
    first = base.config.train.seed
    study = Study(folder, vary, arms, [first + n for n in range(seeds)], equal, minutes)
    if (folder / STUDY).exists():
        kept = read_json(folder / STUDY)
        _check_same(kept["asked"], _asked(study), folder)
        return dataclasses.replace(study, steps=kept["steps"])
    strange = [folder] if folder.is_file() else [p for p in folder.glob("*") if p.name != TOKENIZER]
    if strange:
        raise ConfigError(f"{folder} is something else than a study", fix="choose another --out")
    return study


def begin(study: Study) -> Study:
    """Choose each arm's steps and write down what was asked for, unless that is done."""
    if study.steps:
        return study
    study = dataclasses.replace(study, steps=_choose_steps(study))
    with errors(f"begin the study {study.out}"):
        study.out.mkdir(parents=True, exist_ok=True)
        task = study.arms[0].task
        varied = any(key.startswith("data.") for key in study.vary)
        if task.tokenizer and task.config.data.tokenizer == "bpe" and not varied:
            task.tokenizer.save(study.out / TOKENIZER)
    write_atomic(study.out / STUDY, to_json({"asked": _asked(study), "steps": study.steps}))
    return study


def train_runs(study: Study) -> Iterator[tuple[int, str]]:
    """Train what is not trained yet; gives the number of each run that is over, and a line on it.

    Ctrl-C saves, as in `train`.
    """
    count = len(study.jobs)
    for number, (arm, seed) in enumerate(study.jobs, 1):
        path = study.run(arm, seed)
        begun = Run.find(path) is not None
        if begun and last_event(path / "metrics.jsonl") == "end":
            continue
        try:
            result = train(study.config(arm, seed), path, resume=begun, quiet=True)
        except Preempted as stopped:
            done = f"{number - 1} of {count} runs of the study are finished"
            raise Preempted(stopped.what, done, "go on with the same command") from None
        line = f"{number}/{count}  {arm.name}, seed {seed}: {result.step:,} steps"
        yield number, f"{line}, validation {result.best_val_loss or math.nan:.4f}"


def _build_arms(words: list[str], settings: list[str], vary: Vary, out: Path) -> list[Arm]:
    arms: list[Arm] = []
    reads_alike = not any(key.startswith("data.") for key in vary)
    for values in itertools.product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        name = "-".join(_label(key, value) for key, value in chosen.items())
        given = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        tokenizer = arms[0].task.tokenizer if arms and reads_alike else None
        try:
            request = read_request(words, [*settings, *given])
            task = prepare(request.config, "cpu", out, tokenizer)
        except ConfigError as error:
            raise ConfigError(error.what, f"in the arm {name}", error.fix) from None
        if any(task.config == arm.task.config for arm in arms):
            raise ConfigError(f"the arm {name} is the same as another", fix="leave one value out")
        arms.append(Arm(name, chosen, task))
    _check_judgeable(arms)
    return arms


def _check_judgeable(arms: Sequence[Arm]) -> None:
    """Refuse what could be trained but not compared afterwards."""
    if any(arm.task.val is None or arm.task.config.data.kind != "text" for arm in arms):
        raise ConfigError(
            "the arms of a study are judged on a validation text, and there is none",
            fix="set data.val_fraction or data.val_source, with data.kind=text",
        )
    texts = {str(a.task.data.get("val_sha256") or a.task.data["sha256"]): a.name for a in arms}
    if len(texts) > 1:
        named = ", ".join(f"{name} on the SHA-256 {text}" for text, name in texts.items())
        raise ConfigError(
            f"the arms validate on different texts: {named}", fix="set data.val_source"
        )


def _label(key: str, value: Any) -> str:
    """A value as part of a name: rope says what it is, 64 needs to say of what."""
    plain = isinstance(value, str) and value.isidentifier()
    return re.sub(r"[^\w.+]+", "_", value if plain else f"{key.split('.')[-1]}_{value}")


def _asked(study: Study) -> dict[str, Any]:
    """What a study must have in common with the one that is there to be the same."""
    free = ("train.seed", "train.compile", "train.device", "log.")
    asked: dict[str, Any] = {"equal": study.equal, "minutes": study.minutes, "arms": {}}
    for arm in study.arms:
        settings = flatten(arm.task.config).items()
        kept = {key: value for key, value in settings if not key.startswith(free)}
        asked["arms"][arm.name] = kept | {"text": arm.task.data["sha256"]}
    return json.loads(json.dumps(asked))


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    changed = [f"{k} {old[k]} -> {new[k]}" for k in ("equal", "minutes") if old[k] != new[k]]
    if old["arms"].keys() != new["arms"].keys():
        changed.append(f"arms {', '.join(old['arms'])} -> {', '.join(new['arms'])}")
    for arm in old["arms"].keys() & new["arms"].keys():
        before, after = old["arms"][arm], new["arms"][arm]
        changed += [
            f"{key} {shown(before.get(key))} -> {shown(after[key])}"
            for key in after
            if before.get(key) != after[key]
        ]
    if changed:
        raise ConfigError(
            f"another study was begun there: {', '.join(dict.fromkeys(changed))}",
            f"in {folder}",
            "ask as then, or choose another --out",
        )


def _choose_steps(study: Study) -> dict[str, int]:
    """Each arm's steps, for the same tokens or the same seconds as the first arm's settings say."""
    first = study.arms[0]
    planned = first.task.config.train.max_steps
    if study.equal == "tokens":
        tokens = planned * first.tokens_a_step
        return {arm.name: max(round(tokens / arm.tokens_a_step), 1) for arm in study.arms}
    took = measure_steps(study.arms)
    seconds = study.minutes * 60 if study.minutes else planned * took[first.name]
    return {arm.name: max(int(seconds / took[arm.name]), 1) for arm in study.arms}


def measure_steps(arms: Sequence[Arm]) -> dict[str, float]:
    """Seconds that an undisturbed step of each arm takes, measured in rounds over all arms."""
    found: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for arm in watched([*arms] * PROBE_ROUNDS, len(arms) * PROBE_ROUNDS, "measuring the speed"):
        device = choose_device(arm.task.config.train.device)
        learner = build_learner(arm.task, device, Display(quiet=True))
        optimizer_step(learner)
        started = before = time.perf_counter()
        while before - started < PROBE_SECONDS:
            optimizer_step(learner)
            now = time.perf_counter()
            found[arm.name].append(now - before)
            before = now
    return {name: float(np.quantile(steps, UNDISTURBED)) for name, steps in found.items()}
