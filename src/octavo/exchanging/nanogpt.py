"""nanoGPT's ``ckpt.pt`` as our model: the one pickle octavo opens, and only as far as data goes.

``torch.load(weights_only=True)`` builds tensors, numbers, texts and containers and refuses
everything else; a file that asks for more is not read. nanoGPT's modules have GPT-2's names and its
fused projection, but hold matrices as (out, in).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import CheckpointError
from octavo.exchanging.families import GPT2
from octavo.exchanging.huggingface import stock_module
from octavo.exchanging.weights import BUFFERS, build
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig

NANOGPT = replace(GPT2, name="nanoGPT", transposed=False)
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
COMPILED = "_orig_mod."  # what torch.compile puts before every name


def read_nanogpt(file: Path) -> tuple[GPT, dict[str, Tensor]]:
    """Our model in fp32 and evaluation mode, and nanoGPT's tensors under their own names.

    Raises `CheckpointError` for a pickle with code in it, which is not run, for anything that is no
    nanoGPT checkpoint, and for tensors that are missing, left over or of another shape.
    """
    content = _unpickle(file)
    args, given = content.get("model_args"), content.get("model")
    if not isinstance(args, Mapping) or not isinstance(given, Mapping):
        raise CheckpointError(
            f"{file.name} is no nanoGPT checkpoint", "it has no model and model_args"
        )
    if lacking := [name for name in SIZES if name not in args]:
        raise CheckpointError(f"model_args lacks {lacking[0]}", f"in {file}")
    weights = {
        str(name).replace(COMPILED, ""): tensor
        for name, tensor in given.items()
        if isinstance(tensor, Tensor) and not str(name).endswith(BUFFERS)
    }
    head = weights.get("lm_head.weight")
    tied = head is not None and torch.equal(head, weights.get("transformer.wte.weight", head))
    config = _to_config(args, tied)
    return build(NANOGPT, config, weights, str(file)), weights


def as_gpt2(transformers: Any, ours: ModelConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """The same tensors in transformers' GPT-2, which computes what nanoGPT does, to compare."""
    theirs = {
        name: tensor.T if ".h." in name and tensor.dim() == 2 else tensor
        for name, tensor in weights.items()
    }
    return stock_module(transformers, GPT2, ours, theirs)


def _to_config(args: Mapping[str, Any], tied: bool) -> ModelConfig:
    """The architecture that nanoGPT's arguments describe."""
    old = "bias" not in args  # older than that switch is older than its exact GELU, too
    return ModelConfig(
        **{name: args[name] for name in SIZES},
        dropout=args.get("dropout", 0.0),
        bias=args.get("bias", True),
        position="learned",
        norm="layernorm",
        mlp="gelu_tanh" if old else "gelu",
        tie_embeddings=tied,
    )


def _unpickle(file: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # unpicklers fail in every way there is, and torch's text advises to trust
        raise CheckpointError(
            f"{file.name} is damaged or holds more than data, and was not run",
            f"in {file.parent}",
            "where you trust it, load it and save its tensors and numbers alone",
        ) from None
    return content if isinstance(content, Mapping) else {}
