"""What a run will cost: counted before anything is allocated, then measured by a run in small.

Arithmetic gives parameters, operations, memory, disk and epochs; a probe gives speed and the true
memory, and from both follows when the run will end. What looks wrong is said in a remark.
"""

import dataclasses
import datetime
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from octavo.adapting.assemble import assemble
from octavo.adapting.lora import trainable_parameters
from octavo.config import Config
from octavo.model.counts import cache_bytes, count_parameters, flops_per_token
from octavo.model.gpt import GPT
from octavo.studies.plan_probe import MOST_PASSES, STEPS, Probe, probe
from octavo.studies.plan_remarks import ARRANGED, remarks_on
from octavo.text.batches import Batches, fixed_windows
from octavo.training.deadline import DRAFT_SHARE
from octavo.training.hardware import step_threads
from octavo.training.learner import choose_precision
from octavo.training.memory import (
    ROOM,
    Conditions,
    Memory,
    free_memory,
    largest_fitting,
    training_memory,
)
from octavo.training.task import ASSUMED_RATE, Task

AFFORDABLE = 60.0  # seconds that a probe may be expected to take when nobody asked for it


@dataclass(frozen=True)
class Plan:
    """The figures of a planned run; sizes in bytes, times in seconds."""

    conditions: Conditions
    parameters: dict[str, int]
    parameters_total: int
    parameters_embedding: int
    parameters_trainable: int
    tokens_in_text: int
    tokens_a_step: int
    tokens_in_all: int
    steps_left: int
    epochs: float
    """0 where the text is not there."""
    tokens_a_parameter: float
    flops_a_token: int
    training_flops: float
    weights_bytes: int
    kv_cache_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    memory: Memory
    memory_free_bytes: int
    fits: bool
    fitting: dict[str, int]
    """The largest micro-batch and its grad_accum that make the same step in free memory."""
    measured: Probe | None = None
    tokens_per_s: float = 0.0
    """0 where nothing was measured."""
    times: dict[str, float] = field(default_factory=dict)
    """By what is done: start, steps, validations, samples, saves, end."""
    seconds: float = 0.0
    """In all; a guess where nothing was measured."""
    ends: str = ""
    """The moment it is over if it begins now, ISO 8601."""
    remarks: list[str] = field(default_factory=list)


def make_plan(
    task: Task,
    device: torch.device,
    beside: Path,
    done: int = 0,
    probing: bool | None = None,
    prepared: float = 0.0,
) -> Plan:
    """Count, then measure unless ``probing`` is false or, where it is None, it would take long.

    ``beside`` is a folder on the disk that the run will use, ``done`` the steps a run has behind
    it, ``prepared`` the seconds that reading the text took. Raises what `probe` raises.
    """
    plan = count_plan(task, device, beside, done)
    train, rate = task.config.train, ASSUMED_RATE.get(device.type, math.inf)
    rows = (STEPS + 1) * min(train.grad_accum, MOST_PASSES) * train.micro_batch_size
    cost = 3.0 * plan.flops_a_token * rows * task.batches.block_size / rate
    if probing or (probing is None and plan.fits and cost < AFFORDABLE):
        plan = timed_plan(plan, task, probe(task, beside), done, prepared)
    else:
        plan = dataclasses.replace(plan, seconds=plan.training_flops / rate)
    ends = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=plan.seconds)
    return dataclasses.replace(
        plan, ends=ends.isoformat(timespec="seconds"), remarks=remarks_on(task, plan)
    )


def without_text(config: Config, why: str) -> Task:
    """A task over random ids, to plan a run whose text is not there (yet), for the reason given.

    The vocabulary must be known. The plan has no epochs, and nothing is compiled.
    """
    T, seed = config.model.block_size, config.train.seed
    ids = np.random.default_rng(seed).integers(config.model.vocab_size, size=16 * T + 1)
    val = fixed_windows(ids, T, config.eval.windows)
    data = {"tokens": 0, "val_tokens": 0, "missing": why}
    return Task(config, None, Batches(ids, T, seed), val, data, {})


def count_plan(task: Task, device: torch.device, beside: Path, done: int = 0) -> Plan:
    """Everything that the configuration and the text decide, without a tensor."""
    config = task.config
    model, train = config.model, config.train
    width = task.batches.block_size  # or as many tokens as the longest example has
    count, trainable = count_parameters(model), trainable_count(task)
    half = choose_precision(train.precision, device) != torch.float32
    even = step_threads(train.threads) % 2 == 0
    conditions = Conditions(device.type, half, width, trainable, even)
    memory, free = training_memory(config, conditions), free_memory(device.type)
    fitting = largest_fitting(config, conditions, free * ROOM)
    flops, step = flops_per_token(model, width), train.batch_size * width
    left = max(train.max_steps - done, 0)
    checkpoint = 4 * trainable + memory.optimizer
    epochs = train.max_steps * train.batch_size / task.batches.windows
    return Plan(
        conditions=conditions,
        parameters=vars(count),
        parameters_total=count.total,
        parameters_embedding=count.total - count.non_embedding,
        parameters_trainable=trainable,
        tokens_in_text=task.data["tokens"],
        tokens_a_step=step,
        tokens_in_all=step * train.max_steps,
        steps_left=left,
        epochs=epochs if task.data["tokens"] else 0.0,
        tokens_a_parameter=step * train.max_steps / count.total,
        flops_a_token=flops,
        training_flops=3.0 * flops * step * left,
        weights_bytes=4 * trainable,
        kv_cache_bytes=cache_bytes(model),
        checkpoint_bytes=checkpoint,
        # Those kept, the best, and the one being written before the oldest goes.
        disk_bytes=checkpoint * (config.checkpoint.keep + 1 + (task.val is not None)),
        disk_free_bytes=shutil.disk_usage(beside).free,
        memory=memory,
        memory_free_bytes=free,
        fits=memory.peak <= free * ROOM,
        fitting={name: getattr(fitting.train, name) for name in ARRANGED} if fitting else {},
    )


def timed_plan(plan: Plan, task: Task, found: Probe, done: int, prepared: float) -> Plan:
    """The plan with what was measured, and the time that follows from it."""
    config = task.config
    last = config.train.max_steps
    validated = occasions(done, last, config.eval.every) if task.val is not None else set()
    # A validation that finds the best so far saves it; most do.
    saved = occasions(done, last, config.checkpoint.every) | validated
    times = {
        "start": prepared + found.start,
        "steps": plan.steps_left * found.step,
        "validations": len(validated) * found.validation,
        "samples": len(occasions(done, last, config.log.sample_every)) * found.sample,
        "saves": len(saved) * found.save,
        "end": found.end,
    }
    if config.train.draft:
        times["draft"] = DRAFT_SHARE * times["steps"]
    return dataclasses.replace(
        plan,
        measured=found,
        tokens_per_s=plan.tokens_a_step / found.step,
        times=times,
        seconds=config.train.budget or sum(times.values()),
    )


def occasions(done: int, last: int, every: int) -> set[int]:
    """The steps after ``done`` at which something is due, the last always among them."""
    return {step for step in range(every, last, every or 1) if step > done and every} | {last}


def trainable_count(task: Task) -> int:
    """Parameters that training changes; counted on the meta device, which holds no numbers."""
    config = task.config
    if task.base is None and not config.finetune.labels:
        return count_parameters(config.model).total
    with torch.device("meta"):
        base = GPT(config.model) if task.base is not None else None
        return trainable_parameters(assemble(config, base))
