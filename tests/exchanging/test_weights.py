"""Directories of weights, sound and spoilt: all of it used, none of it invented, nothing executed.

No test here needs transformers: octavo reads these files itself.
"""

import json
import pickle
from contextlib import suppress

import pytest
import torch
from model_kit import random_model
from run_kit import Canary
from safetensors.torch import load_file, save_file

from octavo.errors import CheckpointError
from octavo.exchanging.families import choose_family
from octavo.exchanging.weights import INDEX, read_directory
from octavo.model_config import ModelConfig

SIZES = dict(vocab_size=31, block_size=24, n_layer=2, n_head=4, d_model=32, d_ff=56)


def write(folder, **switches):
    """A directory in Hugging Face's layout, and the model it holds, nothing at its default."""
    model = random_model(ModelConfig(**SIZES, **switches), 3, noise=0.2)
    family = choose_family(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"architectures": [family.name]} | family.options(model.config)
    (folder / "config.json").write_text(json.dumps(options), encoding="utf-8")
    weights = family.to_theirs(model.config, model.state_dict())
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors")
    return model


def shard(folder):
    """Cut a directory's one file in two."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number, name in enumerate(sorted(weights)):
        places[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    for place in set(places.values()):
        save_file({n: weights[n] for n in weights if places[n] == place}, folder / place)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return places


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whatever_the_precision_numbers_come_as_they_are(dtype, tmp_path):
    model = write(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({n: t.to(dtype) for n, t in weights.items()}))
    read, family, files = read_directory(tmp_path)
    assert family.name == "LlamaForCausalLM"
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert not read.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.to(dtype).float()), name


def test_shards_are_one_model(tmp_path):
    model = write(tmp_path)
    shard(tmp_path)
    read, _, files = read_directory(tmp_path)
    assert len(files) == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_a_tensor_comes_from_the_shard_that_the_index_names(tmp_path):
    """Another copy of it elsewhere is not the weights."""
    model = write(tmp_path)
    places = shard(tmp_path)
    shards = {place: load_file(tmp_path / place) for place in set(places.values())}
    everything = {name: shards[place][name] for name, place in places.items()}
    decoys = {name: torch.zeros_like(tensor) for name, tensor in everything.items()}
    for place, weights in shards.items():
        save_file(decoys | weights, tmp_path / place)
    read, _, _ = read_directory(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "place",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "", 7, None],
)
def test_an_index_cannot_lead_out_of_its_directory(place, tmp_path):
    write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "x.safetensors")
    content = {"weight_map": {"model.norm.weight": place}}
    (tmp_path / "model" / INDEX).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"places model\.norm\.weight in"):
        read_directory(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none(content, tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_directory(tmp_path)


def test_a_shard_that_is_missing_or_lacks_what_was_promised(tmp_path):
    write(tmp_path)
    places = shard(tmp_path)
    file = tmp_path / places["model.norm.weight"]
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        read_directory(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot read model-0000"):
        read_directory(tmp_path)


def test_a_missing_tensor_is_named_not_made_up(tmp_path):
    write(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"misses model\.layers\.1\.mlp\.up_proj\.weight"):
        read_directory(tmp_path)


def test_a_missing_bias_is_not_a_zero_one(tmp_path):
    write(tmp_path, position="learned", norm="layernorm", mlp="gelu_tanh", bias=True)
    rewrite(tmp_path, lambda weights: weights.pop("transformer.h.1.attn.c_attn.bias"))
    with pytest.raises(CheckpointError, match=r"misses transformer\.h\.1\.attn\.c_attn\.bias"):
        read_directory(tmp_path)


def test_a_tensor_nobody_asked_for_is_named(tmp_path):
    write(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.sink": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"has an unknown model\.sink"):
        read_directory(tmp_path)


def test_biases_are_where_the_options_say(tmp_path):
    """Llama's attention may have biases and its MLP none; ours has both or neither."""
    model = write(tmp_path, bias=True)
    options = json.loads((tmp_path / "config.json").read_bytes()) | {"mlp_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(options), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has an unknown .*mlp\..*bias"):
        read_directory(tmp_path)
    mlp = "model.layers.{}.mlp.{}_proj.bias"
    names = [mlp.format(layer, part) for layer in range(2) for part in ("gate", "up", "down")]
    rewrite(tmp_path, lambda weights: [weights.pop(name) for name in names])
    read, _, _ = read_directory(tmp_path)
    assert not read.blocks[0].mlp.up_proj.bias.any()
    assert torch.equal(read.blocks[0].attn.q_proj.bias, model.blocks[0].attn.q_proj.bias)


def test_both_shapes_are_named(tmp_path):
    write(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(33)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(33,\), not \(32,\)"):
        read_directory(tmp_path)


def test_a_configuration_far_larger_than_its_weights_costs_nothing(tmp_path):
    """Its shapes are compared before anything of that size is allocated."""
    write(tmp_path)
    options = json.loads((tmp_path / "config.json").read_bytes())
    for change in ({"num_hidden_layers": 90_000}, {"intermediate_size": 2**39}):
        content = json.dumps(options | change)
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"misses layer 89999|has shape"):
            read_directory(tmp_path)


def test_integers_are_no_weights(tmp_path):
    write(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight is of type torch\.int8"):
        read_directory(tmp_path)


def test_a_head_that_is_not_the_embedding_it_is_said_to_be(tmp_path):
    model = write(tmp_path)
    tied = model.tok_emb.weight.detach()
    rewrite(tmp_path, lambda weights: weights.update({"lm_head.weight": tied.clone()}))
    assert torch.equal(read_directory(tmp_path)[0].lm_head.weight, tied)
    rewrite(tmp_path, lambda weights: weights.update({"lm_head.weight": tied + 1}))
    with pytest.raises(CheckpointError, match="though the configuration ties them"):
        read_directory(tmp_path)


def test_buffers_of_older_files_are_no_weights(tmp_path):
    model = write(tmp_path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tmp_path, lambda weights: weights.update(buffer))
    read, _, _ = read_directory(tmp_path)
    assert torch.equal(read.tok_emb.weight, model.tok_emb.weight)


def test_a_pickle_is_not_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match="pickle, which could run code and is not opened"):
        read_directory(tmp_path)
    assert not (tmp_path / "canary").exists()


def header(text, length=None):
    """A safetensors file of nothing but a header, which claims to be ``length`` bytes long."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(shape, end):
    return json.dumps(
        {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
    ).encode()


HOSTILE = {
    "empty": b"",
    "short": b"\x01",
    "a length beyond the file": header(b"{}", 2**40),
    "the largest length": header(b"{}", 2**63 - 1),
    "no JSON": header(b"{{{{"),
    "a list": header(b"[]"),
    "deep": header(b'{"a":' * 40_000),
    "no data": header(entry([32], 128)),
    "data of another length": header(entry([32], 64)) + bytes(64),
    "an overflowing shape": header(entry([2**32, 2**32, 2**32], 128)) + bytes(128),
    "nothing in it": header(b"{}"),
    "tied to nothing": header(b'{"__metadata__": {"tied": "{\\"a\\": \\"b\\"}"}}'),
    "tied by a list": header(b'{"__metadata__": {"tied": "[1]"}}'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(kind, tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError):
        read_directory(tmp_path)


def test_any_damaged_byte_of_a_header_is_an_error_or_harmless(tmp_path):
    write(tmp_path)
    sound = (tmp_path / "model.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        spoilt = bytearray(sound)
        place = int(torch.randint(0, 1500, (1,), generator=generator))
        spoilt[place] ^= int(torch.randint(1, 256, (1,), generator=generator))
        (tmp_path / "model.safetensors").write_bytes(spoilt)
        with suppress(CheckpointError):
            read_directory(tmp_path)
