"""The doctor's rules: each an ``if`` over the facts that yields what is wrong and what to do.

The mini transformer's page ends with twenty pieces of advice under "Troubleshooting"; each is one
rule about a run, which speaks only where its advice would help. What comes first is more urgent, so
the first finding is the one thing to do.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any

from octavo.config import Config
from octavo.model.counts import cache_bytes
from octavo.studies.doctor import Finding, Machine, Points, RunFacts
from octavo.studies.plan_remarks import MANY
from octavo.studies.readable import amount, size
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
    rules = [_machine(machine)]
    if run is not None:
        rules = [_memory(machine, run), _learning(run), _quality(run), _speed(machine, run), *rules]
    return sorted(chain(*rules), key=lambda finding: not finding.blocks)


def _machine(machine: Machine) -> Iterator[Finding]:
    """What is wrong without any run."""
    on_cpu, threads, cores = machine.device == "cpu", machine.threads, machine.cores
    if machine.disk_free <= 2e9:  # checkpoints need room
        what = f"{size(machine.disk_free)} are free on the disk"
        fix = "delete old runs, or name another --out"
        yield Finding("disk_full", what, fix, machine.disk_free < 1e8)
    if machine.memory_free <= 1e9:  # PyTorch alone takes a quarter of a gigabyte
        what = f"{size(machine.memory_free)} of memory are free"
        yield Finding("memory_full", what, "close other programs", machine.memory_free < 3e8)
    if machine.unused_gpu:
        what = f"there is an NVIDIA GPU that PyTorch {machine.torch} cannot use"
        yield Finding("gpu_unused", what, "install PyTorch's CUDA build: pytorch.org/get-started")
    if on_cpu and threads > cores:  # threads beyond the cores wait for each other
        what = f"PyTorch uses {threads} threads on {cores} cores"
        yield Finding("too_many_threads", what, f"export OMP_NUM_THREADS={cores}")
    if on_cpu and threads < cores:
        what = f"PyTorch uses {threads} of {cores} cores"
        yield Finding("too_few_threads", what, f"export OMP_NUM_THREADS={cores}")
    if machine.load >= 1.5:
        fix = "wait for the others, or stop them: everything is slower"
        yield Finding("busy", f"{machine.load:.1f} processes want each core", fix)
    if on_cpu and machine.native_problem:  # writing falls back to PyTorch, several times slower
        what = f"the native engine is not here ({machine.native_problem}), so writing is slow"
        yield Finding("no_native_engine", what, "install a C++ compiler: apt install g++")


def _memory(machine: Machine, run: RunFacts) -> Iterator[Finding]:
    """Out of memory: five ways, each named where it alone would make the run fit."""
    config, conditions, room = run.config, run.conditions, machine.memory_free * ROOM
    need, free = training_memory(config, conditions), size(machine.memory_free)
    state = need.weights + need.gradients + need.optimizer
    if state > room:
        what = f"weights, gradients and averages alone take {size(state)}"
        fix = f"a smaller model.d_model or model.n_layer; {free} are free"
        yield Finding("smaller_model", what, fix, blocks=True)
    if need.peak <= room:
        return
    what = f"it needs {size(need.peak)} of memory and {free} are free"
    found = largest_fitting(config, conditions, room)
    if found is not None:  # the same step in smaller passes
        rows, passes = found.train.micro_batch_size, found.train.grad_accum
        fix = f"train.micro_batch_size={rows} train.grad_accum={passes} makes the same step"
        yield Finding("smaller_batches", what, fix)
    half = dataclasses.replace(conditions, half=True)  # activations in two bytes
    possible = machine.device != "cpu" and not conditions.half
    if possible and training_memory(config, half).peak <= room:
        fix = f"train.precision={machine.half} fits"
        yield Finding("half_precision_memory", what, fix)
    again = _with(config, "train", grad_checkpoint=True)  # activations not kept
    if training_memory(again, conditions).peak <= room:
        fix = "train.grad_checkpoint=true fits, for about a third more time"
        yield Finding("gradient_checkpointing", what, fix)
    length = max(config.model.block_size // 2, 1)
    row = _with(config, "train", micro_batch_size=1, grad_accum=config.train.batch_size)
    shorter = _with(row, "model", block_size=length)
    if found is None and training_memory(shorter, conditions).peak <= room:
        fix = f"model.block_size={length} train.micro_batch_size=1 fits"
        yield Finding("shorter_context", what, fix)


def _learning(run: RunFacts) -> Iterator[Finding]:
    """Loss not decreasing."""
    lr, steps = run.config.optim.lr, run.config.train.max_steps
    stuck, usual = _stuck(run.losses), LR_BAND[0] <= lr <= LR_BAND[1]
    if run.skipped or _spikes(run.losses):
        what = f"the loss jumps ({run.skipped} steps skipped) at a learning rate of {lr:g}"
        yield Finding("learning_rate", what, f"optim.lr={lr / 3:.1g}")
    elif stuck and not usual:
        nearer = min(LR_BAND, key=lambda bound: abs(bound - lr))
        what = f"the loss does not fall at a learning rate of {lr:g}"
        yield Finding("learning_rate", what, f"optim.lr={nearer:g}; 1e-4 to 1e-3 is usual")
    early = [loss for step, loss in run.losses if step <= steps / 10]
    warmup = warmup_steps(run.config.optim, steps)
    if len(early) >= 3 and max(early[1:]) >= 1.1 * early[0] and warmup < WARMUP * steps:
        what = f"the loss rises at first, after a warmup of {warmup:,} steps"
        yield Finding("longer_warmup", what, "optim.warmup=0.1")
    dropout = run.config.model.dropout
    behind = bool(run.validations) and _last(run.losses) > _last(run.validations)
    if dropout > LITTLE_DROPOUT and (stuck or behind):  # validation, without it, is better
        what = f"dropout {dropout:g} holds the training back"
        yield Finding("less_dropout", what, "model.dropout=0.1")
    if stuck and usual:  # then it is the text
        source = run.config.data.source
        where = source if isinstance(source, str) else " ".join(source or [])
        what = "the loss does not fall though the learning rate is usual: look at the text"
        yield Finding("check_data", what, f"octavo data inspect {where}")
    if stuck and run.parameters >= LARGE_MODEL:  # a slow way of finding out why
        what = f"a model of {amount(run.parameters)} parameters does not learn"
        fix = "find out why with a smaller one: quickstart.yaml"
        yield Finding("smaller_model_first", what, fix)


def _quality(run: RunFacts) -> Iterator[Finding]:
    """Poor generation quality."""
    values, text = [loss for _, loss in run.validations], run.tokens_in_text
    overfits = _overfits(run)
    if overfits:
        step, best = run.best
        rise = f"{values[-1] / best - 1:.0%} worse since"
        what = f"validation was best at step {step:,} ({best:.3f}) and is {rise}"
        fix = "model.dropout=0.1 train.patience=3; the best is kept"
        yield Finding("overfitting", what, fix)
    if overfits and text and (run.tokens_seen >= MANY * text or text < run.parameters):
        seen = f"seen {run.tokens_seen / text:.1f} times"
        what = f"{amount(text)} tokens of text, {seen}, are little"
        yield Finding("more_text", what, "train on more text, or with a smaller model")
    if run.finished and len(values) >= 2 and values[-1] <= 0.99 * values[-2]:
        what = f"validation still fell by {1 - values[-1] / values[-2]:.0%} when the run ended"
        steps = 2 * run.config.train.max_steps
        yield Finding("train_longer", what, f"octavo train {run.path} train.max_steps={steps}")
    # Nothing more to gain from time, and nothing is learnt by heart.
    still = len(values) >= 3 and abs(values[-1] / values[-3] - 1) < 0.01
    if still and run.tokens_seen >= 100 * run.parameters and _last(run.losses) >= 0.97 * values[-1]:
        what = "validation stands still and is as good as training: the model is full"
        yield Finding("larger_model", what, f"octavo grow {run.path} --out {run.path}-larger")
    if (share := repeated(run.sample)) >= 0.5:
        how = "--temperature 0.9 --top-p 0.95 --repetition-penalty 1.2"
        what = f"{share:.0%} of its last sample repeats itself"
        yield Finding("sampling", what, f"octavo generate {run.path} {how}")


def _speed(machine: Machine, run: RunFacts) -> Iterator[Finding]:
    """Slow training."""
    device, model, train = machine.device, run.config.model, run.config.train
    on_cpu, half = device == "cpu", run.conditions.half
    if not on_cpu and not half and machine.half_gain >= 1.5:  # on CPUs autocast costs more
        gain = f"{machine.half_gain:.1f} times as fast here"
        what = f"a product of {machine.half} matrices is {gain}, this uses fp32"
        yield Finding("half_precision_speed", what, f"train.precision={machine.half}")
    pays = COMPILE_PAYS_AFTER.get(device)
    compiled = train.compile is True or bool(machine.compile_problem)
    if pays is not None and run.seconds >= pays and not compiled:
        what = "a run this long gains from torch.compile, which is off"
        yield Finding("compilation", what, "train.compile=true")
    tokens, few = train.micro_batch_size * model.block_size, FEW_TOKENS.get(device, 0)
    rows = max(few // model.block_size, 1)
    larger = training_memory(_with(run.config, "train", micro_batch_size=rows), run.conditions)
    if tokens < few and larger.peak <= machine.memory_free * ROOM:
        what = f"a pass has {tokens:,} tokens, too few to keep the {device} busy"
        passes = max(train.batch_size // rows, 1)
        fix = f"train.micro_batch_size={rows} train.grad_accum={passes}"
        yield Finding("larger_batches", what, fix)
    # Settings that keep PyTorch from its fused attention.
    if on_cpu and model.dropout and model.block_size >= 256:
        what = f"with dropout a CPU writes all {model.block_size} x {model.block_size} weights out"
        fix = "model.dropout=0 takes the fused attention"
        yield Finding("flash_attention", what, fix)
    if device == "cuda" and not half:
        what = "FlashAttention works in bf16 and fp16, and this uses fp32"
        yield Finding("flash_attention", what, f"train.precision={machine.half}")
    cache, weights = cache_bytes(model), 4 * run.parameters
    if model.n_kv_head > 1 and 2 * cache >= weights:  # of one text: half the model
        what = f"the keys and values of one text take {size(cache)}, the model {size(weights)}"
        yield Finding("multi_query", what, "model.n_kv_head=1 in the next model")


def _with(config: Config, section: str, **changes: Any) -> Config:
    """The configuration with other settings in one section."""
    changed = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: changed})


def _last(points: Points) -> float:
    """The mean of the last fifth."""
    tail = [value for _, value in points[-max(len(points) // 5, 1) :]]
    return statistics.fmean(tail) if tail else 0.0


def _stuck(losses: Points) -> bool:
    """Whether the loss has fallen by less than 3 % over ten logged steps or more."""
    return len(losses) >= 10 and _last(losses) > 0.97 * _last(losses[: len(losses) // 5])


def _spikes(losses: Points) -> bool:
    """Whether it ever rose a quarter above the best before, after the first tenth."""
    late = [loss for _, loss in losses[len(losses) // 10 :]]
    bests = accumulate(late, min)
    return any(loss > 1.25 * best for loss, best in zip(late, bests, strict=True))


def _overfits(run: RunFacts) -> bool:
    """Whether validation rises while the training loss falls."""
    if len(run.validations) < 3:
        return False
    step, best = run.best
    before = [point for point in run.losses if point[0] <= step]
    rises = run.validations[-1][1] >= 1.02 * best
    return rises and bool(before) and _last(run.losses) < _last(before)


def repeated(text: str) -> float:
    """The share of a text's runs of three words that stood in it before; 0 for short ones."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if len(runs) >= 10 else 0.0
