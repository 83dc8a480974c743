"""Models in from Hugging Face transformers and out to it, logits unchanged.

`from_huggingface` takes a module or a directory, `to_huggingface` gives a module; `families` holds
the maps between them. Needs the extra ``hf``, imported on use.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.exchanging.families import Family, choose_family, find_family
from octavo.exchanging.libraries import library
from octavo.exchanging.weights import build, read_directory
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig


def from_huggingface(source: nn.Module | str | Path) -> GPT:
    """Our model with the weights of ``source``, in fp32 and evaluation mode.

    ``source`` is a module of transformers, or a directory with its config.json and safetensors.
    Raises `ConfigError` for an architecture or an option our model has no word for,
    and `CheckpointError` for weights that are missing, left over or of another shape.
    """
    if not isinstance(source, nn.Module):
        return read_directory(Path(source))[0]
    family = find_family(type(source).__name__)
    config = family.config(source.config)
    return build(family, config, source.state_dict(), family.name, source.config)


def to_huggingface(model: GPT, architecture: str | None = None) -> nn.Module:
    """The stock module of transformers with ``model``'s weights, in evaluation mode.

    The class follows from the configuration unless ``architecture`` names one. Biases that the
    class has and the model has not become zeros. Raises `ConfigError` with the reason where no
    stock class holds the model.
    """
    family = choose_family(model.config, architecture)
    transformers = library("transformers", "making a Hugging Face model")
    weights = family.to_theirs(model.config, model.state_dict())
    return stock_module(transformers, family, model.config, weights)


def stock_module(
    transformers: Any, family: Family, config: ModelConfig, weights: dict[str, Tensor]
) -> nn.Module:
    """The class's own module with ``weights`` under its names; biases they lack are zero."""
    stock = getattr(transformers, family.name)
    module = stock(stock.config_class(**family.options(config)))
    zero = {n: torch.zeros_like(t) for n, t in module.state_dict().items() if n.endswith(".bias")}
    module.load_state_dict(zero | weights)
    return module.eval()
