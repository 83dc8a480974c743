"""Models in from Hugging Face transformers and out to it, logits unchanged.

`from_huggingface` takes a module or a directory, `to_huggingface` gives a module; `families` holds
the maps between them. Needs the extra ``hf``, imported on use.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import CheckpointError, MissingExtraError
from octavo.exchanging.families import choose_family, find_family
from octavo.exchanging.weights import read_directory
from octavo.model.gpt import GPT

# Masks and frequencies that older files carry: not weights, and computed anew.
OLD_BUFFERS = (".masked_bias", ".inv_freq")


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
    model = GPT(config)
    _fill(model, family.to_ours(config, source.state_dict()))
    return model.eval()


def to_huggingface(model: GPT, architecture: str | None = None) -> nn.Module:
    """The stock module of transformers with ``model``'s weights, in evaluation mode.

    The class follows from the configuration unless ``architecture`` names one. Biases that the
    class has and the model has not become zeros. Raises `ConfigError` with the reason where no
    stock class holds the model.
    """
    family = choose_family(model.config, architecture)
    transformers = _import_transformers("making a Hugging Face model")
    stock = getattr(transformers, family.name)
    module = stock(stock.config_class(**family.options(model.config)))
    weights = family.to_theirs(model.config, model.state_dict())
    for name, tensor in module.state_dict().items():
        if name.endswith(".bias"):
            weights.setdefault(name, torch.zeros_like(tensor))
    module.load_state_dict(weights)
    return module.eval()


def _fill(model: GPT, weights: dict[str, Tensor]) -> None:
    """Copy every parameter; a bias that has no counterpart is a zero one."""
    for name, parameter in model.named_parameters():
        given = weights.get(name)
        if given is None and not name.endswith(".bias"):
            raise CheckpointError(f"the weight {name} is missing")
        if given is not None and given.shape != parameter.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(given.shape)}, not {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(given if given is not None else torch.zeros_like(parameter))


def _import_transformers(wanted_for: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("hf", wanted_for) from None
    return transformers
