"""The one training loop: pretraining, fine-tuning and everything between are this `train`.

Every draw is keyed by seed, step and row, so what happens at a step depends on nothing but the
configuration, the text and the weights: a resumed run is bit for bit the undisturbed one.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from octavo import disk
from octavo.checkpoint import Run, refuse_occupied
from octavo.config import Config
from octavo.errors import ConfigError, Preempted
from octavo.language_model import choose_device
from octavo.training.display import Display
from octavo.training.judge import read_hellaswag
from octavo.training.keeper import Keeper, due
from octavo.training.learner import Learner, build_learner, optimizer_step, restore
from octavo.training.metrics import MetricsLog, last_event
from octavo.training.parallel import Ranks, joined
from octavo.training.source import Source
from octavo.training.task import Task, check_resumable, check_same_text, prepare


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: ``reason`` is "finished" or "early stop"."""

    run: Path
    step: int
    best_step: int
    best_val_loss: float | None
    reason: str


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    quiet: bool = False,
    began: float | None = None,
    source: Source | None = None,
) -> TrainResult:
    """Train a model into the run directory ``out``; with ``resume`` go on with the run there.

    ``train.budget`` counts from ``began``, a `time.monotonic`; None: from now. A ``source`` is a
    new run's text, where it was read before.

    Ctrl-C and SIGTERM save and raise `Preempted`; a second one stops at once. Raises `ConfigError`
    where ``out`` holds a run and ``resume`` is false, `NonFiniteError` after
    ``train.max_bad_steps`` bad steps in a row, `ResourceError` when the disk stays full.
    """
    began = time.monotonic() if began is None else began
    with contextlib.ExitStack() as stack:
        device = choose_device(config.train.device)
        ranks = stack.enter_context(joined(device))
        display = stack.enter_context(Display(quiet or not ranks.leads))
        run, task = _open(config, Path(out), resume, device.type, ranks, source)
        if source is None:
            display.say(task.data["description"])
        hellaswag = read_hellaswag(task)
        learner = build_learner(task, device, display, ranks)
        if run is None:  # only now that nothing can be wrong with what was asked for
            run = ranks.first(
                lambda: Run.create(out, task.config, task.tokenizer, files=task.files)
            )
        ranks.first(lambda: stack.enter_context(run.locked()))
        restore(learner, run, display)
        log = MetricsLog(run.path, task.config, silent=not ranks.leads)
        stack.enter_context(contextlib.closing(log))
        keeper = Keeper(learner, run, log, display, hellaswag, began)
        if ranks.first(lambda: _is_over(learner) and last_event(log.path) == "end"):
            display.say(f"{run.path} is finished; more train.max_steps would carry it on")
        else:
            stop = stack.enter_context(_stop_signals(ranks))
            keeper.announce()
            reason = _loop(learner, keeper, stop)
            keeper.end(reason)
            keeper.draw()
            keeper.pack()
        progress = learner.progress
        reason = "finished" if progress.step >= learner.horizon else "early stop"
        result = TrainResult(
            run.path, progress.step, progress.best_step, progress.best_val_loss, reason
        )
    if config.train.draft:
        from octavo.training.draft import train_draft

        train_draft(result.run, quiet=quiet)
    return result


def _loop(learner: Learner, keeper: Keeper, stop: "_Stop") -> str:
    """One round is one optimizer step; whatever else is due follows, saving first."""
    config, progress = learner.task.config, learner.progress
    if progress.step and due(progress.step, config.eval.every):
        keeper.validate()  # a resumed run may have been killed between saving and validating
    if progress.step and due(progress.step, config.eval.hellaswag_every):
        _judge(learner, keeper, stop)
    while not _is_over(learner) and not stop.agreed():
        started = time.perf_counter()
        with_layers = config.log.layers and due(progress.step + 1, config.log.every)
        step = optimizer_step(learner, with_layers)
        if keeper.went_back(step):
            continue
        keeper.step(step, time.perf_counter() - started)
        learner.ranks.hurry()
        if stop.agreed():
            break
        last = progress.step >= learner.horizon
        if last or due(progress.step, config.checkpoint.every):
            keeper.save()  # before anything risky
        if last or due(progress.step, config.eval.every):
            keeper.validate()
        if last or due(progress.step, config.log.sample_every):
            keeper.sample()
        if due(progress.step, config.eval.hellaswag_every):
            _judge(learner, keeper, stop)
    if stop.agreed():
        _say_goodbye(learner, keeper, stop)
    keeper.save(at_last=True)
    keeper.validate()
    _judge(learner, keeper, stop)
    return "finished" if progress.step >= learner.horizon else "early stop"


def _judge(learner: Learner, keeper: Keeper, stop: "_Stop") -> None:
    """By HellaSwag: it may take long and much memory, so the run is saved before."""
    keeper.save()
    if not keeper.judge(lambda: bool(stop.requested)):
        _say_goodbye(learner, keeper, stop)


def _is_over(learner: Learner) -> bool:
    """Whether the last step is done, or too many validations in a row brought nothing better."""
    train, progress = learner.task.config.train, learner.progress
    early = 0 < train.patience <= progress.evals_since_best
    return early or progress.step >= learner.horizon


def _open(
    config: Config, out: Path, resume: bool, device: str, ranks: Ranks, source: Source | None
) -> tuple[Run | None, Task]:
    """The run that is there, None for a new one, and the task as the configuration says."""
    if ranks.size > 1 and config.data.source == "-" and not disk.exists(out):
        raise ConfigError("only one process can read standard input", fix="write it to a file")
    run, task = _found(config, out, resume, device, source)
    ranks.check_equal("configuration, text and run", [str(out), task.config, task.data])
    return run, task


def _found(
    config: Config, out: Path, resume: bool, device: str, source: Source | None
) -> tuple[Run | None, Task]:
    run = Run.find(out)
    if run is None:
        refuse_occupied(out)
        return None, prepare(config, device, out, source=source)
    if not resume:
        raise ConfigError(
            f"{out} already holds a run", fix="go on with --resume, or choose another --out"
        )
    if run.config.data.source is None:
        raise ConfigError(
            f"{out} came from elsewhere, without a text to go on with",
            fix=f"octavo finetune {out} TEXT",
        )
    task = prepare(config, device, run.path, run.tokenizer)
    check_resumable(run.config, task.config)
    check_same_text(task, run.path)
    return run, task


@dataclass
class _Stop:
    """The name of the signal that asked for a stop, once one has."""

    ranks: Ranks
    requested: str = ""

    def agreed(self) -> bool:
        """Whether any process was asked to stop, and so all of them do."""
        return self.ranks.any(bool(self.requested))


@contextlib.contextmanager
def _stop_signals(ranks: Ranks) -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a request; after it they act as before.

    Not so among several processes: they get each signal twice, from the terminal and from torchrun.
    """
    stop = _Stop(ranks)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore_handlers() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = signal.Signals(number).name
        if ranks.size == 1:
            restore_handlers()

    try:
        for number in before:
            signal.signal(number, request)
    except ValueError:  # not the main thread: signals are its caller's business
        yield stop
        return
    try:
        yield stop
    finally:
        restore_handlers()


def _say_goodbye(learner: Learner, keeper: Keeper, stop: _Stop) -> None:
    """End a stopped run: it is saved and can go on."""
    path, progress = keeper.run.path, learner.progress
    keeper.save(at_last=True)
    if stop.requested == "SIGINT":  # who sends SIGTERM kills soon
        keeper.draw()
    raise Preempted(
        f"stopped by {stop.requested or 'a signal'} and saved at step {progress.step:,} of "
        f"{learner.horizon:,}",
        fix=f"go on with: octavo train {path} --resume",
    )
