"""Where the time goes: by part, layer and operation, beside what the machine could do.

A training step is taken apart by `tracing`; its times are the tracer's shares of a step without it.
Ids are random: how long a step takes does not depend on what is read. The native engine is one
piece to Python: of it are measured the prompt and the writing, against arithmetic and bandwidth.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.adapting.lora import trainable_parameters
from octavo.config import Config
from octavo.errors import ConfigError
from octavo.explaining.engines import Opened, open_engine
from octavo.explaining.roofline import (
    Machine,
    Work,
    measure_machine,
    products,
    synchronize,
    timed,
    training_work,
)
from octavo.explaining.tracing import Times, named, trace
from octavo.generating.choosing import choose_device
from octavo.generating.sampling import PRESETS
from octavo.generating.writing import Engine, Slot
from octavo.language_model import LanguageModel
from octavo.model.counts import cache_bytes
from octavo.text.batches import Batches
from octavo.text.files import counted
from octavo.training.display import Display
from octavo.training.hardware import peak_memory, step_threads
from octavo.training.learner import Learner, build_learner, choose_precision, optimizer_step
from octavo.training.task import Task

MOST_PASSES = 4  # micro-batches of a step that are looked at
WRITE_SECONDS = 1.0  # in which a text is written again and again
CHUNK = 128  # tokens of a prompt that go through the native engine at once
NAMES = {
    "embedding": ("tok_emb", "pos_emb"),
    "norms": (
        *("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm"),
        *("norm_f", "q_norm", "k_norm"),
    ),
    "projections": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention": ("attn",),
    "mlp": ("up_proj", "gate_proj", "down_proj"),
    "activation": ("mlp",),
    "residual": ("blocks",),
    "head": ("lm_head",),
    "loss": ("loss",),
    "optimizer": ("optimizer",),
    "idle": ("idle",),
}
"""The modules of each part. A module's own is what the modules in it leave: attn rotates and
looks, mlp has the nonlinearity, blocks add. What is in none is the rest."""
PART_OF = {name: part for part, names in NAMES.items() for name in names}
WHY = {
    "compute": "is bound by arithmetic",
    "memory": "is bound by moving numbers",
    "overhead": "is neither arithmetic nor memory but many small operations",
}
HELP = {
    ("train", "compute"): "fewer bits (train.precision=bf16) or a smaller model would help, "
    "larger batches would not",
    ("train", "memory"): "larger micro-batches or fewer bits would help",
    ("train", "overhead"): "larger micro-batches or train.compile=true would help",
    ("generate", "compute"): "a smaller model would help",
    ("generate", "memory"): "fewer bits (octavo quantize) or several texts at once would help",
    ("generate", "overhead"): "several texts at once would help",
}


@dataclass(frozen=True)
class Row:
    """A part: its seconds in a step, what it does in them, and what holds it up."""

    part: str
    forward: float
    backward: float
    share: float
    """Of the step; the rows' sum to 1."""
    flops: float
    bytes: float
    bound: str
    """compute, memory or overhead, see `Machine.bound`."""
    of_roof: float
    """The least seconds that the machine allows over those taken."""


@dataclass(frozen=True)
class Profile:
    """What `profile_training` or `profile_writing` found."""

    what: str
    """train or generate."""
    where: str
    """Device or engine, and threads."""
    seconds: float
    """Of a step: of an optimizer step, or of a prompt and what is written after it."""
    tokens: int
    """Of a step."""
    machine: Machine
    memory_bytes: int
    """At the highest, above what the process had before the model."""
    rows: list[Row]
    layers: dict[str, float] = field(default_factory=dict)
    """Seconds of each block in a step."""
    operations: dict[str, float] = field(default_factory=dict)
    """Seconds of each of PyTorch's operations in a step, the longest first."""
    writing: dict[str, float] = field(default_factory=dict)
    """Of writing: tokens a second of the prompt and after it, and the bytes that a token reads."""
    remarks: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Floating-point operations of a step, as `octavo.model.counts` counts them."""
        return sum(row.flops for row in self.rows)

    @property
    def conclusion(self) -> str:
        """What holds it up, where, and what would help: one sentence."""
        shares = {bound: sum(r.share for r in self.rows if r.bound == bound) for bound in WHY}
        bound, share = max(shares.items(), key=lambda item: item[1])
        most = max((row for row in self.rows if row.bound == bound), key=lambda row: row.share)
        return (
            f"{share:.0%} of the time {WHY[bound]}, most of it in {most.part} ({most.share:.0%}); "
            f"{HELP[self.what, bound]}."
        )


def profile_training(
    task: Task,
    steps: int,
    path: Path | None = None,
    watch: Callable[[int, int], object] = lambda done, of: None,
) -> Profile:
    """Take ``steps`` optimizer steps as they are and as many under the tracer.

    Only the settings, the batches and the base of ``task`` matter. ``path`` gets a Chrome trace;
    ``watch`` is told how many of how many steps are done.
    """
    config, remarks = _simplified(task.config)
    device = _seen(choose_device(config.train.device))
    before = peak_memory(device)
    learner = build_learner(dataclasses.replace(task, config=config), device, Display(quiet=True))
    learner.loss = named("loss", learner.loss)
    done = 0

    def step() -> None:
        nonlocal done
        optimizer_step(learner)
        synchronize(device)
        watch(done := done + 1, 2 * steps + 1)

    def all_steps() -> None:
        for _ in range(steps):
            step()

    step()  # the optimizer's averages are made in the first
    seconds = statistics.median(timed(step) for _ in range(steps))
    memory = peak_memory(device) - before
    if learner.halves and step_threads(config.train.threads) % 2 == 0:
        remarks.append("taken apart in one piece; without the tracer it goes in two halves at once")
    learner.halves = False  # it sees one thread
    times = trace(all_steps, learner.model, path)
    precision = choose_precision(config.train.precision, device)
    machine = measure_machine(device, precision)
    x, _ = task.batches.rows(0, config.train.micro_batch_size)  # examples are as long as they are
    work = _training_work(learner, x.shape, precision.itemsize)
    return Profile(
        what="train",
        where=_where(device),
        seconds=seconds,
        tokens=x.size * config.train.grad_accum,
        machine=machine,
        memory_bytes=memory,
        remarks=remarks,
        **_taken_apart(times, steps, seconds, work, machine),
    )


def _training_work(learner: Learner, shape: tuple[int, int], number: int) -> dict[str, Work]:
    """Work by part of a step on micro-batches (B, T), whose products read ``number`` bytes each."""
    config = learner.task.config
    trained = trainable_parameters(learner.model)
    times = 2 if config.lora.rank or config.finetune.head_only else 3
    return training_work(config.model, shape, config.train.grad_accum, trained, times, number)


def random_task(config: Config) -> Task:
    """The training of a model whose text is not needed: its ids are drawn."""
    size = config.train.batch_size * config.model.block_size + 1
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, size)
    batches = Batches(ids, config.model.block_size, config.train.seed, "random")
    return Task(config, None, batches, None, {}, {})


def profile_writing(lm: LanguageModel, tokens: int, path: Path | None = None) -> Profile:
    """Write ``tokens`` tokens after half a context, again and again for a second.

    PyTorch's engine is taken apart; the native one is not, so that a trace of it is a
    `ConfigError`.
    """
    device = _seen(choose_device(lm.device if lm.run else "auto"))
    before = peak_memory(device)
    opened = open_engine(lm)
    if opened.native and path is not None:
        raise ConfigError(
            "the native engine is one piece, without a trace",
            fix="OCTAVO_ENGINE=torch octavo profile RUN --what generate --trace FILE.json",
        )
    half = max(1, lm.config.block_size // 2)
    tokens = min(tokens, half)
    read, write = _reader_and_writer(opened.engine, lm.config.vocab_size, half, tokens)
    read()
    write()
    pairs, end = [], time.perf_counter() + WRITE_SECONDS
    while not pairs or time.perf_counter() < end:
        pairs.append((timed(read), timed(write)))
    prompt, writing = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    memory = peak_memory(device) - before
    machine = measure_machine(device)
    moved = _decoding_work(lm, opened, half, tokens)
    shared = dict(
        what="generate",
        where=f"{' '.join(opened.name.split()[:2])}, {counted(opened.threads, 'thread')}",
        machine=machine,
        memory_bytes=memory,
        writing={
            "prompt_tokens_per_s": half / prompt,
            "tokens_per_s": tokens / writing,
            "bytes_per_token": _sum(moved).bytes / tokens,
        },
    )
    if opened.native:
        reading, seconds = products(lm.config, half, -(-half // CHUNK), half), prompt + writing
        work = {"prompt": _sum(reading), "writing": _sum(moved)}
        rows = _rows({"prompt": [prompt, 0.0], "writing": [writing, 0.0]}, seconds, work, machine)
        return Profile(seconds=seconds, tokens=half + tokens, rows=rows, **shared)
    read()
    times = trace(write, lm.model, path)
    parts = _taken_apart(times, 1, writing, moved, machine)
    return Profile(seconds=writing, tokens=tokens, **parts, **shared)


def _reader_and_writer(
    engine: Engine, vocab: int, prompt: int, tokens: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What reads a prompt anew, its first token drawn with it, and what writes on from there."""
    ids = np.random.default_rng(0).integers(0, vocab, prompt).tolist()
    slot = Slot(0, ids, 0, PRESETS["greedy"], prompt)

    def read() -> None:
        engine.release(0)
        slot.ids = ids[:]
        slot.ids += engine.step([slot])[0]

    def write() -> None:
        end = len(slot.ids) + tokens
        while (left := end - len(slot.ids)) > 0:
            slot.ids += engine.step([slot], left)[0]

    return read, write


def _decoding_work(lm: LanguageModel, opened: Opened, prompt: int, tokens: int) -> dict[str, Work]:
    """Work by part of writing token by token: each reads all weights, and what it looks back at."""
    length = prompt + tokens // 2
    work = products(lm.config, tokens, tokens, length, keys_read=length)
    unread = ("tok_emb", "pos_emb")  # one row of them; a tied head goes by its own name
    sizes = {"attention": cache_bytes(lm.config, length, bytes_a_number=2 if lm.weights else 4)}
    for name, array in opened.weights:
        if not name.startswith(unread):
            part = _part_of(name)
            sizes[part] = sizes.get(part, 0) + array.nbytes
    flops = {part: one.flops for part, one in work.items()}
    return {part: Work(flops.get(part, 0), tokens * size) for part, size in sizes.items()}


def _taken_apart(
    times: Times, steps: int, seconds: float, work: Mapping[str, Work], machine: Machine
) -> dict[str, Any]:
    """Rows, layers and operations of a step that takes so many seconds.

    What a GPU's kernels leave of it is idle; without one nothing is left.
    """
    traced = sum(times.modules.values()) / steps
    on_gpu = machine.device != "cpu"
    scale = (min(1.0, seconds / traced) if on_gpu else seconds / traced) / steps
    parts = {part: [0.0, 0.0] for part in [*NAMES, "rest"]}
    layers: dict[str, float] = {}
    for (module, phase), spent in times.modules.items():
        parts[_part_of(module)][phase == "backward"] += scale * spent
        if module.startswith("blocks."):
            layer = ".".join(module.split(".")[:2])
            layers[layer] = layers.get(layer, 0.0) + scale * spent
    parts["idle"][0] = max(seconds - scale * steps * traced, 0.0) if on_gpu else 0.0
    longest = sorted(times.operations.items(), key=lambda item: -item[1])
    operations = {name: scale * spent for name, spent in longest}
    rows = _rows(parts, seconds, work, machine)
    return {"rows": rows, "layers": layers, "operations": operations}


def _rows(
    parts: Mapping[str, list[float]], step: float, work: Mapping[str, Work], machine: Machine
) -> list[Row]:
    """One for each part that takes any of a step's seconds, given as forward and backward ones."""
    rows = []
    for part, (forward, backward) in parts.items():
        if seconds := forward + backward:
            does = work.get(part, Work())
            limits = machine.bound(does, seconds), machine.seconds(does) / seconds
            share = seconds / step
            rows.append(Row(part, forward, backward, share, does.flops, does.bytes, *limits))
    return rows


def _part_of(module: str) -> str:
    """By the last name in its path that is known; adapters lie below the module they adapt."""
    known = (PART_OF[name] for name in reversed(module.split(".")) if name in PART_OF)
    return next(known, "rest")


def _sum(parts: Mapping[str, Work]) -> Work:
    return Work(sum(w.flops for w in parts.values()), sum(w.bytes for w in parts.values()))


def _simplified(config: Config) -> tuple[Config, list[str]]:
    """The settings without what hides the modules or only repeats, and what was changed."""
    train, remarks = config.train, []
    if train.compile is True:
        remarks.append("without torch.compile, which leaves no modules to tell apart")
    if train.grad_accum > MOST_PASSES:
        remarks.append(f"{MOST_PASSES} of a step's {train.grad_accum} micro-batches")
    passes = min(train.grad_accum, MOST_PASSES)
    train = dataclasses.replace(train, compile=False, grad_accum=passes)
    return dataclasses.replace(config, train=train), remarks


def _seen(device: torch.device) -> torch.device:
    """The device, unless PyTorch's profiler sees only how it is asked, and not what it does."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"what {device.type} does cannot be timed", fix="add --device cpu")
    return device


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
