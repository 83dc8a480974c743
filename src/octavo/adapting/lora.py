"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021).

A layer with an adapter computes ``base(x) + alpha/rank * B A dropout(x)``. B begins at zero, so an
adapted model begins as its base, bit for bit. The base may be any linear layer, a quantized one
too; it is contained, never touched. Several adapters can lie over one base, told apart by name.
"""

import copy
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.adapting.surgery import linear_layers, no_match, swap_linear
from octavo.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


class LoRALinear(nn.Module):
    """A linear layer and the adapters beside it: by name an A (rank, in) and a B (out, rank)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        linear: Any = base
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.base = base
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.alpha: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        """How much each adapter in use counts; the others do not."""
        self.train(base.training)

    def add(self, name: str, rank: int, alpha: float, dropout: float) -> None:
        """Make an adapter, fp32: B zero, A drawn as PyTorch draws the weights of linear layers."""
        device = next(itertools.chain(self.base.parameters(), self.base.buffers())).device
        A = torch.empty(rank, self.in_features, device=device)
        self.lora_A[name] = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.alpha[name], self.dropout[name] = alpha, dropout

    def scale(self, name: str) -> float:
        """What B A is multiplied by: alpha / rank."""
        return self.alpha[name] / self.lora_A[name].size(0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = self.base(x)
        for name, weight in self.weights.items():
            A, B = self.lora_A[name], self.lora_B[name]
            # Not nn.Dropout: the model anneals the rate of every one of those.
            low = F.linear(F.dropout(x, self.dropout[name], self.training).to(A.dtype), A)
            # Scaled last, as PEFT does: the same rounding.
            y = y + (F.linear(low, B) * (weight * self.scale(name))).to(y.dtype)
        return y

    def merged(self) -> nn.Module:
        """A layer of the base's class whose weight holds the adapters in use."""
        weight = getattr(self.base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ConfigError(
                f"an adapter cannot be merged into {type(self.base).__name__}",
                "its weight is not stored as plain numbers",
                "merge into the model before it was quantized, then quantize the result",
            )
        linear: Any = copy.deepcopy(self.base)
        with torch.no_grad():
            for name, share in self.weights.items():
                delta = self.lora_B[name] @ self.lora_A[name] * (share * self.scale(name))
                linear.weight += delta.to(weight.dtype)
        vars(linear)["unmerged"] = self  # past nn.Module: no child, no part of the state
        return linear


def add_adapter(
    model: nn.Module,
    name: str = "default",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q_proj", "k_proj"),
) -> list[str]:
    """Put a new adapter beside the layers ``targets`` name, freeze all else; return their names.

    A target is the end of a layer's name: ``q_proj``, or ``blocks.0.attn.q_proj`` for one alone.
    Earlier adapters stay, out of use. Raises `ConfigError` for a target that is no layer, a rank
    that is none, and a name that is taken.
    """
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(f"an adapter cannot be called {name!r}", fix="use letters and digits")
    found = {path: layer for path, layer in linear_layers(model) if is_named(path, targets)}
    for target in targets:
        if not any(is_named(path, [target]) for path in found):
            raise no_match(model, f"is called {target}")
    for path, layer in found.items():
        check_layer(model, path, layer, name, rank)

    def adapt(layer: nn.Module) -> LoRALinear:
        adapted = layer if isinstance(layer, LoRALinear) else LoRALinear(layer)
        adapted.add(name, rank, alpha, dropout)
        return adapted

    names = swap_linear(model, lambda path, _: path in found, adapt, "is a target")
    model.requires_grad_(False)
    use_adapters(model, {name: 1.0})
    return names


def use_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Let these adapters alone take part, each times its weight, and be trained; {}: the base.

    Raises `ConfigError` for an adapter the model has not.
    """
    for name in weights:
        adapted_layers(model, name)
    for layer in _adapted(model).values():
        layer.weights = {name: w for name, w in weights.items() if name in layer.lora_A}
        for name in layer.lora_A:
            layer.lora_A[name].requires_grad_(name in weights)
            layer.lora_B[name].requires_grad_(name in weights)


def adapted_layers(model: nn.Module, name: str) -> dict[str, LoRALinear]:
    """The layers that have the adapter ``name``; `ConfigError` lists what there is instead."""
    every = _adapted(model)
    found = {path: layer for path, layer in every.items() if name in layer.lora_A}
    if not found:
        known = dict.fromkeys(other for layer in every.values() for other in layer.lora_A)
        fix = f"it has: {', '.join(known)}" if known else "add one to it first"
        raise ConfigError(f"the model has no adapter {name!r}", fix=fix)
    return found


def merge(model: M) -> M:
    """Replace every adapted layer by a plain one, its adapters in use added to its weight.

    Raises `ConfigError` where a layer cannot take them in; then nothing is merged.
    """
    found = _adapted(model)
    swap_linear(model, lambda path, _: path in found, lambda layer: layer.merged(), "is adapted")
    return model


def unmerge(model: M) -> M:
    """Put back the layers that `merge` replaced, bit for bit."""
    found = {path for path, layer in linear_layers(model) if "unmerged" in vars(layer)}
    swap_linear(model, lambda path, _: path in found, lambda la: vars(la)["unmerged"], "is merged")
    return model


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimizer may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def is_named(path: str, endings: Iterable[str]) -> bool:
    """Whether ``path`` ends in one of these names, each of whole words between dots."""
    return any(f".{path}".endswith(f".{ending}") for ending in endings)


def check_layer(model: nn.Module, path: str, layer: Any, name: str, rank: int) -> None:
    """Raise `ConfigError` where the layer at ``path`` cannot take an adapter of this rank."""
    if isinstance(layer, LoRALinear) and name in layer.lora_A:
        raise ConfigError(f"{path} has an adapter {name!r} already", fix="choose another name")
    limit = min(layer.in_features, layer.out_features)
    if not 1 <= rank <= limit:
        raise ConfigError(
            f"an adapter of rank {rank} does not fit {path}",
            f"it is {layer.out_features} x {layer.in_features}",
            f"give 1 to {limit}",
        )
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    if any(getattr(layer, "weight", None) is weight for weight in embeddings):
        raise ConfigError(
            f"{path} cannot have an adapter: it shares its matrix with the token embedding",
            fix=f"leave {path} out, or train the model with model.tie_embeddings=false",
        )


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: la for path, la in linear_layers(model) if isinstance(la, LoRALinear)}
