"""What looks wrong in a plan: one sentence each, which ends with what to do."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from octavo.config import Config
from octavo.studies.readable import amount, size
from octavo.training.memory import ROOM, largest_fitting
from octavo.training.optim import warmup_steps
from octavo.training.task import COMPILE_PAYS_AFTER, Task

if TYPE_CHECKING:
    from octavo.studies.plan import Plan

ARRANGED = ("micro_batch_size", "grad_accum")
WORTH_REPEATING = 4  # epochs; Muennighoff et al. 2023: until then text seen again is as good as new
MANY = 20  # epochs that a model without dropout learns by heart


def remarks_on(task: Task, plan: "Plan") -> list[str]:
    """All of them, the most urgent first."""
    return [*_on_room(task, plan), *_on_text(task, plan), *_on_settings(task, plan)]


def _on_room(task: Task, plan: "Plan") -> Iterator[str]:
    if not plan.fits:
        needs, free = size(plan.memory.peak), size(plan.memory_free_bytes)
        yield f"it needs {needs} and {free} are free here: {cheapest_fit(task.config, plan)}"
    if plan.disk_bytes > plan.disk_free_bytes:
        takes, free = size(plan.disk_bytes), size(plan.disk_free_bytes)
        fix = "checkpoint.keep=1, or another --out"
        yield f"its checkpoints take {takes} and {free} are free: {fix}"


def cheapest_fit(config: Config, plan: "Plan") -> str:
    """Settings that make the same step in less memory, those that cost least first."""
    savings: list[dict[str, Any]] = [{}, {"loss_chunk": 128}]
    savings.append({"loss_chunk": 128, "grad_checkpoint": True})
    for more in savings:
        lean = dataclasses.replace(config, train=dataclasses.replace(config.train, **more))
        fitting = largest_fitting(lean, plan.conditions, plan.memory_free_bytes * ROOM)
        if fitting is not None:
            more |= {name: getattr(fitting.train, name) for name in ARRANGED}
            settings = " ".join(f"train.{name}={value}" for name, value in more.items())
            return f"{settings.lower()} makes the same step and fits"
    return "no setting makes it fit; choose a smaller model or a machine with more"


def _on_text(task: Task, plan: "Plan") -> Iterator[str]:
    train, epochs = task.config.train, plan.epochs
    rows, share = train.batch_size, plan.tokens_in_text / plan.parameters_total
    if missing := task.data.get("missing"):
        yield missing
    if 0 < epochs < 0.95:  # like S1's 16 x 1,024 x 152,587 of 10 B
        fixes = f"train.max_steps={-(-task.batches.windows // rows)}"
        if (times := round(1 / epochs)) >= 2:
            fixes += f" or train.grad_accum={train.grad_accum * times}"
        yield (
            f"{rows:,} rows x {plan.tokens_a_step // rows:,} tokens x {train.max_steps:,} steps "
            f"are {amount(plan.tokens_in_all)} tokens, {epochs:.0%} of the text's "
            f"{amount(plan.tokens_in_text)}: one epoch is {fixes}"
        )
    elif epochs > MANY and task.config.model.dropout == 0:
        yield (
            f"{epochs:.0f} epochs without dropout: expect overfitting; model.dropout=0.1, "
            "fewer steps or more text"
        )
    elif epochs > WORTH_REPEATING:
        yield (
            f"{epochs:.1f} epochs: beyond {WORTH_REPEATING} a text teaches less each time; "
            "the best checkpoint is kept, more text would help more"
        )
    if 0 < share < 1 and task.base is None:
        yield f"{share:.2g} tokens of text a parameter: a smaller model would do as well"


def _on_settings(task: Task, plan: "Plan") -> Iterator[str]:
    config, steps = task.config, task.config.train.max_steps
    warmup = warmup_steps(config.optim, steps)
    if 0 < steps <= warmup:  # the learning rate never reaches its peak
        late = f"the warmup of {warmup:,} steps is not over when the run is, after {steps:,}"
        yield f"{late}: optim.warmup=0.05"
    validated = task.val is not None and 0 < config.eval.every < steps  # the best is saved
    if plan.seconds >= 600 and not (validated or 0 < config.checkpoint.every < steps):
        yield f"it is saved at its end only: checkpoint.every={max(steps // 10, 1)}"
    if task.val is None:
        yield "there is no validation text, so overfitting will not be seen: data.val_fraction=0.1"
    pays = COMPILE_PAYS_AFTER.get(plan.conditions.device, 0.0)
    if config.train.compile is True and plan.seconds < pays:
        yield "torch.compile costs more than it gains in so short a run: train.compile=auto"
    if config.eval.hellaswag is not None:
        yield "the time that HellaSwag takes is not counted: eval.hellaswag_items=N bounds it"
