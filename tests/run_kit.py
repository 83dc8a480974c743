"""Runs that nobody trained, and tokenizers for them; making one needs no torch."""

import os
from pathlib import Path

import numpy as np

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.model.counts import tensor_shapes
from octavo.model_config import ModelConfig
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer

LETTERS = Tokenizer.char("abcdefgh \n:ASUimnrsty")  # spells what the chat template writes
TALKING = Tokenizer.char("abcdefgh \n:ASUimnrsty", separator=True)


def make_run(
    path: Path,
    tokenizer: Tokenizer = LETTERS,
    seed: int = 0,
    chat: bool = False,
    poison: int | None = None,
    **changes: int | str | bool,
) -> Path:
    """A run with random weights; at the token ``poison`` it overflows."""
    shape = {"block_size": 64, "n_layer": 2, "n_head": 2, "d_model": 16, "tie_embeddings": False}
    norm = "rmsnorm" if poison is None else "layernorm"
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **{"norm": norm, **shape, **changes})
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.standard_normal(size, dtype=np.float32) * 0.5
        for name, size in tensor_shapes(config).items()
        if not (config.tie_embeddings and name == "lm_head.weight")
    }
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["tok_emb.weight"]
    if poison is not None:
        weights["tok_emb.weight"][poison] = 3e38  # finite, but its mean and variance are not
    files = ChatTemplate.default(tokenizer).files() if chat else {}
    Run.create(path, Config(model=config), tokenizer, files, weights)
    return path


def save(run: Run, step: int, keep: int = 2, value: float | None = None) -> Path:
    """A checkpoint whose every number is ``value`` (default: its step)."""
    numbers = np.full(100, step if value is None else value, np.float32)
    return run.save(step, {"w": numbers}, {"w.exp_avg": numbers}, {"tokens": step}, keep=keep)


def value_of(run: Run, path: Path | None = None) -> float:
    weights = run.load(path).model_arrays()["w"]
    assert (weights == weights[0]).all()
    return float(weights[0])


def sentencepiece(*pieces: str) -> dict:
    """The tokenizer.json of a model like Llama's, which merges a blank and an a."""
    vocab = ["<unk>", "▁", "a", "b", *pieces, "▁a"]
    blank = {"pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", **blank}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(vocab)},
            "merges": ["▁ a"],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
    }


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))
