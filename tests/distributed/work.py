"""What the processes of the tests do; their fork server imports it by name."""

import os
import signal
from pathlib import Path
from typing import Any

from crew import CPU

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.training import learner as learner_module
from octavo.training import loop
from octavo.training.display import Display
from octavo.training.learner import Learner, build_learner, optimizer_step, restore
from octavo.training.parallel import Ranks, joined
from octavo.training.sharded import full
from octavo.training.task import prepare


def learner_of(config: Config, ranks: Ranks) -> Learner:
    return build_learner(prepare(config, "cpu", Path("none")), CPU, Display(quiet=True), ranks)


def steps(config: Config, count: int = 1) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps."""
    with joined(CPU) as ranks:
        learner = learner_of(config, ranks)
        done = [optimizer_step(learner, with_layers=True) for _ in range(count)]
        return [(step.loss, step.grad_norm) for step in done]


def layers(config: Config) -> dict[str, float]:
    """The gradient norms of the first step by layer."""
    with joined(CPU) as ranks:
        return optimizer_step(learner_of(config, ranks), with_layers=True).layers


def restored(config: Config, out: Path) -> dict[str, Any]:
    """Weights and optimizer's tensors, whole, of a learner that took up the run."""
    with joined(CPU) as ranks:
        learner = learner_of(config, ranks)
        restore(learner, Run.open(out), Display(quiet=True))
        weights, averages = learner.tensors()
        return {name: full(tensor).detach() for name, tensor in (weights | averages).items()}


def rows_seen(config: Config, count: int) -> list[int]:
    """The first token's place of each row that this process learns from."""
    with joined(CPU) as ranks:
        learner, seen = learner_of(config, ranks), []
        batches = learner.task.batches
        plain = batches.rows

        def rows(first: int, count: int) -> Any:
            seen.extend(range(first, first + count))
            return plain(first, count)

        batches.rows = rows
        for _ in range(count):
            optimizer_step(learner)
        return seen


def run(config: Config, out: Path, resume: bool = False) -> dict[str, Any]:
    """A whole run, or the rest of one."""
    return vars(loop.train(config, out, resume=resume, quiet=True))


def aloud(config: Config, out: Path) -> None:
    """A whole run that says what it does."""
    loop.train(config, out)


def stopped(config: Config, out: Path, after: int, rank: int) -> None:
    """A run of which one process gets SIGTERM in a step."""
    _meanwhile(after, rank, lambda: signal.raise_signal(signal.SIGTERM))
    loop.train(config, out, quiet=True)


def failing(config: Config, out: Path, after: int, rank: int) -> None:
    """A run in which one process fails."""
    _meanwhile(after, rank, _fail)
    loop.train(config, out, quiet=True)


def _fail() -> None:
    raise ArithmeticError("the moon was full")


def _meanwhile(after: int, rank: int, do: Any) -> None:
    plain = learner_module.optimizer_step

    def step(learner: Learner, with_layers: bool = False) -> Any:
        done = plain(learner, with_layers)
        if learner.progress.step == after and int(os.environ["RANK"]) == rank:
            do()
        return done

    loop.optimizer_step = step


def spiking(config: Config, out: Path, at: int) -> None:
    """A run whose loss is a thousand times as high in one step, the first time it is done."""
    plain = learner_module.build_learner

    def build(*args: Any) -> Learner:
        learner = plain(*args)
        loss = learner.loss

        def leaping(*args: Any) -> Any:
            progress = learner.progress
            leaps = progress.step + 1 == at and not progress.skipped_rows
            return loss(*args) * (1000.0 if leaps else 1.0)

        learner.loss = leaping
        return learner

    loop.build_learner = build
    loop.train(config, out, quiet=True)
