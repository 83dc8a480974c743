"""PEFT loads our adapters and we load PEFT's, for every stock class, with nothing at its default.

PEFT's own model is the judge in both directions: it is built here, apart from the code under test.
"""

import copy
import json
import sys
from functools import partial

import pytest
import stock_kit
import torch
from model_kit import perturb
from safetensors.torch import load_file, save_file
from stock_kit import SMALL, ids

from octavo.adapting.lora import adapted_layers, add_adapter, use_adapters
from octavo.adapting.surgery import linear_layers
from octavo.errors import CheckpointError, ConfigError, MissingExtraError, ParityError
from octavo.exchanging import peft as exchange
from octavo.exchanging.huggingface import from_huggingface, to_huggingface
from octavo.exchanging.peft import from_peft, to_peft
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig

peft = pytest.importorskip("peft")
assert_same_logits = partial(stock_kit.assert_same_logits, tolerance=1e-6)

GPT2 = dict(position="learned", norm="layernorm", mlp="gelu_tanh", bias=True)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["up_proj", "down_proj"]

# One of ours for each class, and the module names that PEFT's users know there.
OURS = {
    "LlamaForCausalLM": dict(n_kv_head=2, tie_embeddings=False),
    "Qwen3ForCausalLM": dict(qk_norm=True, n_kv_head=2, head_dim=12),
    "StableLmForCausalLM": dict(norm="layernorm", n_kv_head=2),
    "Starcoder2ForCausalLM": dict(norm="layernorm", mlp="gelu", bias=True, n_kv_head=2),
    "GPTNeoXForCausalLM": dict(norm="layernorm", mlp="gelu", bias=True),
    "GPT2LMHeadModel": GPT2,
    "GPTBigCodeForCausalLM": dict(GPT2, n_kv_head=1),
}
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
THEIRS = {
    "LlamaForCausalLM": SPLIT + GATED,
    "Qwen3ForCausalLM": SPLIT + GATED,
    "StableLmForCausalLM": SPLIT + GATED,
    "Starcoder2ForCausalLM": [*SPLIT, "c_fc", "c_proj"],
    "GPTNeoXForCausalLM": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "GPT2LMHeadModel": ["c_attn", "c_fc", "c_proj"],
    "GPTBigCodeForCausalLM": ["c_attn", "c_fc", "c_proj"],
}
FUSED = ("GPTNeoXForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM")


def base(name):
    torch.manual_seed(3)
    return perturb(GPT(ModelConfig(**(SMALL | OURS[name]))))


def linear_names(model):
    kinds = dict.fromkeys(path.rpartition(".")[2] for path, _ in linear_layers(model))
    return [kind for kind in kinds if kind != "lm_head" or not model.config.tie_embeddings]


def matrices(model, name="default"):
    """An adapter's matrices by what they belong to."""
    state = model.state_dict()
    return {key.removesuffix(name): state[key] for key in state if key.endswith(f".{name}")}


def assert_moved(adapted, plain):
    """The adapter does something, or the comparison is of nothing."""
    assert (adapted - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.fixture
def peft_adapter(tmp_path):
    """Write an adapter of PEFT's own for a base of ours, as its users do."""

    def make(model, name, **options):
        stock = to_huggingface(model, name)
        options = dict(r=3, lora_alpha=7, target_modules=THEIRS[name]) | options
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        theirs = perturb(peft.get_peft_model(stock, config), only="lora_")
        directory = tmp_path / "theirs"
        theirs.save_pretrained(directory)
        return directory, theirs

    return make


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft(name, tmp_path):
    model = base(name)
    plain, stock = model(ids()), to_huggingface(model, name)
    add_adapter(model, "voice", rank=3, alpha=5.0, targets=linear_names(model))
    perturb(model, only="lora_")
    add_adapter(model, "noise", rank=2)  # another one, in use: it stays behind
    difference = to_peft(model, "voice", tmp_path / "out", "a/base", name)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "out").eval()
    use_adapters(model, {"voice": 1.0})
    assert_moved(assert_same_logits(model, theirs), plain)
    assert 0 <= difference <= 1e-6
    theirs.save_pretrained(tmp_path / "again")
    first, second = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "again")
    )
    # For an adapted head PEFT keeps the base's weight too, though it has not changed.
    assert first.keys() == {key for key in second if ".base_layer." not in key}
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", THEIRS)
def test_peft_s_in_ours(name, peft_adapter):
    model = base(name)
    plain = model(ids())
    directory, theirs = peft_adapter(model, name)
    difference = from_peft(directory, model)
    assert_moved(assert_same_logits(model, theirs), plain)
    assert 0 <= difference <= 1e-6
    use_adapters(model, {})
    assert torch.equal(model(ids()), plain)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], ["v_proj", "up_proj"], ATTENTION])
@pytest.mark.parametrize("name", OURS)
def test_out_and_back_is_the_same_adapter_bit_for_bit(name, targets, tmp_path):
    """Where q, k and v are fused, three adapters leave as one of rank 9 and come back as three."""
    model = base(name)
    other = copy.deepcopy(model)
    add_adapter(model, rank=3, alpha=5.0, targets=targets)
    perturb(model, only="lora_")
    to_peft(model, "default", tmp_path / "out", "", name)
    from_peft(tmp_path / "out", other, "back")
    there, back = matrices(model), matrices(other, "back")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) for key in there)
    assert torch.equal(other(ids()), model(ids()))
    alphas = {layer.alpha["back"] for layer in adapted_layers(other, "back").values()}
    assert alphas == {5.0}


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))


def test_what_the_configuration_says(tmp_path):
    model = base("GPT2LMHeadModel")
    add_adapter(model, rank=4, alpha=8.0, dropout=0.25, targets=["q_proj", "k_proj"])
    to_peft(model, "default", tmp_path / "out", "gpt2")
    assert config_of(tmp_path / "out") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "gpt2",
        "r": 8,  # q and k in one: twice the rank, twice the alpha, the same scale
        "lora_alpha": 16,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.25,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }


def test_targets_mean_the_adapted_modules_and_no_others(tmp_path):
    """In GPT-2 the attention's and the MLP's last layers have the same name."""
    wanted = {
        "o_proj": ["attn.c_proj"],
        "up_proj": ["c_fc"],
        "blocks.1.mlp.down_proj": ["transformer.h.1.mlp.c_proj"],
    }
    for target, endings in wanted.items():
        model = base("GPT2LMHeadModel")
        stock = to_huggingface(model)
        names = add_adapter(model, rank=2, targets=[target])
        perturb(model, only="lora_")
        to_peft(model, "default", tmp_path / target, "")
        assert config_of(tmp_path / target)["target_modules"] == endings
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path / target).eval()
        assert sum(hasattr(module, "lora_A") for module in theirs.modules()) == len(names)
        assert_same_logits(model, theirs)


def test_layers_of_unlike_rank_and_scale_go_out_and_come_in(tmp_path):
    model = base("GPT2LMHeadModel")
    stock, other = to_huggingface(model), copy.deepcopy(model)
    add_adapter(model, rank=2, alpha=3.0, targets=["q_proj"])
    add_adapter(model, rank=5, alpha=4.0, targets=["v_proj", "down_proj"])
    add_adapter(model, rank=1, alpha=1.0, targets=["blocks.0.mlp.up_proj"])
    perturb(model, only="lora_")
    to_peft(model, "default", tmp_path / "out", "")
    config = config_of(tmp_path / "out")
    patterns = config["rank_pattern"]
    assert {config["r"], *patterns.values()} == {1, 5, 7}
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "out").eval()
    assert_same_logits(model, theirs)
    from_peft(tmp_path / "out", other)
    assert_same_logits(other, theirs)
    came, went = matrices(other), matrices(model)
    assert {key: t.shape for key, t in came.items()} == {key: t.shape for key, t in went.items()}


OPTIONS = {
    "rslora": dict(use_rslora=True),
    "patterns": dict(
        rank_pattern={"k_proj": 5, r"layers\.1\.mlp\.up_proj": 2, ".*gate_proj": 4},
        alpha_pattern={"o_proj": 1.5, "layers.0.self_attn.q_proj": 11},
    ),
    "rslora with patterns": dict(use_rslora=True, rank_pattern={"v_proj": 6}),
    "dropout": dict(lora_dropout=0.5),
    "one layer": dict(layers_to_transform=[1], layers_pattern="layers"),
    "a regular expression": dict(target_modules=r".*\.1\..*(q|down)_proj"),
    "all of them": dict(target_modules="all-linear"),
    "the head": dict(target_modules=["lm_head", "v_proj"]),
    "another beginning": dict(init_lora_weights="gaussian"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_peft(case, peft_adapter):
    model = base("LlamaForCausalLM")
    directory, theirs = peft_adapter(model, "LlamaForCausalLM", **OPTIONS[case])
    plain = model(ids())
    from_peft(directory, model, "voice")
    assert_moved(assert_same_logits(model, theirs), plain)
    rate = OPTIONS[case].get("lora_dropout", 0.0)
    layers = adapted_layers(model, "voice").values()
    assert {layer.dropout["voice"] for layer in layers} == {rate}
    assert len(layers) == sum(hasattr(module, "lora_A") for module in theirs.modules())


def test_an_untrained_fused_adapter_stays_trainable(peft_adapter):
    """Its B is zero everywhere: that says nothing about which parts are used."""
    model = base("GPT2LMHeadModel")
    stock = to_huggingface(model)
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM")
    directory, plain = peft_adapter(model, "GPT2LMHeadModel")[0], model(ids())
    peft.get_peft_model(stock, config).save_pretrained(directory)
    from_peft(directory, model)
    assert torch.equal(model(ids()), plain)
    layers = adapted_layers(model, "default")
    assert len(layers) == 6
    assert {len(layer.lora_A["default"]) for layer in layers.values()} == {3}


REFUSED = {
    "use_dora=True": dict(use_dora=True),
    "bias='all'": dict(bias="all"),
    "bias='lora_only'": dict(bias="lora_only"),
    r"modules_to_save=\['lm_head'\]": dict(modules_to_save=["lm_head"]),
    "init_lora_weights='pissa'": dict(init_lora_weights="pissa"),
    "lora_bias=True": dict(lora_bias=True),
    "peft_type='LOHA'": dict(peft_type="LOHA"),
    "peft_type=None": dict(peft_type=None),
    "use_tomorrow=True": dict(use_tomorrow=True),
}


@pytest.fixture
def llama(peft_adapter):
    """A model, a directory with an adapter for it, and a way to change its configuration."""
    model = base("LlamaForCausalLM")
    directory, _ = peft_adapter(model, "LlamaForCausalLM")

    def change(**options):
        content = json.dumps(config_of(directory) | options)
        (directory / "adapter_config.json").write_text(content, encoding="utf-8")

    return model, directory, change


@pytest.mark.parametrize("option", REFUSED)
def test_what_changes_the_function_is_refused_by_name(option, llama):
    model, directory, change = llama
    change(**REFUSED[option])
    with pytest.raises(ConfigError, match=f"an adapter with {option} is not"):
        from_peft(directory, model)


DAMAGED = {
    "r is 'eight'": dict(r="eight"),
    "r is 0": dict(r=0),
    "lora_alpha is None|lora_alpha is nan": dict(lora_alpha=float("nan")),
    "lora_dropout is 2": dict(lora_dropout=2),
    "rank_pattern is 3": dict(rank_pattern=3),
    "makes no sense for .*rank_pattern is -1": dict(rank_pattern={"q_proj": -1}),
    "makes no sense for .*alpha_pattern is 'x'": dict(alpha_pattern={"q_proj": "x"}),
    "makes no sense for .*unterminated": dict(rank_pattern={"(q_proj": 4}),
    r"lora_A of .*down_proj has shape \(3, 56\), not \(4, 56\)": dict(r=4),
    r"lora_A of .*k_proj has shape \(3, 32\), not \(2, 32\)": dict(rank_pattern={"k_proj": 2}),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_configuration_that_cannot_be_true_is_damage(message, llama):
    model, directory, change = llama
    before = dict(linear_layers(model))
    change(**DAMAGED[message])
    with pytest.raises(CheckpointError, match=message):
        from_peft(directory, model)
    assert dict(linear_layers(model)) == before


def test_bad_json_and_missing_files(llama):
    model, directory, _ = llama
    for content in ("{", "[1]", "\x00"):
        (directory / "adapter_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            from_peft(directory, model)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read adapter_config"):
        from_peft(directory, model)


def test_matrices_that_do_not_fit_are_named(llama):
    model, directory, _ = llama
    file = directory / "adapter_model.safetensors"
    good = load_file(file)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    bad = {
        "q_proj lacks its lora_B": {
            key: tensor for key, tensor in good.items() if key != f"{stem}B.weight"
        },
        r"lora_B of .*q_proj has shape \(16, 3\), not \(32, 3\)": good
        | {f"{stem}B.weight": torch.ones(16, 3)},
        r"changes model\.layers\.7\.mlp\.up_proj, which LlamaForCausalLM has not": good
        | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 32)},
        r"embed_tokens\.lora_embedding_A is no matrix": good
        | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 31)},
        r"made for another weight of model\.layers\.0\.self_attn\.q_proj": good
        | {
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(32, 32)
        },
        "holds no adapter": {},
    }
    for message, tensors in bad.items():
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=message):
            from_peft(directory, model)
    file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot read adapter_model"):
        from_peft(directory, model)
    file.unlink()  # what an old version of PEFT wrote is a pickle: it is not opened
    (directory / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read adapter_model"):
        from_peft(directory, model)


def test_an_adapter_for_a_class_the_model_is_not(peft_adapter):
    directory, _ = peft_adapter(base("GPT2LMHeadModel"), "GPT2LMHeadModel")
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.attn\.c_attn, which Llama"):
        from_peft(directory, base("LlamaForCausalLM"))


def test_a_fused_adapter_too_wide_for_a_part_is_refused_before_anything_is_changed(peft_adapter):
    name = "GPTBigCodeForCausalLM"
    model = base(name)  # its keys are 8 wide
    before = dict(linear_layers(model))
    directory, _ = peft_adapter(model, name, r=9, rank_pattern={"h.0.attn.c_attn": 2})
    with pytest.raises(ConfigError, match=r"rank 9 does not fit blocks\.1\.attn\.k_proj"):
        from_peft(directory, model)
    assert dict(linear_layers(model)) == before


def test_a_name_that_is_taken(llama):
    model, directory, _ = llama
    add_adapter(model, "voice", rank=2, targets=["v_proj"])
    with pytest.raises(ConfigError, match="has an adapter 'voice' already"):
        from_peft(directory, model, "voice")
    assert list(adapted_layers(model, "voice")) == [f"blocks.{i}.attn.v_proj" for i in range(2)]
    add_adapter(model, "head", rank=2, targets=["lm_head"])  # which theirs has nothing for
    with pytest.raises(ConfigError, match="lm_head has an adapter 'head' already"):
        from_peft(directory, model, "head")
    from_peft(directory, model, "other")


def test_an_adapter_that_is_none_and_a_model_that_has_no_class(tmp_path):
    model = base("LlamaForCausalLM")
    with pytest.raises(ConfigError, match="no adapter 'default'"):
        to_peft(model, "default", tmp_path / "out", "")
    both = GPT(ModelConfig(**SMALL, position="both"))
    add_adapter(both, rank=2)
    with pytest.raises(ConfigError, match="no stock class"):
        to_peft(both, "default", tmp_path / "out", "")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_occupied(tmp_path):
    model = base("LlamaForCausalLM")
    add_adapter(model, rank=2)
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        to_peft(model, "default", tmp_path, "")
    to_peft(model, "default", tmp_path, "", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "mine.txt",
    ]


def test_nothing_is_left_of_an_adapter_that_peft_computes_otherwise(tmp_path, monkeypatch):
    model = base("GPT2LMHeadModel")
    add_adapter(model, rank=2, targets=["q_proj", "v_proj"])
    perturb(model, only="lora_")
    right = exchange._fused

    def exchanged(*everything):
        """Rows in the wrong order, as a slip with fused projections would have them."""
        adapter = right(*everything)
        return exchange.Adapter(adapter.A, adapter.B.roll(32, 0), adapter.alpha)

    monkeypatch.setattr(exchange, "_fused", exchanged)
    with pytest.raises(ParityError, match="the logits of peft"):
        to_peft(model, "default", tmp_path / "out", "")
    assert not list(tmp_path.iterdir())


def test_reading_needs_no_peft_and_writing_says_that_it_does(llama, tmp_path, monkeypatch):
    model, directory, _ = llama
    theirs = peft.PeftModel.from_pretrained(to_huggingface(model), directory).eval()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert from_peft(directory, model) is None
    assert_same_logits(model, theirs)
    with pytest.raises(MissingExtraError, match=r"octavo\[hf\]"):
        to_peft(model, "default", tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_an_imported_model(peft_adapter):
    """A model that came from transformers takes adapters made for the original."""
    stock = to_huggingface(base("GPTNeoXForCausalLM"), "GPTNeoXForCausalLM")
    ours = from_huggingface(stock)  # which could as well be a Starcoder2
    directory, theirs = peft_adapter(ours, "GPTNeoXForCausalLM", target_modules=["query_key_value"])
    from_peft(directory, ours)
    assert_same_logits(ours, theirs)
