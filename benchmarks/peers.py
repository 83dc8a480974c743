"""The same weights in other hands: a model of ours as nanoGPT's and as transformers' GPT-2."""

import contextlib
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.model.gpt import GPT


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
    theirs.load_state_dict(_nanogpt_weights(model))
    return theirs


def _nanogpt_weights(model: GPT) -> dict[str, torch.Tensor]:
    ours = model.state_dict()
    theirs = {
        "transformer.wte.weight": ours["tok_emb.weight"],
        "transformer.wpe.weight": ours["pos_emb.weight"],
        "transformer.ln_f.weight": ours["norm_f.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    names = {
        "ln_1": "attn_norm",
        "attn.c_proj": "attn.o_proj",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for layer in range(model.config.n_layer):
        block = f"blocks.{layer}"
        qkv = [ours[f"{block}.attn.{part}_proj.weight"] for part in "qkv"]
        theirs[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.cat(qkv)
        for name, our_name in names.items():
            theirs[f"transformer.h.{layer}.{name}.weight"] = ours[f"{block}.{our_name}.weight"]
    return theirs


def to_transformers(model: GPT) -> nn.Module:
    """A GPT2LMHeadModel with ``model``'s weights; its biases are zero and stay so."""
    from octavo.exchanging.huggingface import to_huggingface

    theirs = to_huggingface(model, "GPT2LMHeadModel")
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(False)
    return theirs


def nanogpt_version(clone: Path) -> str:
    """The clone's commit."""
    git = ["git", "-C", str(clone), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
