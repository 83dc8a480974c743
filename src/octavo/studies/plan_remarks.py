"""What looks wrong in a plan: each rule is a function from it to one sentence, or None.

The first rule that speaks is the most urgent. A sentence ends with what to do.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from octavo.config import Config
from octavo.training.memory import ROOM, largest_fitting
from octavo.training.optim import warmup_steps
from octavo.training.task import COMPILE_PAYS_AFTER, Task

if TYPE_CHECKING:
    from octavo.studies.plan import Plan

ARRANGED = ("micro_batch_size", "grad_accum")
WORTH_REPEATING = 4  # epochs; Muennighoff et al. 2023: until then text seen again is as good as new
MANY = 20  # epochs that a model without dropout learns by heart


def remarks_on(task: Task, plan: "Plan") -> list[str]:
    """What every rule has to say."""
    said = (rule(task, plan) for rule in RULES)
    return [sentence for sentence in said if sentence]


def too_little_memory(task: Task, plan: "Plan") -> str | None:
    """The run needs more than is free; names the cheapest settings that would fit."""
    if plan.fits:
        return None
    needs = f"it needs {size(plan.memory.peak)} and {size(plan.memory_free_bytes)} are free here"
    return f"{needs}: {cheapest_fit(task.config, plan)}"


def cheapest_fit(config: Config, plan: "Plan") -> str:
    """Settings that make the same step in less memory, those that cost least first."""
    savings: list[dict[str, Any]] = [{}, {"loss_chunk": 1024}]
    savings.append({"loss_chunk": 256, "grad_checkpoint": True})
    for more in savings:
        lean = dataclasses.replace(config, train=dataclasses.replace(config.train, **more))
        fitting = largest_fitting(lean, plan.conditions, plan.memory_free_bytes * ROOM)
        if fitting is not None:
            more |= {name: getattr(fitting.train, name) for name in ARRANGED}
            settings = " ".join(f"train.{name}={value}" for name, value in more.items())
            return f"{settings.lower()} makes the same step and fits"
    return "no setting makes it fit; choose a smaller model or a machine with more"


def too_little_disk(task: Task, plan: "Plan") -> str | None:
    """The checkpoints do not fit the disk."""
    if plan.disk_bytes <= plan.disk_free_bytes:
        return None
    return (
        f"its checkpoints take {size(plan.disk_bytes)} and {size(plan.disk_free_bytes)} are free: "
        "checkpoint.keep=1, or another --out"
    )


def no_text(task: Task, plan: "Plan") -> str | None:
    """The plan was made without it."""
    return task.data.get("missing")


def less_than_an_epoch(task: Task, plan: "Plan") -> str | None:
    """Rows x tokens x steps are fewer than the text has: S1's 16 x 1,024 x 152,587 of 10 B."""
    if plan.epochs >= 0.95 or not plan.epochs:
        return None
    rows, steps = task.config.train.batch_size, task.config.train.max_steps
    whole = -(-task.batches.windows // rows)
    fixes = f"train.max_steps={whole}"
    if (times := round(1 / plan.epochs)) >= 2:
        fixes += f" or train.grad_accum={task.config.train.grad_accum * times}"
    return (
        f"{rows:,} rows x {plan.tokens_a_step // rows:,} tokens x {steps:,} steps are "
        f"{amount(plan.tokens_in_all)} tokens, {plan.epochs:.0%} of the text's "
        f"{amount(plan.tokens_in_text)}: one epoch is {fixes}"
    )


def too_many_epochs(task: Task, plan: "Plan") -> str | None:
    """The text is seen so often that the model learns it by heart, or nothing more."""
    if plan.epochs > MANY and task.config.model.dropout == 0:
        return (
            f"{plan.epochs:.0f} epochs without dropout: expect overfitting; model.dropout=0.1, "
            "fewer steps or more text"
        )
    if plan.epochs > WORTH_REPEATING:
        return (
            f"{plan.epochs:.1f} epochs: beyond {WORTH_REPEATING} a text teaches less each time; "
            "the best checkpoint is kept, more text would help more"
        )
    return None


def model_too_large_for_text(task: Task, plan: "Plan") -> str | None:
    """Fewer tokens of text than parameters."""
    share = plan.tokens_in_text / plan.parameters_total
    if share >= 1 or not share or task.base is not None:
        return None
    return f"{share:.2g} tokens of text a parameter: a smaller model would do as well"


def warmup_beyond_the_end(task: Task, plan: "Plan") -> str | None:
    """The learning rate never reaches its peak."""
    steps = task.config.train.max_steps
    warmup = warmup_steps(task.config.optim, steps)
    if not steps or warmup < steps:
        return None
    return (
        f"the warmup of {warmup:,} steps is not over when the run is, after {steps:,}: "
        "optim.warmup=0.05"
    )


def saved_at_the_end_only(task: Task, plan: "Plan") -> str | None:
    """No checkpoint before the last step, in a run of some length."""
    every, validated = task.config.checkpoint.every, task.config.eval.every
    steps = task.config.train.max_steps
    if plan.seconds < 600 or 0 < every < steps or (0 < validated < steps and task.val is not None):
        return None
    return f"it is saved at its end only: checkpoint.every={max(steps // 10, 1)}"


def never_validated(task: Task, plan: "Plan") -> str | None:
    """There is no text to validate on."""
    if task.val is not None:
        return None
    return "there is no validation text, so overfitting will not be seen: data.val_fraction=0.1"


def compiled_for_nothing(task: Task, plan: "Plan") -> str | None:
    """Compiling takes longer than it can gain."""
    train, pays = task.config.train, COMPILE_PAYS_AFTER.get(plan.conditions.device, 0.0)
    if train.compile is not True or plan.seconds >= pays:
        return None
    return "torch.compile costs more than it gains in so short a run: train.compile=auto"


def judges_take_time(task: Task, plan: "Plan") -> str | None:
    """HellaSwag is not measured."""
    if task.config.eval.hellaswag is None:
        return None
    return "the time that HellaSwag takes is not counted: eval.hellaswag_items=N bounds it"


RULES = (
    too_little_memory,
    too_little_disk,
    no_text,
    less_than_an_epoch,
    too_many_epochs,
    model_too_large_for_text,
    warmup_beyond_the_end,
    saved_at_the_end_only,
    never_validated,
    compiled_for_nothing,
    judges_take_time,
)


def size(count: float) -> str:
    """Bytes with three digits."""
    return _with_unit(count, (" bytes", " kB", " MB", " GB", " TB"))


def amount(count: float) -> str:
    """A number with three digits: 10 B, 153 k."""
    return _with_unit(count, ("", " k", " M", " B", " T"))


def operations(count: float) -> str:
    """Floating-point operations with three digits."""
    return _with_unit(count, tuple(f" {prefix}FLOP" for prefix in ("", *"kMGTPEZ")))


def _with_unit(count: float, units: tuple[str, ...]) -> str:
    power = 0
    while round(count) >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g}{units[power]}"
