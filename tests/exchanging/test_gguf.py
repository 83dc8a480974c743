"""Models out to GGUF: others' code reads from the file what the model is.

Every export below passes the gate: `gguf`'s own reader, and transformers where it knows the
architecture, find the same logits. No parameter is at its default, so a dropped one would show.
"""

import sys

import numpy as np
import pytest
import torch
from model_kit import perturb

from octavo.errors import ConfigError, MissingExtraError, ParityError
from octavo.exchanging import gguf as exporting
from octavo.exchanging.families import FAMILIES, LLAMA, QKV
from octavo.exchanging.gguf import ARCHITECTURES, export_gguf, storage
from octavo.exchanging.gguf_check import UNKNOWN_TO_TRANSFORMERS, read_gguf
from octavo.exchanging.parity import random_rows
from octavo.language_model import LanguageModel
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig, RopeScaling
from octavo.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SMALL = dict(block_size=24, n_layer=2, n_head=4, d_model=32, d_ff=64)
GPT2 = dict(position="learned", norm="layernorm", mlp="gelu_tanh")
NEOX = dict(norm="layernorm", mlp="gelu_tanh")
TEXT = "She sells sea shells by the sea shore, naïvely: 5 € each.\n"
MODELS = {
    "gpt2": ("gpt2", dict(GPT2, bias=True)),
    "gpt2 without biases, untied": ("gpt2", dict(GPT2, tie_embeddings=False)),
    "gpt2 with the exact GELU": ("gpt2", dict(GPT2, mlp="gelu")),
    "starcoder": ("starcoder", dict(GPT2, bias=True, n_kv_head=1)),
    "starcoder2": ("starcoder2", dict(NEOX, bias=True, n_kv_head=2)),
    "starcoder2 without biases": ("starcoder2", dict(NEOX)),
    "gptneox": ("gptneox", dict(NEOX, bias=True, rope_theta=500.0)),
    "stablelm": ("stablelm", dict(norm="layernorm", n_kv_head=2, norm_bias=True)),
    "stablelm without biases": ("stablelm", dict(norm="layernorm", n_kv_head=1)),
    "llama": ("llama", dict(n_kv_head=2, norm_eps=1e-3)),
    "llama with biases, untied": ("llama", dict(bias=True, tie_embeddings=False)),
    "llama with wide heads": ("llama", dict(head_dim=12, n_kv_head=2)),
    "qwen3": ("qwen3", dict(qk_norm=True, n_kv_head=2)),
    "qwen3 with wide heads": ("qwen3", dict(qk_norm=True, head_dim=12)),
    "llama, linear": ("llama", dict(rope_scaling=RopeScaling(type="linear", factor=2.5))),
    "llama, ntk": ("llama", dict(rope_scaling=RopeScaling(type="ntk", factor=4.0))),
    "qwen3, yarn": (
        "qwen3",
        dict(
            qk_norm=True,
            rope_scaling=RopeScaling(type="yarn", factor=4.0, original_block_size=16),
        ),
    ),
    "llama, yarn with a factor": (
        "llama",
        dict(rope_scaling=RopeScaling(type="yarn", factor=2.0, attention_factor=0.8)),
    ),
    "llama, llama3": (
        "llama",
        dict(
            rope_scaling=RopeScaling(
                type="llama3", factor=8.0, original_block_size=16, high_freq_factor=2.5
            )
        ),
    ),
}


def make(tokenizer=None, padding=0, **switches):
    """A language model that knows an end of text, unless its tokenizer says otherwise."""
    tokenizer = tokenizer or Tokenizer.char(TEXT, separator=True)
    config = ModelConfig(vocab_size=tokenizer.vocab_size + padding, **(SMALL | switches))
    torch.manual_seed(3)
    return LanguageModel(config, tokenizer, model=perturb(GPT(config)))


def export(lm, path, kind="F16", **options):
    rows = random_rows(lm.tokenizer.vocab_size, 24, lm.tokenizer)
    return export_gguf(lm.model, lm.tokenizer, path, rows, "random ids", kind, **options)


def exported(path, name, kind="F32", **changes):
    arch, switches = MODELS[name]
    cls = "GPTNeoXForCausalLM" if arch == "gptneox" else None
    lm = make(**switches, **changes)
    return lm, export(lm, path, kind, architecture=cls)


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_passes_the_gate(name, tmp_path):
    lm, facts = exported(tmp_path / "model.gguf", name)
    arch = MODELS[name][0]
    assert facts["architecture"] == arch
    readers = facts["logits_differ_by"]
    assert readers["gguf's reader"] <= 1e-5
    assert any("transformers" in name for name in readers) == (arch not in UNKNOWN_TO_TRANSFORMERS)
    assert facts["greedy_tokens_equal"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    # The file says all of it: what was read back computes what the model does.
    back = read_gguf(tmp_path / "model.gguf")
    ids = torch.arange(24)[None] % lm.config.vocab_size
    with torch.no_grad():
        wanted, given = lm.model(ids), back(ids)
    tolerance = 1e-2 if "exact GELU" in name else 1e-5
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert any("tanh" in remark for remark in facts["remarks"]) == ("exact GELU" in name)


def test_there_is_an_architecture_for_every_class():
    assert ARCHITECTURES.keys() == {family.name for family in FAMILIES}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["gpt2", "starcoder2", "llama"])
def test_every_kind_of_file(kind, name, tmp_path):
    lm, facts = exported(tmp_path / "small.gguf", name, kind)
    _, whole = exported(tmp_path / "whole.gguf", name)
    assert facts["file_bytes"] < whole["file_bytes"]
    assert facts["tensors"][kind] >= 8
    tensors = tensors_of(tmp_path / "small.gguf")
    assert all(t.tensor_type.name == "F32" for t in tensors.values() if len(t.shape) == 1)
    embedding = "Q8_0" if kind == "Q4_0" else kind
    assert tensors["token_embd.weight"].tensor_type.name == embedding
    back = read_gguf(tmp_path / "small.gguf").tok_emb.weight.detach()
    # Half a step; Q8_0's step, a 127th of the largest value, is itself rounded to F16.
    error = {"F16": 2**-11, "Q8_0": 1 / 254 + 2**-11, "Q4_0": 1 / 254 + 2**-11}[kind]
    scale = lm.model.tok_emb.weight.detach().abs().amax(dim=1, keepdim=True)  # one block a row
    assert ((back - lm.model.tok_emb.weight).abs() <= error * scale).all()


def test_odd_widths_are_kept_in_f16_and_said(tmp_path):
    lm = make(d_model=40, d_ff=64)
    facts = export(lm, tmp_path / "model.gguf", "Q8_0")
    tensors = tensors_of(tmp_path / "model.gguf")
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"  # its rows have 64
    assert facts["tensors"]["Q8_0"] == 2
    assert "13 tensors are F16: their widths are no multiple of 32" in facts["remarks"]


def test_positions_and_vectors_stay_exact():
    assert storage("position_embd.weight", (24, 32), "Q4_0") == "F32"
    assert storage("blk.0.attn_norm.weight", (32,), "F16") == "F32"
    assert storage("output.weight", (50, 32), "Q4_0") == "Q8_0"
    assert storage("blk.0.ffn_up.weight", (64, 32), "Q4_0") == "Q4_0"


def test_only_llama_turns_neighbours(tmp_path):
    """Row 2i of a head is our row i, row 2i + 1 our row i + E/2; elsewhere nothing moves."""
    for name in ("llama", "qwen3"):
        lm, _ = exported(tmp_path / "model.gguf", name)
        tensors = tensors_of(tmp_path / "model.gguf")
        for part, heads in (("q", 4), ("k", 2)):
            ours = lm.model.get_parameter(f"blocks.1.attn.{part}_proj.weight").detach().numpy()
            theirs = tensors[f"blk.1.attn_{part}.weight"].data
            rows = [
                head * 8 + (row // 2 + row % 2 * 4 if name == "llama" else row)
                for head in range(heads)
                for row in range(8)
            ]
            assert np.array_equal(theirs, ours[rows])


def test_fused_projections_hold_q_then_k_then_v(tmp_path):
    for name in ("gpt2", "starcoder", "gptneox"):
        lm, _ = exported(tmp_path / "model.gguf", name)
        for kind in ("weight", "bias"):
            parts = [lm.model.get_parameter(f"blocks.0.{part}.{kind}") for part in QKV]
            wanted = torch.cat(parts).detach().numpy()
            stored = tensors_of(tmp_path / "model.gguf")[f"blk.0.attn_qkv.{kind}"].data
            assert np.array_equal(stored, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_written_where_it_is_asked_for(name, tmp_path):
    lm, _ = exported(tmp_path / "model.gguf", name)
    own = MODELS[name][0] in ("gptneox", "stablelm") or not lm.config.tie_embeddings
    assert ("output.weight" in tensors_of(tmp_path / "model.gguf")) == own


def test_padded_ids_are_left_out(tmp_path):
    """Nothing keeps llama.cpp from writing them."""
    lm = make(padding=7)
    facts = export(lm, tmp_path / "model.gguf", "F32")
    assert "7 padded ids are left out" in facts["remarks"]
    back = read_gguf(tmp_path / "model.gguf")
    assert back.config.vocab_size == lm.tokenizer.vocab_size


@pytest.mark.parametrize("wild", [True, False])
def test_an_end_of_text_that_is_added_is_never_likely(tmp_path, wild):
    """Without one llama.cpp takes the id 11 for it; with one, it could be written."""
    # 256 ids in 32 dimensions point everywhere: no row makes one more improbable after all.
    lm = make(Tokenizer.byte() if wild else Tokenizer.char(TEXT))
    if not wild:  # states like a trained model's, to which a row can be fitted
        torch.manual_seed(0)
        lm.model.initialize()
        lm.model.norm_f.weight.data[:] = 10.0
        lm.model.tok_emb.weight.data += 0.1
    facts = export(lm, tmp_path / "model.gguf", "F16")
    n = lm.tokenizer.vocab_size
    assert facts["likeliest_end"] <= (1 / (n + 1) if wild else 1e-6)
    assert "an end-of-text token was added, because llama.cpp wants one" in facts["remarks"]
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == n
    assert fields["tokenizer.ggml.suppress_tokens"].contents() == [n]
    assert fields["tokenizer.ggml.tokens"].contents()[n] == "<|endoftext|>"
    back = read_gguf(tmp_path / "model.gguf")
    assert back.config.vocab_size == n + 1
    assert not back.config.tie_embeddings  # a row that is written like no other, and read like all


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (dict(GPT2, mlp="relu2"), "architecture gpt2 does not have mlp=relu2"),
        (dict(mlp="geglu"), "architecture llama does not have mlp=geglu"),
        (dict(norm_position="sandwich"), "no stock class"),
        (
            dict(qk_norm=True, rope_scaling=RopeScaling(type="llama3", factor=2.0)),
            "architecture qwen3 does not have rope_scaling.type=llama3",
        ),
        (
            dict(rope_scaling=RopeScaling(type="yarn", factor=2.0, beta_fast=16.0)),
            "beta_fast=16.0",
        ),
    ],
)
def test_what_llama_cpp_has_no_word_for_is_refused(switches, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export(make(**switches), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_layout_that_is_wrong_both_ways_is_seen_by_others(tmp_path, monkeypatch):
    """Names exchanged in writing and reading cancel out for us; transformers has its own."""
    norms = LLAMA.inner["attn_norm"], LLAMA.inner["mlp_norm"]
    monkeypatch.setitem(LLAMA.inner, "attn_norm", norms[1])
    monkeypatch.setitem(LLAMA.inner, "mlp_norm", norms[0])
    (tmp_path / "model.gguf").write_bytes(b"an earlier one")
    with pytest.raises(ParityError, match="logits of transformers") as refusal:
        export(make(), tmp_path / "model.gguf")
    assert refusal.value.exit_code == 8
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier one"]


def test_a_wrong_permutation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_neighbours", lambda rows, head_dim: rows)
    with pytest.raises(ParityError, match="differ by"):
        export(make(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"octavo\[hf\]"):
        export(make(), tmp_path / "model.gguf")
