"""Logits equal transformers' for every stock class, both ways, with every parameter perturbed.

At default initialisation biases are zero, norm weights one and attention nearly uniform: a dropped
bias, an exchanged norm or a wrong permutation of heads would hide. Nothing is left at its default.
"""

import json
import sys

import pytest
import torch
from model_kit import perturb
from stock_kit import GPT2, NEOX, SMALL, THEIRS, assert_same_logits, stock, transformers

from octavo.errors import CheckpointError, ConfigError, MissingExtraError
from octavo.exchanging.families import FAMILIES, PLAIN, SYNONYMS, choose_family, find_family
from octavo.exchanging.huggingface import from_huggingface, to_huggingface
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig, RopeScaling

# One of ours for each class and each of its switches; the class is the one that export must choose.
OURS = {
    "gpt2": ("GPT2LMHeadModel", dict(GPT2, bias=True)),
    "gpt2 without biases": ("GPT2LMHeadModel", dict(GPT2)),
    "gpt2 with norm biases only": ("GPT2LMHeadModel", dict(GPT2, norm_bias=True)),
    "gpt2 untied, relu2": ("GPT2LMHeadModel", dict(GPT2, mlp="relu2", tie_embeddings=False)),
    "bigcode": ("GPTBigCodeForCausalLM", dict(GPT2, bias=True, n_kv_head=1)),
    "starcoder2": ("Starcoder2ForCausalLM", dict(NEOX, bias=True)),
    "starcoder2 grouped": ("Starcoder2ForCausalLM", dict(NEOX, n_kv_head=2, mlp="silu")),
    "starcoder2 multi-query": ("Starcoder2ForCausalLM", dict(NEOX, n_kv_head=1, mlp="relu")),
    "stablelm": ("StableLmForCausalLM", dict(norm="layernorm", n_kv_head=2, norm_bias=True)),
    "stablelm multi-query": ("StableLmForCausalLM", dict(norm="layernorm", n_kv_head=1)),
    "llama": ("LlamaForCausalLM", dict(n_kv_head=2, norm_eps=1e-3)),
    "llama untied": ("LlamaForCausalLM", dict(tie_embeddings=False, rope_theta=500.0)),
    "llama with biases, geglu": ("LlamaForCausalLM", dict(bias=True, mlp="geglu")),
    "llama with wide heads": ("LlamaForCausalLM", dict(head_dim=12, n_kv_head=2)),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True, n_kv_head=2)),
    "qwen3 with wide heads": ("Qwen3ForCausalLM", dict(qk_norm=True, head_dim=12)),
}
SCALINGS = {
    "linear": RopeScaling(type="linear", factor=2.5),
    "ntk": RopeScaling(type="ntk", factor=4.0),
    "yarn": RopeScaling(type="yarn", factor=4.0, original_block_size=16, beta_fast=2.0),
    "yarn with a factor": RopeScaling(type="yarn", factor=2.0, attention_factor=0.8),
    "llama3": RopeScaling(type="llama3", factor=8.0, original_block_size=16, high_freq_factor=2.5),
}
for name, scaling in SCALINGS.items():
    OURS[f"llama, {name}"] = ("LlamaForCausalLM", dict(rope_scaling=scaling))


@pytest.mark.parametrize("case", OURS)
def test_out_and_back(case):
    name, switches = OURS[case]
    ours = perturb(GPT(ModelConfig(**(SMALL | switches))))
    theirs = to_huggingface(ours)
    assert type(theirs).__name__ == name
    assert_same_logits(ours, theirs)
    back = from_huggingface(theirs)
    assert_same_logits(back, theirs)
    weights = back.state_dict()
    for key, tensor in ours.state_dict().items():  # bit for bit; biases we lack came back as zeros
        assert torch.equal(weights[key], tensor), key
    assert all(not weights[key].any() for key in weights.keys() - ours.state_dict().keys())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_in_and_out_again(name, tied):
    theirs = stock(name, tie_word_embeddings=tied)
    ours = from_huggingface(theirs)
    assert ours.config.tie_embeddings is tied
    assert_same_logits(ours, theirs)
    again = to_huggingface(ours, name)
    assert_same_logits(ours, again)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("activation", [*PLAIN.values(), *SYNONYMS])
def test_every_spelling_of_every_activation(activation):
    theirs = stock("GPT2LMHeadModel", activation_function=activation)
    assert_same_logits(from_huggingface(theirs), theirs)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rope_scaling_in(kind):
    parameters = {"rope_type": kind, "rope_theta": 300.0, "factor": 3.0}
    parameters |= {"original_max_position_embeddings": 8} if kind != "linear" else {}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 3.0} if kind == "llama3" else {}
    theirs = stock("LlamaForCausalLM", rope_parameters=parameters)
    ours = from_huggingface(theirs)
    assert ours.config.rope_scaling.type == kind
    assert_same_logits(ours, theirs)


def test_rope_scaling_as_older_files_spell_it():
    older = dict(rope_theta=300.0, rope_scaling={"type": "linear", "factor": 3.0})
    theirs = stock("LlamaForCausalLM", **older)
    ours = from_huggingface(theirs)
    assert ours.config.rope_theta == 300.0
    assert ours.config.rope_scaling == RopeScaling(type="linear", factor=3.0)
    assert_same_logits(ours, theirs)


REFUSED = {
    "use_parallel_residual=True": ("GPTNeoXForCausalLM", dict(use_parallel_residual=True)),
    "partial_rotary_factor=0.25": ("StableLmForCausalLM", dict(partial_rotary_factor=0.25)),
    "use_qkv_bias=True": ("StableLmForCausalLM", dict(use_qkv_bias=True)),
    "qk_layernorm=True": ("StableLmForCausalLM", dict(qk_layernorm=True)),
    "sliding_window=8": ("Starcoder2ForCausalLM", dict(sliding_window=8)),
    "scale_attn_by_inverse_layer_idx=True": (
        "GPT2LMHeadModel",
        dict(scale_attn_by_inverse_layer_idx=True),
    ),
    "multi_query=False": ("GPTBigCodeForCausalLM", dict(multi_query=False)),
    "attention_bias=True": ("Qwen3ForCausalLM", dict(attention_bias=True)),
    "use_sliding_window=True": ("Qwen3ForCausalLM", dict(use_sliding_window=True)),
    "hidden_act='gelu_pytorch_tanh'": ("LlamaForCausalLM", dict(hidden_act="gelu_pytorch_tanh")),
    "rope_type='dynamic'": (
        "LlamaForCausalLM",
        dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ),
    "rope_parameters.truncate=False": (
        "LlamaForCausalLM",
        dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                              "original_max_position_embeddings": 12, "truncate": False}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(option):
    name, options = REFUSED[option]
    with pytest.raises(ConfigError, match=option):
        from_huggingface(stock(name, **options))


@pytest.mark.parametrize(
    ("switches", "wanted"),
    [
        (dict(position="both"), "position=rope"),
        (dict(position="none"), "position=rope"),
        (dict(norm_position="sandwich"), "norm_position=pre"),
        (dict(norm_position="post", norm="layernorm"), "norm_position=pre"),
        (dict(GPT2, mlp="swiglu"), "mlp=gelu"),
        (dict(GPT2, n_kv_head=2), "n_kv_head=4"),
        (dict(mlp="gelu"), "norm=layernorm"),
        (dict(norm="layernorm", bias=True), "bias=False"),
        (dict(qk_norm=True, bias=True), "bias=False"),
        (dict(GPT2, head_dim=12), "head_dim=8"),
        (dict(d_model=30, head_dim=8), "divisible"),
    ],
)
def test_no_stock_class_is_an_error_that_says_what_would_help(switches, wanted):
    config = ModelConfig(**(SMALL | switches))
    with pytest.raises(ConfigError, match="no stock class") as caught:
        choose_family(config)
    assert wanted in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_class_can_be_asked_for():
    config = ModelConfig(**(SMALL | NEOX))
    assert choose_family(config).name == "Starcoder2ForCausalLM"
    assert choose_family(config, "GPTNeoXForCausalLM").name == "GPTNeoXForCausalLM"
    with pytest.raises(ConfigError, match="GPT2LMHeadModel does not hold"):
        choose_family(config, "GPT2LMHeadModel")


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM.*Qwen3ForCausalLM"):
        find_family("Qwen2ForCausalLM")
    with pytest.raises(ConfigError, match="Linear"):
        from_huggingface(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_configurations_are_inverse(family):
    """Everything a class can say about a model survives the way out and back."""
    theirs = stock(family.name).config
    config = family.config(theirs)
    again = getattr(transformers, family.name).config_class(**family.options(config))
    assert family.config(again) == config


def test_a_directory(tmp_path):
    theirs = stock("LlamaForCausalLM")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(from_huggingface(tmp_path), theirs)
    assert_same_logits(from_huggingface(str(tmp_path)), theirs)


def test_a_directory_with_a_hole_is_refused_not_filled_with_noise(tmp_path):
    """transformers initialises what a file lacks at random and goes on with a warning."""
    from safetensors.torch import load_file, save_file

    stock("LlamaForCausalLM").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"misses model\.layers\.1\.mlp\.up_proj\.weight"):
        from_huggingface(tmp_path)


def test_a_bias_that_the_configuration_denies_is_refused_but_old_buffers_are_not(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = stock("StableLmForCausalLM")
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(from_huggingface(tmp_path), theirs)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has an unknown .*q_proj\.bias"):
        from_huggingface(tmp_path)


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="not a Hugging Face directory"):
        from_huggingface(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no JSON"):
        from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="names no architecture"):
        from_huggingface(tmp_path)
    description = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError), match="does not give"):
        from_huggingface(tmp_path)


def test_shapes_are_compared():
    theirs = stock("LlamaForCausalLM")
    theirs.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(33,\), not \(32,\)"):
        from_huggingface(theirs)


def test_a_weight_without_a_place_is_named():
    theirs = stock("LlamaForCausalLM")
    theirs.model.layers[0].self_attn.register_parameter("sink", torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has an unknown .*sink"):
        from_huggingface(theirs)


def test_without_transformers_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"octavo\[hf\]"):
        to_huggingface(GPT(ModelConfig(**SMALL)))
