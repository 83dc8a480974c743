"""The doctor's rules about a run: each a function from facts to one finding, or None.

The mini transformer's page ends with twenty pieces of advice under "Troubleshooting"; each is one
rule, which speaks only where its advice would help. What comes first in the list is more urgent, so
the first finding is the one thing to do.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

from octavo.config import Config
from octavo.model.counts import cache_bytes
from octavo.studies.doctor import Finding, Machine, RunFacts
from octavo.studies.doctor_machine import MACHINE_RULES
from octavo.studies.plan_remarks import MANY, amount, size
from octavo.training.memory import ROOM, largest_fitting, training_memory
from octavo.training.optim import warmup_steps
from octavo.training.task import COMPILE_PAYS_AFTER

LR_BAND = (1e-4, 1e-3)  # where the page would look for a learning rate
LITTLE_DROPOUT = 0.2  # the most it would use, and that for small texts
WARMUP = 0.05  # the least, as a share of the run
FEW_TOKENS = {"cpu": 1024, "cuda": 16_384}  # in a pass, below which the device idles
LARGE_MODEL = 10_000_000  # parameters, to begin with


def diagnose(machine: Machine, run: RunFacts | None = None) -> list[Finding]:
    """What every rule found, what blocks first, then in the rules' order."""
    said = [(rule.__name__, rule(machine)) for rule in MACHINE_RULES]
    if run is not None:
        said = [(rule.__name__, rule(machine, run)) for rule in RUN_RULES] + said
    findings = [dataclasses.replace(found, rule=name) for name, found in said if found]
    return sorted(findings, key=lambda finding: not finding.blocks)


# Out of memory: five ways, each named where it alone would make the run fit


def smaller_batches(machine: Machine, run: RunFacts) -> Finding | None:
    """The same step in smaller passes."""
    if _fits(machine, run):
        return None
    found = largest_fitting(run.config, run.conditions, machine.memory_free * ROOM)
    if found is None:
        return None
    settings = f"train.micro_batch_size={found.train.micro_batch_size}"
    fix = f"{settings} train.grad_accum={found.train.grad_accum} makes the same step"
    return Finding(_needs(machine, run), fix)


def half_precision_memory(machine: Machine, run: RunFacts) -> Finding | None:
    """Activations in two bytes."""
    half = dataclasses.replace(run.conditions, half=True)
    possible = machine.device != "cpu" and not run.conditions.half
    if _fits(machine, run) or not possible:
        return None
    if not _fits(machine, dataclasses.replace(run, conditions=half)):
        return None
    return Finding(_needs(machine, run), "train.precision=bf16 fits")


def gradient_checkpointing(machine: Machine, run: RunFacts) -> Finding | None:
    """Activations computed again instead of kept."""
    if _fits(machine, run) or not _fits(machine, _with(run, "train", grad_checkpoint=True)):
        return None
    fix = "train.grad_checkpoint=true fits, for about a third more time"
    return Finding(_needs(machine, run), fix)


def shorter_context(machine: Machine, run: RunFacts) -> Finding | None:
    """Half the context, where a single row does not fit."""
    if _fits(machine, run) or smaller_batches(machine, run):
        return None
    half = max(run.config.model.block_size // 2, 1)
    rows = {"micro_batch_size": 1, "grad_accum": run.config.train.batch_size}
    if not _fits(machine, _with(_with(run, "model", block_size=half), "train", **rows)):
        return None
    fix = f"model.block_size={half} train.micro_batch_size=1 fits"
    return Finding(_needs(machine, run), fix)


def smaller_model(machine: Machine, run: RunFacts) -> Finding | None:
    """Weights, gradients and the optimizer's averages alone are too much."""
    need = training_memory(run.config, run.conditions)
    state = need.weights + need.gradients + need.optimizer
    if state <= machine.memory_free * ROOM:
        return None
    what = f"weights, gradients and averages alone take {size(state)}"
    fix = f"a smaller model.d_model or model.n_layer; {size(machine.memory_free)} are free"
    return Finding(what, fix, blocks=True)


# Loss not decreasing


def learning_rate(machine: Machine, run: RunFacts) -> Finding | None:
    """It jumps, or it stays and the rate is outside the usual band."""
    lr = run.config.optim.lr
    if run.skipped or _spikes(run):
        what = f"the loss jumps ({run.skipped} steps skipped) at a learning rate of {lr:g}"
        return Finding(what, f"optim.lr={lr / 3:.1g}")
    if _stuck(run) and not LR_BAND[0] <= lr <= LR_BAND[1]:
        nearer = min(LR_BAND, key=lambda bound: abs(bound - lr))
        what = f"the loss does not fall at a learning rate of {lr:g}"
        return Finding(what, f"optim.lr={nearer:g}; 1e-4 to 1e-3 is usual")
    return None


def longer_warmup(machine: Machine, run: RunFacts) -> Finding | None:
    """It rises in the first tenth of the run, after less warmup than usual."""
    steps = run.config.train.max_steps
    early = [loss for step, loss in run.losses if step <= steps / 10]
    warmup = warmup_steps(run.config.optim, steps)
    if len(early) < 3 or max(early[1:]) < 1.1 * early[0] or warmup >= WARMUP * steps:
        return None
    what = f"the loss rises at first, after a warmup of {warmup:,} steps"
    return Finding(what, "optim.warmup=0.1")


def check_data(machine: Machine, run: RunFacts) -> Finding | None:
    """It stays though the rate is usual: then it is the text."""
    if not _stuck(run) or not LR_BAND[0] <= run.config.optim.lr <= LR_BAND[1]:
        return None
    source = run.config.data.source
    what = "the loss does not fall though the learning rate is usual: look at the text"
    where = source if isinstance(source, str) else " ".join(source or [])
    return Finding(what, f"octavo data inspect {where}")


def less_dropout(machine: Machine, run: RunFacts) -> Finding | None:
    """So much is dropped that the model learns slowly: validation, without it, is better."""
    dropout = run.config.model.dropout
    behind = bool(run.validations) and _last(run.losses) > _last(run.validations)
    if dropout <= LITTLE_DROPOUT or not (_stuck(run) or behind):
        return None
    what = f"dropout {dropout:g} holds the training back"
    return Finding(what, "model.dropout=0.1")


def smaller_model_first(machine: Machine, run: RunFacts) -> Finding | None:
    """A large model that does not learn is a slow way of finding out why."""
    if not _stuck(run) or run.parameters < LARGE_MODEL:
        return None
    what = f"a model of {amount(run.parameters)} parameters does not learn"
    return Finding(what, "find out why with a smaller one: quickstart.yaml")


# Poor generation quality


def overfitting(machine: Machine, run: RunFacts) -> Finding | None:
    """Validation rises while the training loss falls."""
    if not _overfits(run):
        return None
    best = min(run.validations, key=lambda point: point[1])
    what = f"validation was best at step {best[0]:,} ({best[1]:.3f}) and is {_rise(run)} since"
    return Finding(what, "model.dropout=0.1 train.patience=3; the best is kept")


def more_text(machine: Machine, run: RunFacts) -> Finding | None:
    """The same text too often, or less of it than the model has parameters."""
    if not run.tokens_in_text or not _overfits(run):
        return None
    epochs, share = run.tokens_seen / run.tokens_in_text, run.tokens_in_text / run.parameters
    if epochs < MANY and share >= 1:
        return None
    what = f"{amount(run.tokens_in_text)} tokens of text, seen {epochs:.1f} times, are little"
    return Finding(what, "train on more text, or with a smaller model")


def train_longer(machine: Machine, run: RunFacts) -> Finding | None:
    """Validation still fell when it was over."""
    values = [loss for _, loss in run.validations]
    if not run.finished or len(values) < 2 or values[-1] > 0.99 * values[-2]:
        return None
    fell = 1 - values[-1] / values[-2]
    what = f"validation still fell by {fell:.0%} when the run ended"
    steps = 2 * run.config.train.max_steps
    return Finding(what, f"octavo train {run.path} train.max_steps={steps}")


def larger_model(machine: Machine, run: RunFacts) -> Finding | None:
    """Nothing more to gain from time, and nothing is learnt by heart."""
    values = [loss for _, loss in run.validations]
    if len(values) < 3 or run.tokens_seen < 100 * run.parameters:
        return None
    flat = abs(values[-1] / values[-3] - 1) < 0.01
    if not flat or _last(run.losses) < 0.97 * values[-1]:
        return None
    what = "validation stands still and is as good as training: the model is full"
    return Finding(what, f"octavo grow {run.path} --out {run.path}-larger")


def sampling(machine: Machine, run: RunFacts) -> Finding | None:
    """What it writes goes round in circles."""
    if repeated(run.sample) < 0.5:
        return None
    what = f"{repeated(run.sample):.0%} of its last sample repeats itself"
    fix = f"octavo generate {run.path} --temperature 0.9 --top-p 0.95 --repetition-penalty 1.2"
    return Finding(what, fix)


# Slow training


def half_precision_speed(machine: Machine, run: RunFacts) -> Finding | None:
    """Matrix products in bf16, where they are faster; on CPUs autocast costs more than it gains."""
    if machine.device == "cpu" or run.conditions.half or machine.bf16_gain < 1.5:
        return None
    what = f"a bf16 matrix product is {machine.bf16_gain:.1f} times as fast here, this uses fp32"
    return Finding(what, "train.precision=bf16")


def compilation(machine: Machine, run: RunFacts) -> Finding | None:
    """A long run that is not compiled."""
    pays = COMPILE_PAYS_AFTER.get(machine.device)
    if run.config.train.compile is True or machine.compile_problem or pays is None:
        return None
    if run.seconds < pays:
        return None
    what = "a run this long gains from torch.compile, which is off"
    return Finding(what, "train.compile=true")


def larger_batches(machine: Machine, run: RunFacts) -> Finding | None:
    """A pass so small that the device waits for Python."""
    train, width = run.config.train, run.config.model.block_size
    tokens, few = train.micro_batch_size * width, FEW_TOKENS.get(machine.device, 0)
    if tokens >= few:
        return None
    rows = max(few // width, 1)
    larger = _with(run, "train", micro_batch_size=rows)
    if not _fits(machine, larger):
        return None
    what = f"a pass has {tokens:,} tokens, too few to keep the {machine.device} busy"
    passes = max(train.batch_size // rows, 1)
    return Finding(what, f"train.micro_batch_size={rows} train.grad_accum={passes}")


def flash_attention(machine: Machine, run: RunFacts) -> Finding | None:
    """Settings that keep PyTorch from its fused attention."""
    model = run.config.model
    if machine.device == "cpu" and model.dropout and model.block_size >= 256:
        what = f"with dropout a CPU writes all {model.block_size} x {model.block_size} weights out"
        return Finding(what, "model.dropout=0 takes the fused attention")
    if machine.device == "cuda" and not run.conditions.half:
        what = "FlashAttention works in bf16 and fp16, and this uses fp32"
        return Finding(what, "train.precision=bf16")
    return None


def multi_query(machine: Machine, run: RunFacts) -> Finding | None:
    """Keys and values of one text that weigh as much as half the model."""
    model = run.config.model
    cache = cache_bytes(model)
    if model.n_kv_head == 1 or cache < 2 * run.parameters:
        return None
    what = (
        f"the keys and values of one text take {size(cache)}, the model {size(4 * run.parameters)}"
    )
    return Finding(what, "model.n_kv_head=1 in the next model")


RUN_RULES = (
    smaller_model,
    smaller_batches,
    half_precision_memory,
    gradient_checkpointing,
    shorter_context,
    learning_rate,
    longer_warmup,
    less_dropout,
    check_data,
    smaller_model_first,
    overfitting,
    more_text,
    train_longer,
    larger_model,
    sampling,
    half_precision_speed,
    compilation,
    larger_batches,
    flash_attention,
    multi_query,
)


# What the rules ask of a run


def _fits(machine: Machine, run: RunFacts) -> bool:
    return training_memory(run.config, run.conditions).peak <= machine.memory_free * ROOM


def _needs(machine: Machine, run: RunFacts) -> str:
    need = training_memory(run.config, run.conditions).peak
    return f"it needs {size(need)} of memory and {size(machine.memory_free)} are free"


def _with(run: RunFacts, section: str, **changes: Any) -> RunFacts:
    """The run with other settings."""
    changed = dataclasses.replace(getattr(run.config, section), **changes)
    config: Config = dataclasses.replace(run.config, **{section: changed})
    return dataclasses.replace(run, config=config)


def _last(points: list[tuple[int, float]]) -> float:
    """The mean of the last fifth."""
    tail = [value for _, value in points[-max(len(points) // 5, 1) :]]
    return statistics.fmean(tail) if tail else 0.0


def _stuck(run: RunFacts) -> bool:
    """Whether the loss has fallen by less than 3 % over ten logged steps or more."""
    if len(run.losses) < 10:
        return False
    return _last(run.losses) > 0.97 * _last(run.losses[: len(run.losses) // 5])


def _spikes(run: RunFacts) -> bool:
    """Whether it ever rose a quarter above the best before, after the first tenth."""
    late = run.losses[len(run.losses) // 10 :]
    return any(loss > 1.25 * best for best, loss in _with_best(late))


def _with_best(points: list[tuple[int, float]]) -> Iterator[tuple[float, float]]:
    best = float("inf")
    for _, loss in points:
        yield best, loss
        best = min(best, loss)


def _overfits(run: RunFacts) -> bool:
    values = [loss for _, loss in run.validations]
    if len(values) < 3 or values[-1] < 1.02 * min(values):
        return False
    best_step = min(run.validations, key=lambda point: point[1])[0]
    before = [(step, loss) for step, loss in run.losses if step <= best_step]
    return bool(before) and _last(run.losses) < _last(before)


def _rise(run: RunFacts) -> str:
    values = [loss for _, loss in run.validations]
    return f"{values[-1] / min(values) - 1:.0%} worse"


def repeated(text: str, width: int = 3) -> float:
    """The share of a text's runs of three words that stood in it before; 0 for short ones."""
    words = text.split()
    runs = [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) >= 10 else 0.0
