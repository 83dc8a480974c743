"""The same weights in other hands: a model of ours as nanoGPT's, litgpt's, transformers' GPT-2."""

import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.exchanging import nanogpt
from octavo.model.gpt import GPT

NANOGPT = nanogpt.NANOGPT.outer | nanogpt.NANOGPT.inner
LITGPT = {
    "tok_emb": "transformer.wte",
    "norm_f": "transformer.ln_f",
    "lm_head": "lm_head",
    "attn_norm": "norm_1",
    "attn.qkv": "attn.qkv",
    "attn.o_proj": "attn.proj",
    "mlp_norm": "norm_2",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}


def to_nanogpt(model: GPT, clone: Path) -> nn.Module:
    """The GPT of model.py in a clone of nanoGPT, with ``model``'s weights."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = model.config
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        theirs = module.GPT(
            module.GPTConfig(
                block_size=config.block_size,
                vocab_size=config.vocab_size,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.d_model,
                dropout=config.dropout,
                bias=False,
            )
        )
    theirs.load_state_dict(renamed(model.state_dict(), NANOGPT))
    return theirs


def renamed(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, Any]:
    """Our tensors, or their gradients, by another model's names; q, k and v become one matrix."""
    theirs = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name)
        assert found is not None
        layer, module = found.groups()
        if module == "attn.q_proj":
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            module, tensor = "attn.qkv", torch.cat(parts)
        if module in names:
            within = f"transformer.h.{layer}." if layer else ""
            theirs[f"{within}{names[module]}.weight"] = tensor
    return theirs


def to_litgpt(model: GPT) -> nn.Module:
    """litgpt's GPT with ``model``'s weights: rotary positions, LayerNorm, a gated MLP, tied.

    Its norms' biases are zero and stay so.
    """
    import litgpt

    config = model.config
    theirs = litgpt.GPT(
        litgpt.Config(
            block_size=config.block_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            intermediate_size=config.d_ff,
            norm_eps=config.norm_eps,
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        )
    )
    theirs.lm_head.weight = theirs.transformer.wte.weight
    theirs.load_state_dict(renamed(model.state_dict(), LITGPT), strict=False)
    return _without_biases(theirs)


def to_transformers(model: GPT) -> nn.Module:
    """A GPT2LMHeadModel with ``model``'s weights; its biases are zero and stay so."""
    from octavo.exchanging.huggingface import to_huggingface

    return _without_biases(to_huggingface(model, "GPT2LMHeadModel"))


def _without_biases(theirs: nn.Module) -> nn.Module:
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(False)
    return theirs


def version_of(clone: Path) -> str:
    """The clone's commit."""
    git = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
