"""The gate of a GGUF file, with a stand-in for llama.cpp that can be made to err."""

import sys
import types

import numpy as np
import pytest
import torch
from model_kit import random_model

from octavo.errors import ConfigError, ParityError
from octavo.exchanging import parity
from octavo.exchanging.gguf import export_gguf
from octavo.exchanging.gguf_check import read_gguf, rounded
from octavo.exchanging.parity import Figures, random_rows
from octavo.language_model import LanguageModel
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

pytest.importorskip("gguf")

TEXT = "She sells sea shells by the sea shore.\n"


@pytest.fixture
def lm():
    tokenizer = Tokenizer.char(TEXT, separator=True)
    shape = dict(block_size=16, n_layer=1, n_head=2, d_model=32, d_ff=64)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **shape)
    return LanguageModel(config, tokenizer, model=random_model(config, noise=0.2))


def export(lm, path, kind="F16"):
    rows = random_rows(lm.tokenizer.vocab_size, lm.config.block_size, lm.tokenizer)
    return export_gguf(lm.model, lm.tokenizer, path, rows, "random ids", kind)


@pytest.fixture
def llama_cpp(monkeypatch, lm):
    """A module that reads the file with our reader; ``spoil`` changes what it computes."""

    class Llama:
        def __init__(self, path, **options):
            self.model = read_gguf(path)
            assert options["n_ctx"] == 16
            assert options["logits_all"]

        def reset(self):
            self.scores = None

        @torch.inference_mode()
        def eval(self, ids):
            assert self.scores is None
            self.scores = module.spoil(self.model(torch.tensor([ids]))[0].numpy())

        def tokenize(self, text, add_bos, special):
            assert (add_bos, special) == (False, False)
            return module.recode(lm.tokenizer.encode(text.decode()))

    module = types.SimpleNamespace(Llama=Llama, __version__="1.2", spoil=np.copy, recode=list)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


def test_llama_cpp_is_asked_where_it_is_installed(lm, llama_cpp, tmp_path):
    facts = export(lm, tmp_path / "model.gguf", "Q8_0")
    assert facts["logits_differ_by"]["llama-cpp-python 1.2"] == 0
    llama_cpp.spoil = lambda logits: logits * 1.01  # it rounds more than we do
    assert export(lm, tmp_path / "model.gguf", "Q8_0")["perplexity_of_the_file"]


def test_other_tokens_are_refused(lm, llama_cpp, tmp_path):
    llama_cpp.recode = lambda ids: ids[:-1]
    with pytest.raises(ParityError, match=r"llama-cpp-python 1.2 gives other ids"):
        export(lm, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_logits_are_refused(lm, llama_cpp, tmp_path):
    llama_cpp.spoil = lambda logits: np.roll(logits, 1, axis=1)
    with pytest.raises(ParityError, match="differ by"):
        export(lm, tmp_path / "model.gguf")


def test_logits_that_are_no_numbers_are_refused(lm, llama_cpp, tmp_path):
    llama_cpp.spoil = lambda logits: np.full_like(logits, np.nan)
    with pytest.raises(ParityError, match="differ by nan"):
        export(lm, tmp_path / "model.gguf")


def test_another_greedy_text_is_refused(lm, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "compare", lambda *everything: Figures(0.0, 1.0, 1.0))
    llama_cpp.spoil = lambda logits: np.roll(logits, 1, axis=1)
    with pytest.raises(ParityError, match="writes another greedy text"):
        export(lm, tmp_path / "model.gguf")


def test_an_added_end_that_llama_cpp_would_write_is_refused(lm, llama_cpp, tmp_path, monkeypatch):
    lm = LanguageModel(lm.config, Tokenizer.char(TEXT), model=lm.model)  # its last id is padding
    assert export(lm, tmp_path / "model.gguf")["likeliest_end"] < 0.1
    monkeypatch.setattr(parity, "compare", lambda *everything: Figures(0.0, 1.0, 1.0))
    llama_cpp.spoil = lambda logits: np.pad(logits[:, :-1], ((0, 0), (0, 1)), constant_values=99)
    with pytest.raises(ParityError, match=r"1.2 gives the one that was added a probability of 1"):
        export(lm, tmp_path / "model.gguf")


def test_without_llama_cpp_and_transformers_the_reader_remains(lm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    facts = export(lm, tmp_path / "model.gguf")
    assert list(facts["logits_differ_by"]) == ["gguf's reader"]


def test_the_text_given_is_what_is_compared_on(lm, tmp_path):
    rows = np.array([lm.tokenizer.encode(TEXT[:17]), lm.tokenizer.encode(TEXT[4:21])])
    text = "a text about shells"
    facts = export_gguf(lm.model, lm.tokenizer, tmp_path / "model.gguf", rows, text, "F32")
    assert facts["compared_on"] == "a text about shells"
    x, y = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(lm.model(x).flatten(0, 1), y.flatten())
    assert facts["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert facts["perplexity_of_the_file"] == pytest.approx(facts["perplexity"], rel=1e-5)


def test_rounding_is_what_the_file_holds(lm, tmp_path):
    """The reference never saw the file: its weights were rounded where they lay."""
    for kind in ("F16", "Q8_0", "Q4_0"):
        export(lm, tmp_path / "model.gguf", kind)
        wanted = rounded(lm.model, kind).state_dict()
        for name, value in read_gguf(tmp_path / "model.gguf").state_dict().items():
            assert torch.equal(value, wanted[name]), name
    assert not torch.equal(wanted["tok_emb.weight"], lm.model.tok_emb.weight)


def test_the_shortest_contexts(tmp_path):
    tokenizer = Tokenizer.byte(separator=True)
    for block_size in (1, 2, 9):
        config = ModelConfig(vocab_size=257, block_size=block_size, n_layer=1, n_head=2, d_model=32)
        lm = LanguageModel(config, tokenizer, model=GPT(config))
        facts = export(lm, tmp_path / "model.gguf")
        assert facts["greedy_tokens_equal"] == block_size - max(block_size // 2, 1)


def test_a_classifier_is_refused(lm, tmp_path):
    from octavo.adapting.classify import Classifier

    classifier = Classifier(lm.model, ["sea", "land"])
    with pytest.raises(ConfigError, match="a classifier writes no text"):
        export(LanguageModel(lm.config, lm.tokenizer, model=classifier), tmp_path / "model.gguf")


def test_adapters_must_be_merged_first(lm, tmp_path):
    from octavo.adapting.lora import add_adapter

    add_adapter(lm.model)
    with pytest.raises(ConfigError, match="merge its adapters first"):
        export(lm, tmp_path / "model.gguf")
