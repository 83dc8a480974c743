"""Every stock class through files, both ways, with every parameter perturbed; and a trained model.

`tests/exchanging/test_huggingface.py` compares modules in memory. Here the whole way is walked:
ours to a directory that AutoModel loads, and back as a run; theirs in shards and half precision to
a run, and out again. What comes back is the same bit for bit.
"""

import copy
import json

import numpy as np
import pytest
import torch
from command_kit import figures, printed
from model_kit import perturb
from stock_kit import GPT2, NEOX, SMALL, THEIRS, assert_same_logits, stock, transformers
from training_kit import FOX, events
from training_kit import trained as learned

import octavo
from octavo.checkpoint import Run
from octavo.exchanging.exporting import export_huggingface
from octavo.exchanging.importing import import_model
from octavo.exchanging.parity import random_rows
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig, RopeScaling

OURS = {
    "gpt2": ("GPT2LMHeadModel", dict(GPT2, bias=True)),
    "gpt2, norm biases only": ("GPT2LMHeadModel", dict(GPT2, mlp="gelu", norm_bias=True)),
    "gpt2 untied": ("GPT2LMHeadModel", dict(GPT2, bias=True, tie_embeddings=False)),
    "bigcode": ("GPTBigCodeForCausalLM", dict(GPT2, bias=True, n_kv_head=1)),
    "starcoder2": ("Starcoder2ForCausalLM", dict(NEOX, n_kv_head=2, bias=True)),
    "gpt-neox": ("GPTNeoXForCausalLM", dict(NEOX, bias=True)),
    "stablelm": ("StableLmForCausalLM", dict(norm="layernorm", n_kv_head=2, norm_bias=True)),
    "llama": ("LlamaForCausalLM", dict(n_kv_head=2, rope_theta=500.0)),
    "llama untied, with biases": ("LlamaForCausalLM", dict(bias=True, tie_embeddings=False)),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True, head_dim=12, n_kv_head=2)),
    "yarn": (
        "LlamaForCausalLM",
        dict(rope_scaling=RopeScaling(type="yarn", factor=4.0, original_block_size=16)),
    ),
    "llama3": (
        "LlamaForCausalLM",
        dict(rope_scaling=RopeScaling(type="llama3", factor=8.0, original_block_size=16)),
    ),
}  # fmt: skip


def assert_same_bits(one, other):
    """All that one has; biases that only the other's class has are zero."""
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert not any(other[name].any() for name in other.keys() - one.keys())


@pytest.mark.parametrize("case", OURS)
def test_out_to_a_directory_and_back_as_a_run(case, tmp_path):
    name, switches = OURS[case]
    ours = perturb(GPT(ModelConfig(**(SMALL | switches))))
    rows = random_rows(31, 24)
    export_huggingface(
        ours, None, tmp_path / "out", rows, "random ids", name="it", architecture=name
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == name
    assert_same_logits(ours, theirs)
    imported = import_model(str(tmp_path / "out"), tmp_path / "run")
    assert imported["largest_difference"] <= 1e-5
    back = octavo.load(tmp_path / "run", device="cpu").model
    assert_same_bits(ours.state_dict(), back.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_in_from_half_precision_shards_and_out_again(name, tied, tmp_path):
    theirs = stock(name, tie_word_embeddings=tied)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16().float()
    half = copy.deepcopy(theirs).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    import_model(str(tmp_path / "theirs"), tmp_path / "run")
    lm = octavo.load(tmp_path / "run", device="cpu")
    assert lm.config.tie_embeddings is tied
    assert_same_logits(lm.model, theirs)
    rows = random_rows(31, 24)
    export_huggingface(
        lm.model, None, tmp_path / "out", rows, "random ids", name="it", architecture=name
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_logits(lm.model, again)
    assert_same_bits(theirs.state_dict(), again.state_dict())


LAYOUTS = {
    "SmolLM2": dict(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, intermediate_size=56,
        rope_theta=100000, rope_scaling=None, rope_interleaved=False, tie_word_embeddings=True,
        rms_norm_eps=1e-05, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
        pretraining_tp=1, use_cache=True, torch_dtype="bfloat16", is_llama_config=True,
        vocab_size=31, max_position_embeddings=24, num_hidden_layers=2, hidden_act="silu",
        transformers_version="4.40.1",
    ),
    "TinyLlama": dict(
        hidden_size=32, num_attention_heads=8, num_key_value_heads=4, intermediate_size=56,
        rope_scaling=None, tie_word_embeddings=False, rms_norm_eps=1e-05, pretraining_tp=1,
        vocab_size=31, max_position_embeddings=24, num_hidden_layers=2, hidden_act="silu",
        attention_bias=False, torch_dtype="float32", transformers_version="4.35.0",
    ),
    "Llama 3.2": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=1, intermediate_size=56,
        head_dim=12, rope_theta=500000.0, tie_word_embeddings=True, rms_norm_eps=1e-05,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8, "rope_type": "llama3"},
        vocab_size=31, max_position_embeddings=24, num_hidden_layers=2, hidden_act="silu",
        bos_token_id=1, eos_token_id=[2, 3, 4], transformers_version="4.45.0.dev0",
    ),
    "Llama of transformers 5": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56,
        head_dim=8, tie_word_embeddings=False, rms_norm_eps=1e-05, hidden_act="silu",
        rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
        vocab_size=31, max_position_embeddings=24, num_hidden_layers=2, dtype="float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_files_as_they_are_found(layout, tmp_path):
    """The configurations as their makers wrote them, only smaller, over weights of that shape."""
    given = LAYOUTS[layout] | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    theirs = perturb(transformers.LlamaForCausalLM(transformers.LlamaConfig(**given)))
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(given), encoding="utf-8")
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert imported["largest_difference"] <= 1e-5
    assert_same_logits(octavo.load(tmp_path / "run", device="cpu").model, theirs)


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Its file has no ``transformer.`` before its names, no head, and masks among the weights."""
    from safetensors.torch import load_file, save_file

    theirs = stock("GPT2LMHeadModel")
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    mask = torch.ones(24, 24).tril()[None, None]
    weights |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    save_file(weights, file)
    import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert_same_logits(octavo.load(tmp_path / "run", device="cpu").model, theirs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model that really learned something, with a separator and a padded vocabulary."""
    settings = (
        "model.block_size=32", "model.n_layer=2", "model.n_head=4", "model.n_kv_head=2",
        "model.d_model=32", "model.pad_vocab_to=64", "data.separator=true", "optim.lr=1e-2",
        "train.max_steps=60", "train.micro_batch_size=8",
        "eval.every=20", "eval.windows=8", "log.sample_every=0", "log.sample_tokens=5",
    )  # fmt: skip
    return learned(FOX, tmp_path_factory.mktemp("trained") / "run", *settings)


def test_a_trained_model_out_and_back_bit_for_bit(trained, tmp_path, capsys):
    facts = figures(capsys, "export", trained, tmp_path / "out", "--to", "hf")
    assert facts["text"] == "the run's validation text"
    assert facts["greedy_tokens"] > 0
    lm = octavo.load(trained, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "The quick brown "
    batch = tokenizer(prompt, return_tensors="pt")
    assert batch.input_ids[0].tolist() == lm.tokenizer.encode(prompt)
    written = theirs.generate(**batch, max_new_tokens=16, do_sample=False)[0]
    assert tokenizer.decode(written) == prompt + lm.generate(
        prompt, max_new_tokens=16, preset="greedy"
    )
    printed(capsys, "import", tmp_path / "out", tmp_path / "back")
    back = octavo.load(tmp_path / "back", device="cpu")
    assert_same_bits(lm.model.state_dict(), back.model.state_dict())
    assert back.tokenizer.fingerprint == lm.tokenizer.fingerprint
    assert back.generate("The ", max_new_tokens=20) == lm.generate("The ", max_new_tokens=20)


def test_the_card_says_what_the_run_recorded(trained, tmp_path, capsys):
    facts = figures(capsys, "export", trained, tmp_path / "out", "--to", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    run = Run.open(trained)
    step = json.loads((run.best / "manifest.json").read_bytes())["step"]
    (event,) = [event for event in events(trained, "eval") if event["step"] == step]
    data = json.loads((trained / "data.json").read_bytes())
    parameters = sum(p.numel() for p in octavo.load(trained, device="cpu").model.parameters())
    for true in (
        f"| Parameters | {parameters:,} |",
        f"| Validation loss | {event['val_loss']:.4f} nats a token |",
        f"| Validation bits per byte | {event['val_bpb']:.4f} |",
        f"| Steps | {step:,} |",
        f"| Tokens learned from | {step * 8 * 32:,} |",
        data["sha256"],
        f"{facts['perplexity']:.6g}",
    ):
        assert true in card, true


def test_padding_is_never_written(trained, tmp_path, capsys):
    """The vocabulary is padded to 64: transformers must not write what octavo never would."""
    printed(capsys, "export", trained, tmp_path / "out", "--to", "hf")
    lm = octavo.load(trained, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert lm.tokenizer.vocab_size < 64 == theirs.config.vocab_size
    with torch.no_grad():
        theirs.get_output_embeddings().weight[lm.tokenizer.vocab_size :] += 100.0
    prompt = torch.tensor([lm.tokenizer.encode("The ")])
    written = theirs.generate(prompt, max_new_tokens=8, do_sample=False)[0].numpy()
    assert (written < lm.tokenizer.vocab_size).all()
    assert np.array_equal(written[:4], prompt[0])
