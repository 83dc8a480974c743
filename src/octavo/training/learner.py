"""A model being trained: its weights, optimizer, precision, and how far it has come."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo import disk
from octavo.adapting.assemble import assemble, load_trained, trained_names
from octavo.adapting.classify import Classifier
from octavo.checkpoint import Run
from octavo.errors import ConfigError, first_line
from octavo.generating.sampling import splitmix64
from octavo.model.gpt import GPT
from octavo.text.batches import document_mask
from octavo.training import sharded
from octavo.training.canonical import canonical_gradients, prepare_canonical
from octavo.training.display import Display
from octavo.training.halves import goes_in_halves, side_by_side
from octavo.training.hardware import limited_threads, step_threads
from octavo.training.loss import cross_entropy
from octavo.training.metrics import gradient_norms, layer_updates, weights_before
from octavo.training.muon import Muon, multiplies_bf16
from octavo.training.optim import (
    build_optimizer,
    dropout_at,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    set_lr,
)
from octavo.training.parallel import ALONE, Ranks
from octavo.training.spike import Reading, Spike, watch
from octavo.training.task import Task


@dataclass
class Progress:
    """The numbers of a run that change; with the scaler they are a checkpoint's ``state.json``."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = -1
    best_val_loss: float | None = None
    evals_since_best: int = 0
    evaluated_step: int = -1
    skipped: int = 0
    bad_in_a_row: int = 0
    skipped_rows: int = 0
    """Rows that were passed over by going back: later steps take rows so much further on."""
    rewinds: int = 0
    """How often in a row the run went back, from the step ``rewound_from`` last."""
    rewound_from: int = -1
    recent: list[Reading] = field(default_factory=list)


@dataclass
class Learner:
    """Everything a checkpoint holds, and the functions that move it on."""

    task: Task
    model: GPT | Classifier
    body: GPT
    """The GPT in ``model``: itself, or what a classifier's head stands on."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Callable[..., Tensor]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    horizon: int
    """The step the run ends at: ``train.max_steps``, or what the clock has time for."""
    progress: Progress = field(default_factory=Progress)
    ranks: Ranks = ALONE
    sharded: bool = False
    """Whether each process holds a part of the model, and not all of it."""
    whole: GPT | Classifier | None = None
    """On the first process of a sharded model: room for all of it, on the CPU."""
    halves: bool = False
    """Whether each micro-batch goes in two halves, where there is an even number of threads."""

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.body.tok_emb.weight.device

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's, by name, each once."""
        return dict(self.model.named_parameters())

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors by name that training changes: the model's, or its adapters' and head's
        where the rest is frozen; and the optimizer's.
        """
        trained = trained_names(self.model)
        state = {name: t for name, t in self.model.state_dict().items() if name in trained}
        return state, optimizer_tensors(self.optimizer, self.model)

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON."""
        return vars(self.progress) | {
            "scaler": self.scaler.state_dict(),
            "threads": step_threads(self.task.config.train.threads),
            "processes": self.ranks.size,
        }


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; ``taken`` is false where numbers were not finite."""

    loss: float
    grad_norm: float
    lr: float
    taken: bool
    layers: dict[str, float]
    updates: dict[str, float]
    """How far each layer's weights moved, as a share of their norm."""
    spike: Spike | None


def build_learner(
    task: Task, device: torch.device, display: Display, ranks: Ranks = ALONE
) -> Learner:
    """Weights from the run's seed or its base, the optimizer, precision and compilation."""
    config = task.config
    canonical = config.train.deterministic == "canonical"
    if canonical:
        prepare_canonical(config)
    rows, _ = ranks.rows(0, config.train)
    torch.manual_seed(config.train.seed)
    model = assemble(config, task.base).to(device).train()
    body = model.body if isinstance(model, Classifier) else model
    body.grad_checkpoint = config.train.grad_checkpoint
    cut = sharded.is_to_be_sharded(config, model, device, ranks)
    whole = sharded.whole_copy(model, ranks) if cut else None
    if cut:
        sharded.shard(model, body, device, ranks)
    if ranks.size > 1:
        display.say(
            f"{ranks.size} processes, each with {len(rows) * rows.step} of a step's "
            f"{config.train.batch_size} rows and {'a part (fsdp)' if cut else 'all (ddp)'} "
            "of the model"
        )
    precision = torch.float32 if canonical else choose_precision(config.train.precision, device)
    learner = Learner(
        task=task,
        model=model,
        body=body,
        optimizer=build_optimizer(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        loss=functools.partial(cross_entropy, chunk=config.train.loss_chunk),
        autocast=functools.partial(
            torch.autocast, device.type, precision, enabled=precision != torch.float32
        ),
        horizon=config.train.max_steps,
        ranks=ranks,
        sharded=cut,
        whole=whole,
        halves=goes_in_halves(config, device.type, task.batches.block_size) and not cut,
    )
    if config.train.compile is True and not (cut or canonical):
        with limited_threads(config.train.threads):  # the compiler counts them
            _compile(learner, display)
    return learner


def restore(learner: Learner, run: Run, display: Display) -> None:
    """Load the latest checkpoint, where there is one."""
    for path in run.damaged:
        display.say(f"warning: {path} is damaged and passed over")
    latest = learner.ranks.first(lambda: run.latest)
    if latest is None:
        return
    saved = run.load(latest)
    state = dict(saved.state)  # empty where training never began
    for what in ("threads", "processes"):
        now = learner.state()[what]
        then = state.pop(what, now)
        if then != now and learner.task.config.train.deterministic != "canonical":
            display.say(
                f"warning: the run used {then} {what}, now there are {now}: "
                "what follows will not be bit for bit the same"
            )
    if scaler := state.pop("scaler", None):
        learner.scaler.load_state_dict(scaler)
    tensors, averages = saved.model_tensors(), saved.optimizer_tensors()
    if learner.sharded:
        tensors, averages = sharded.scattered(learner.model, tensors, averages)
    load_trained(learner.model, tensors)
    load_optimizer_tensors(learner.optimizer, learner.model, averages)
    learner.progress = Progress(**state)
    display.say(f"going on from step {learner.progress.step:,} of {run.path}")


def optimizer_step(learner: Learner, with_layers: bool = False) -> Step:
    """Forward and backward over the step's micro-batches, then clip and update.

    The loss is summed over the tokens of all micro-batches and divided once. A loss or gradient
    that is not finite, or leaps where ``train.on_spike`` is rewind, is seen before the optimizer:
    the step is not taken, its rows are used up.
    """
    threads = step_threads(learner.task.config.train.threads)
    halves = learner.halves and threads % 2 == 0
    with limited_threads(threads // 2 if halves else threads):
        return _step(learner, with_layers, halves)


def _step(learner: Learner, with_layers: bool, halves: bool) -> Step:
    config, progress = learner.task.config, learner.progress
    train, last = config.train, learner.horizon
    lr = set_lr(learner.optimizer, lr_at(progress.step, config.optim, last))
    dropout = dropout_at(progress.step, config.model.dropout, train.dropout_final, last)
    if train.dropout_final is not None:
        learner.body.set_dropout(dropout)
    first = progress.step * train.batch_size + progress.skipped_rows
    starts, micro = learner.ranks.rows(first, train)
    batches = [(row, *learner.task.batches.rows(row, micro)) for row in starts]
    n_targets = learner.ranks.total(sum(int((y != -100).sum()) for _, _, y in batches))
    keyed = bool(dropout or config.lora.dropout)
    backward = functools.partial(_backward, learner, n_targets, keyed, halves)
    if train.deterministic == "canonical":
        total = canonical_gradients(learner.model, learner.ranks, batches, backward)
    else:
        total = backward(batches)
        learner.ranks.add_up([total] if learner.sharded else [*_gradients(learner), total])
    learner.scaler.unscale_(learner.optimizer)
    norm, layers = gradient_norms(learner.parameters)
    loss, grad_norm = (total / n_targets).item(), norm.item()
    spike = watch(learner, first, lr, loss, grad_norm, layers)
    taken = bool(np.isfinite(loss) and np.isfinite(grad_norm)) and not (spike and spike.rewinds)
    before = weights_before(learner.parameters) if with_layers else {}
    if taken:
        if 0 < config.optim.grad_clip < grad_norm + 1e-6:  # below, PyTorch would multiply by one
            clipped = learner.parameters.values()
            torch.nn.utils.clip_grads_with_norm_(clipped, config.optim.grad_clip, norm)
        if isinstance(learner.optimizer, Muon):
            learner.optimizer.halves = halves
        learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.tokens += sum(x.size for _, x, _ in batches) * learner.ranks.size
    progress.skipped += not taken
    progress.bad_in_a_row = 0 if taken else progress.bad_in_a_row + 1
    updates = layer_updates(learner.parameters, before) if before else {}
    return Step(loss, grad_norm, lr, taken, layers if with_layers else {}, updates, spike)


def _backward(
    learner: Learner,
    n_targets: int,
    keyed: bool,
    halves: bool,
    batches: Sequence[tuple[int, Any, Any]],
) -> Tensor:
    """Add the gradients of some micro-batches, (first row, x, y) each; return their summed loss.

    ``keyed``: there is dropout, which is drawn anew from seed, step and row.
    """
    add_gradients = _add_gradients_of_halves if halves else _add_gradients
    seed, step = learner.task.config.train.seed, learner.progress.step
    total = torch.zeros((), device=learner.device)
    for row, x, y in batches:
        if keyed:
            torch.manual_seed(splitmix64(splitmix64(seed, step), row))
        total += add_gradients(learner, n_targets, x, y)
    return total


def _add_gradients(learner: Learner, n_targets: int, x: np.ndarray, y: np.ndarray) -> Tensor:
    nll = _nll(learner, learner.loss, x, y)
    learner.scaler.scale(nll / n_targets).backward()
    return nll.detach()


def _add_gradients_of_halves(
    learner: Learner, n_targets: int, x: np.ndarray, y: np.ndarray
) -> Tensor:
    """At once. Which half's come first is chance, but not the sum of two: earlier ones wait."""
    middle = len(x) // 2
    earlier = [(p, p.grad) for p in learner.parameters.values() if p.grad is not None]
    learner.optimizer.zero_grad(set_to_none=True)
    halves = (
        functools.partial(_add_gradients, learner, n_targets, x[rows], y[rows])
        for rows in (slice(0, middle), slice(middle, None))
    )
    first, second = side_by_side(*halves)
    for p, gradient in earlier:
        p.grad = gradient if p.grad is None else gradient.add_(p.grad)
    return first + second


def _gradients(learner: Learner) -> list[Tensor]:
    return [p.grad for p in learner.parameters.values() if p.grad is not None]


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast type; ``auto`` is bf16 where the GPU has it."""
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision=fp16 needs a GPU", fix="on a CPU choose train.precision=bf16 or fp32"
        )
    if name == "auto":
        bf16 = device.type == "cuda" and multiplies_bf16(device.type)
        name = "bf16" if bf16 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _compile(learner: Learner, display: Display) -> None:
    """Swap in the compiled loss, unless compiling fails here; then say so in one line."""
    compiled = torch.compile(learner.loss)
    x, y = learner.task.batches.rows(0, learner.ranks.rows(0, learner.task.config.train)[1])
    disk.failpoint("compiling")
    try:
        _nll(learner, compiled, x, y).backward()
    except Exception as error:  # compilers fail in many ways, and eager training does not need one
        reason = first_line(error)
        display.say(f"warning: torch.compile does not work here ({reason}); going on without it")
    else:
        learner.loss = compiled
    learner.optimizer.zero_grad(set_to_none=True)


def _nll(learner: Learner, loss: Callable[..., Tensor], x: np.ndarray, y: np.ndarray) -> Tensor:
    """Summed loss of the rows ``x`` and their targets ``y``, each (B, T)."""
    eot_id, device = learner.task.mask_id, learner.device
    mask = None if eot_id is None else _to(document_mask(x, eot_id), device)
    with learner.autocast():
        return loss(learner.model, _to(x, device), _to(y, device), mask)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
