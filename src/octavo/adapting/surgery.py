"""A model's linear layers by name, and others put in their place; the model never hears of it.

Linear is what has ``in_features`` and ``out_features``: PyTorch's own layer, a quantized one, one
with adapters. What such a layer contains is its own affair and is not looked into.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from octavo.errors import ConfigError
from octavo.model.gpt import GPT


def linear_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every linear layer in ``model`` with its name, e.g. ``blocks.0.attn.q_proj``."""
    for name, child in model.named_children():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            yield prefix + name, child
        else:
            yield from linear_layers(child, f"{prefix}{name}.")


def swap_linear(
    model: nn.Module,
    match: Callable[[str, Any], bool],
    make: Callable[[Any], nn.Module],
    wanted: str = "is what was asked for",
) -> list[str]:
    """Replace each linear layer that ``match``es by what ``make`` gives for it; return the names.

    All or none are replaced. Where nothing matches, `ConfigError` says that no linear layer
    ``wanted`` and lists what there is.
    """
    swaps = {name: make(layer) for name, layer in linear_layers(model) if match(name, layer)}
    if not swaps:
        raise no_match(model, wanted)
    for name, layer in swaps.items():
        model.set_submodule(name, layer)
    return list(swaps)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ConfigError` for what is more than a `GPT`: adapters and label heads."""
    if not isinstance(model, GPT):
        raise ConfigError("a classifier writes no text", fix="export its base")
    with torch.device("meta"):
        plain = GPT(model.config).state_dict()
    if foreign := model.state_dict().keys() - plain.keys():
        raise ConfigError(
            f"{min(foreign)} is not a weight of a plain model",
            fix="merge its adapters first: octavo merge RUN --out RUN2",
        )


def no_match(model: nn.Module, wanted: str) -> ConfigError:
    """The error for a search that found nothing."""
    kinds = dict.fromkeys(name.rpartition(".")[2] for name, _ in linear_layers(model))
    return ConfigError(
        f"no linear layer {wanted}",
        fix=f"there are: {', '.join(kinds)}" if kinds else "it has none",
    )
