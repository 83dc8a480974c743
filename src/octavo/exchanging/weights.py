"""A Hugging Face directory as our model, read without transformers: safetensors and JSON only.

Every name and every shape is compared with what ``config.json`` promises before anything of that
size is allocated: nothing missing is filled in, nothing left over is passed by.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError, ResourceError
from octavo.exchanging.config_json import read_config, to_config
from octavo.exchanging.families import Family
from octavo.manifest import read_json
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.tensors import read_tensors

# Masks and frequencies that older files carry: not weights, and computed anew.
BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")
# Parts of a block, and the option that denies them biases in a model which has some elsewhere.
DENIED_BY = {".self_attn.": "attention_bias", ".attention.": "attention_bias", ".mlp.": "mlp_bias"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_directory(directory: Path) -> tuple[GPT, Family, list[Path]]:
    """The model in ``directory`` in fp32 and evaluation mode, its family, the files it was read of.

    Raises `ConfigError` for an architecture or an option our model has no word for,
    `CheckpointError` for damaged files and for tensors that are missing, left over or of another
    shape.
    """
    family, theirs = read_config(directory)
    config = to_config(family, theirs, directory)
    weights, files = read_weights(directory)
    model = build(family, config, weights, str(directory), theirs)
    return model, family, [directory / "config.json", *files]


def read_weights(directory: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Every tensor by its own name, and the files they were in."""
    if (directory / SINGLE).is_file():
        files = [directory / SINGLE]
        weights = read_tensors(directory / SINGLE)
    elif (directory / INDEX).is_file():
        places = _weight_map(directory)
        shards = {name: read_tensors(directory / name) for name in sorted({*places.values()})}
        files, weights = [directory / INDEX, *(directory / name for name in shards)], {}
        for name, place in places.items():
            if name not in shards[place]:
                raise CheckpointError(f"{place} lacks {name}, which {INDEX} promises")
            weights[name] = shards[place][name]
    elif any(directory.glob("*.bin")):
        raise CheckpointError(
            f"{directory} holds its weights as a pickle, which could run code and is not opened",
            fix="have transformers save them as safetensors, with save_pretrained",
        )
    else:
        raise CheckpointError(f"{directory} holds no {SINGLE} and no {INDEX}")
    return weights, files


def build(
    family: Family,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    where: str,
    theirs: Any = None,
) -> GPT:
    """Our model with ``weights`` in ``family``'s layout, every one accounted for.

    A tied head may be absent; biases of parts that the configuration ``theirs`` denies them must
    be, and are zero. Raises `CheckpointError`, which says ``where``.
    """
    given = _tidy(family, weights)
    if not any(name.startswith(f"{family.layers}.{config.n_layer - 1}.") for name in given):
        raise CheckpointError(f"{where} misses layer {config.n_layer - 1} of {config.n_layer}")
    if config.tie_embeddings:
        _tie(family, given)
    with torch.device("meta"):
        wanted = family.to_theirs(config, GPT(config).state_dict())
    denied = [part for part, option in DENIED_BY.items() if not getattr(theirs, option, True)]
    zero = {n for n in wanted if n.endswith(".bias") and any(part in n for part in denied)}
    promised = wanted.keys() - zero
    for verb, names in (
        ("misses", promised - given.keys()),
        ("has an unknown", given.keys() - promised),
    ):
        if names:
            raise CheckpointError(f"{where} {verb} {min(names)}", f"{len(names)} such tensors")
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} is of type {tensor.dtype}, not a float", f"in {where}")
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}",
                f"in {where}",
                "its configuration belongs to other weights",
            )
    full = {name: tensor.float() for name, tensor in given.items()}
    full |= {name: torch.zeros(wanted[name].shape) for name in zero}
    return _filled(config, family.to_ours(config, full))


def _filled(config: ModelConfig, weights: Mapping[str, Tensor]) -> GPT:
    try:
        model = GPT(config)
    except (RuntimeError, MemoryError):  # PyTorch's allocator raises the former
        raise ResourceError("the model does not fit in memory") from None
    model.load_state_dict(weights)
    return model.eval()


def _tie(family: Family, weights: dict[str, Tensor]) -> None:
    """Let the head be the embedding; a file that has another one contradicts its configuration."""
    head, embedding = (f"{family.outer[name]}.weight" for name in ("lm_head", "tok_emb"))
    if embedding in weights:
        tied = weights[embedding]
        if not torch.equal(weights.setdefault(head, tied), tied):
            raise CheckpointError(
                f"{head} is not {embedding}, though the configuration ties them",
                fix="set tie_word_embeddings to false in config.json if the head is meant",
            )


def _tidy(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's names: with the model's prefix, GPT-NeoX's head as lm_head, no buffers."""
    prefix = family.layers.partition(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in weights)
    result = {}
    for name, tensor in weights.items():
        if family.name == "GPTNeoXForCausalLM" and name.startswith("embed_out."):
            name = name.replace("embed_out.", "lm_head.")
        if bare and not name.startswith("lm_head."):
            name = prefix + name
        if not name.endswith(BUFFERS):
            result[name] = tensor
    return result


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor to file as the index says; `CheckpointError` for a file outside the directory."""
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{INDEX} has no weight_map", f"in {directory}")
    for name, place in places.items():
        plain = isinstance(place, str) and Path(place).name == place
        if not plain or not place.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX} places {name} in {place!r}",
                f"in {directory}",
                "weights lie in .safetensors files of the directory itself",
            )
    return places
