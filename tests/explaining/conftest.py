"""A language model small enough to be checked by hand, and a run made of it without training."""

import json

import pytest
from model_kit import random_model

from octavo.checkpoint import Run
from octavo.config import build_config
from octavo.language_model import LanguageModel, load
from octavo.text.corpus import read_corpus
from octavo.text.tokenizer import Tokenizer

TEXT = "She sells sea shells by the sea shore: the shells she sells are sea shells.\n" * 20
SHAPE = {"block_size": 16, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "d_model": 16}


@pytest.fixture
def make_lm():
    def make(tokenizer="char", seed=0, **switches) -> LanguageModel:
        known = {"char": Tokenizer.char(TEXT), "byte": Tokenizer.byte()}
        tokens = known.get(tokenizer, tokenizer)
        size = tokens.vocab_size if tokens else 17
        config = build_config({"model": SHAPE | {"vocab_size": size} | switches}).model
        return LanguageModel(config, tokens, model=random_model(config, seed))

    return make


@pytest.fixture
def make_run(tmp_path):
    """A run with random weights that says it learned from ``sea.txt``, or ``source``."""

    def make(name="run", seed=0, settings=None, data=None, source=None) -> LanguageModel:
        if source is None:
            source = tmp_path / "sea.txt"
            source.write_text(TEXT, encoding="utf-8")
        tokenizer = Tokenizer.char(TEXT)
        given = {"model": SHAPE | {"vocab_size": tokenizer.vocab_size}} | (settings or {})
        given["data"] = {"source": str(source)} | given.get("data", {})
        config = build_config(given)
        data = data or {"sha256": read_corpus(str(source)).sha256}
        files = {"data.json": json.dumps(data).encode()}
        weights = random_model(config.model, seed).state_dict()
        Run.create(tmp_path / name, config, tokenizer, files, weights)
        return load(tmp_path / name, device="cpu")

    return make
