"""The black box: the last steps in a ring, and what was in a step whose loss or gradient leapt.

**The rule.** Loss and gradient norm are looked at by their logarithms. A step spikes that lies more
than ``train.spike_sigmas`` deviations above the median of the last sixteen steps. A deviation is
1.4826 times the median size of the change from one step of the window to the next, over √2: the σ
of a normal law, but neither a falling curve nor another outlier makes it wider. It is no less than
0.02 for the loss and 0.2 for the norm: with six of them 13 % and three times the median are enough.
While a value stays up it is the same spike. What is not finite needs no window; only a gradient
that a loss scaler has made overflow is the scaler's own business.

A step is looked at before its update, so the report tells of the weights that met the rows. The
ring is part of a checkpoint: a resumed run sees what the undisturbed one would have seen.
"""

import contextlib
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from octavo.adapting.classify import Classifier
from octavo.errors import first_line
from octavo.evaluating.perplexity import token_nats
from octavo.model.gpt import GPT
from octavo.text.batches import Batches, shuffled
from octavo.training.sharded import by_first

if TYPE_CHECKING:
    from octavo.training.learner import Learner
    from octavo.training.task import Task

Reading = dict[str, Any]
"""A step in the ring: step, row (its first), loss, grad_norm, lr, scale, layers, spike."""

MIN_READINGS = 16
LEAST = {"loss": 0.02, "grad_norm": 0.2}  # deviation: on a smooth curve each ripple is no spike
TO_SIGMA = 1.4826  # median distance of a normal law from its median to its standard deviation
MOST_REWINDS = 3  # in a row; what comes back with other rows is not the rows' fault
MOST_ROWS, HARDEST = 5, 5  # rows with their text in a report, tokens named in each
ROW_STANDS_OUT = 4  # deviations above the rows' median
BATCH_TOKENS = 2048  # looked at together: few, for the training step's own memory is still held


@dataclass(frozen=True)
class Spike:
    """A step that leapt."""

    rewinds: int
    """0 where it was taken; else it is to be gone back from, for so many times in a row."""
    name: str
    """Of its report, without a suffix."""
    report: dict[str, Any]
    """What is known: its step, what leapt, where it began, its rows, the steps before it."""


def watch(
    learner: "Learner", row: int, lr: float, loss: float, grad_norm: float, layers: dict[str, float]
) -> Spike | None:
    """Put a step that is about to be taken into the ring; what is wrong with it, if it begins here.

    ``row`` is the first of its ``batch_size`` rows, ``layers`` its gradient norms by layer. Draws
    no random number and changes nothing but ``learner.progress.recent``.
    """
    train, progress = learner.task.config.train, learner.progress
    if not train.spike_window:
        return None
    reading: Reading = {"step": progress.step + 1, "row": row, "lr": lr}
    reading |= {"loss": _finite(loss), "grad_norm": _finite(grad_norm)}
    reading["scale"] = learner.scaler.get_scale() if learner.scaler.is_enabled() else None
    reading["layers"] = {name: _finite(float(f"{norm:.4g}")) for name, norm in layers.items()}
    recent = progress.recent
    what = spiking(recent, reading, train.spike_sigmas)
    reading["spike"] = bool(what)
    progress.recent = [*recent, reading][-train.spike_window :]
    if not what or (recent and recent[-1]["spike"]):
        return None
    return _investigate(learner, recent, reading, what)


def spiking(recent: Sequence[Reading], reading: Reading, sigmas: float) -> str:
    """What of ``reading`` leaps by the module's rule, in words; empty where nothing does."""
    if reading["loss"] is None:
        return "the loss is not finite"
    if reading["grad_norm"] is None:
        return "" if reading["scale"] is not None else "the gradient is not finite"
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        before = [other[key] for other in recent if other[key] is not None]
        if len(before) >= MIN_READINGS:
            height, median = height_of(before, reading[key], LEAST[key])
            if height > sigmas:
                return f"{name} {reading[key]:.4g} is {height:.1f} σ above its median {median:.4g}"
    return ""


def height_of(before: Sequence[float], value: float, least: float) -> tuple[float, float]:
    """How many deviations ``value`` lies above the median of the steps ``before`` it, and that."""
    logs = [_log(loss) for loss in before]
    changes = [abs(b - a) / math.sqrt(2) for a, b in itertools.pairwise(logs)]
    median = statistics.median(logs[-MIN_READINGS:])
    return (_log(value) - median) / _sigma(changes, least), math.exp(median)


def _standing_out(losses: np.ndarray) -> np.ndarray:
    """Which of the rows' losses (N,) lie far above their median, or are not finite; bool (N,)."""
    out = ~np.isfinite(losses)
    if not out.all():
        logs = np.array([_log(loss) for loss in losses[~out]])
        away = logs - np.median(logs)
        out[~out] = away > ROW_STANDS_OUT * _sigma(np.abs(away), LEAST["loss"])
    return out


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


def _sigma(distances: Sequence[float] | np.ndarray, least: float) -> float:
    """The standard deviation of a normal law whose distances from its median these are."""
    return max(TO_SIGMA * statistics.median(distances), least)


def _investigate(
    learner: "Learner", recent: Sequence[Reading], reading: Reading, what: str
) -> Spike:
    """Which rows it was and in which layer it began; a failure to find out does no harm."""
    train, progress = learner.task.config.train, learner.progress

    def look(whole: "Learner") -> tuple[dict[str, Any], dict[str, float]]:
        peaks: dict[str, float] = {}
        try:
            with whole.autocast(), _watched(whole.model, whole.body) as peaks:
                return _look_at_rows(whole, reading["row"]), peaks
        except (MemoryError, RuntimeError) as error:  # the latter is what torch raises
            return {"unknown": first_line(error, "out of memory")}, peaks

    rows, peaks = by_first(learner, look)
    shortly_after = progress.step < progress.rewound_from + train.spike_window
    before = progress.rewinds if shortly_after else 0  # how often the run has gone back from here
    report = {
        "step": reading["step"],
        "what": what,
        "began": _began(recent, reading, peaks),
        "on_spike": train.on_spike,
        "spike_sigmas": train.spike_sigmas,
        **rows,
        "activations": {name: _finite(peak) for name, peak in peaks.items()},
        "recent": [*recent, reading],
    }
    return Spike(
        rewinds=before + 1 if train.on_spike == "rewind" and before < MOST_REWINDS else 0,
        name=f"step-{reading['step']:08d}" + (f"-{before + 1}" if before else ""),
        report=report,
    )


@contextlib.contextmanager
def _watched(model: GPT | Classifier, body: GPT) -> Iterator[dict[str, float]]:
    """The largest absolute value that leaves each layer meanwhile, in their order."""
    peaks: dict[str, float] = {}

    def look(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        peak = output.detach().abs().max().item()
        peaks[name] = float(np.maximum(peaks.get(name, 0.0), peak))  # NaN stays NaN

    blocks = {f"blocks.{i}": block for i, block in enumerate(body.blocks)}
    layers: dict[str, nn.Module] = {"tok_emb": body.tok_emb, **blocks, "norm_f": body.norm_f}
    layers["lm_head"] = model.lm_head
    handles = [layers[name].register_forward_hook(partial(look, name)) for name in layers]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def _look_at_rows(learner: "Learner", first: int) -> dict[str, Any]:
    """The loss of each row of the step, without dropout, and the text of the worst."""
    task = learner.task
    x, y = task.batches.rows(first, task.config.train.batch_size)
    nats = token_nats(learner.model, x, y, BATCH_TOKENS, task.mask_id)
    losses = nats.sum(1, dtype=np.float64) / np.maximum((y != -100).sum(1), 1)
    out = _standing_out(losses)
    order = np.argsort(-np.nan_to_num(losses, nan=np.inf, posinf=np.inf), kind="stable")
    return {
        "first_row": first,
        "losses": [_finite(float(loss)) for loss in losses],
        "standing_out": [first + int(i) for i in order if out[i]],
        "worst": [
            {"row": first + int(i), "loss": _finite(float(losses[i])), "stands_out": bool(out[i])}
            | _text_of(task, first + int(i), x[i], y[i], nats[i])
            for i in order[:MOST_ROWS]
        ],
    }


def _text_of(
    task: "Task", row: int, x: np.ndarray, y: np.ndarray, nats: np.ndarray
) -> dict[str, Any]:
    """Where a row stands in the data, what it says, and its hardest tokens."""
    learned = np.flatnonzero(y != -100)
    end = int(learned[-1]) + 1 if len(learned) else len(x)
    labels, tokenizer = task.config.finetune.labels, task.tokenizer
    ids = x[:end].tolist() + ([] if labels else [int(y[end - 1])])
    hardest = sorted(learned, key=lambda i: -np.nan_to_num(nats[i], nan=np.inf))[:HARDEST]

    def word(target: int) -> str | int:
        if labels:
            return labels[target]
        return tokenizer.decode([target]) if tokenizer else target

    return {
        "where": _where(task, row),
        "text": tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids)),
        "hardest": [
            {"position": int(i), "target": word(int(y[i])), "nats": _finite(float(nats[i]))}
            for i in hardest
        ],
    }


def _where(task: "Task", row: int) -> str:
    if isinstance(task.batches, Batches):
        start = int(task.batches.starts(row, 1)[0])
        return f"tokens {start:,} to {start + task.batches.block_size:,} of the text"
    index = int(shuffled(np.array([row]), task.batches.windows, task.batches.seed)[0])
    return f"example {index + 1:,} of {task.batches.windows:,}"


def _began(recent: Sequence[Reading], reading: Reading, peaks: Mapping[str, float]) -> str:
    """The layer where it began, and how one knows."""
    for name, peak in peaks.items():
        if not math.isfinite(peak):
            return f"{name}: the first whose activations are not finite"
    layers: dict[str, float | None] = reading["layers"]
    if bad := [name for name, norm in layers.items() if norm is None]:
        blocks = [name for name in layers if name in bad and name.startswith("blocks.")]
        where = blocks[-1] if blocks else bad[-1]
        return f"{shown(where)}: on the way back the first whose gradient is not finite"
    if not (jumps := jumps_of(recent, reading)):
        return ""
    name, times = max(jumps.items(), key=lambda pair: pair[1])
    return f"{shown(name)}: its gradient norm is {times:.3g} times its median, the most of all"


def shown(layer: str) -> str:
    """A layer's name for people."""
    return "embeddings, head" if layer == "rest" else layer


def jumps_of(recent: Sequence[Reading], reading: Reading) -> dict[str, float]:
    """Each layer's gradient norm as a multiple of its median in the ring."""
    jumps = {}
    for name, norm in reading["layers"].items():
        before = [r["layers"][name] for r in recent if r["layers"].get(name)]
        if before and norm is not None:
            jumps[name] = norm / float(np.median(before))
    return jumps


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
