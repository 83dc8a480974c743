"""The optimizer, its parameter groups, and the learning rate of every step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from octavo.config import OptimConfig
from octavo.training.muon import Muon, is_block_matrix


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019): matrices decay, vectors do not. With ``name=muon`` the
    matrices inside the blocks are Muon's, at a rate of their own.
    """
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_muon = config.name == "muon" and is_block_matrix(name, p)
            (matrices if by_muon else others if p.dim() >= 2 else vectors).append(p)
    shared = {"weight_decay": config.weight_decay, "lr_scale": 1.0, "muon": False}
    shared["momentum"] = config.muon_momentum
    ratio = config.muon_lr / config.lr if config.lr else 0.0
    groups = [
        {"params": others} | shared,
        {"params": vectors} | shared | {"weight_decay": 0.0},
        {"params": matrices} | shared | {"lr_scale": ratio, "muon": True},
    ]
    kind = Muon if config.name == "muon" else torch.optim.AdamW
    return kind(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def warmup_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps of linear warmup: ``warmup`` itself, or below 1 that fraction of the run."""
    return int(config.warmup * max_steps if config.warmup < 1 else config.warmup)


def lr_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """The learning rate of optimizer step ``step``, counted from 0.

    >>> config = OptimConfig(lr=1.0, warmup=2, min_lr_ratio=0.0)
    >>> [round(lr_at(step, config, 6), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(max_steps - warmup, 1), 1.0)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "trapezoid":
            share = min((max_steps - step) / max(config.cooldown * max_steps, 1), 1.0)
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * max(share, 0.0))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Give every group this learning rate, or its multiple of it, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def dropout_at(step: int, start: float, final: float | None, max_steps: int) -> float:
    """Dropout of step ``step``: constant, or annealed linearly in steps of a hundredth.

    Hundredths, because a compiled model is compiled anew for each value.
    """
    if final is None:
        return start
    progress = min(step / max(max_steps - 1, 1), 1.0)
    return round(start + (final - start) * progress, 2)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as ``NAME.KIND`` tensors, e.g. ``tok_emb.weight.exp_avg``."""
    return {
        f"{name}.{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, each tensor where the optimizer expects it."""
    parameters, fused = dict(model.named_parameters()), optimizer.defaults["fused"]
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        parameter = parameters[name]
        there = kind != "step" or fused  # which count their steps on the GPU, others on the CPU
        optimizer.state[parameter][kind] = (value.to(parameter.device) if there else value).clone()
