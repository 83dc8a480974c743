"""A linear layer is whatever has in_features and out_features, and a swap is all or nothing."""

import pytest
import torch
from torch import nn

from octavo.adapting.surgery import linear_layers, swap_linear
from octavo.errors import ConfigError
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig

SMALL = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=8, d_ff=12)


class Doubled(nn.Module):
    """Contains a linear layer, and is one to the outside."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def test_every_linear_layer_by_name():
    names = [name for name, _ in linear_layers(GPT(ModelConfig(**SMALL)))]
    projections = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj")
    block = (*projections, "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    assert names == [f"blocks.{i}.{name}" for i in range(2) for name in block] + ["lm_head"]


def test_only_what_matches_is_swapped():
    model = GPT(ModelConfig(**SMALL))
    before = dict(linear_layers(model))
    swapped = swap_linear(model, lambda name, _: name.endswith("v_proj"), Doubled)
    assert swapped == ["blocks.0.attn.v_proj", "blocks.1.attn.v_proj"]
    for name, layer in linear_layers(model):  # under the same names: what is inside is not seen
        if name in swapped:
            assert layer.base is before[name]
        else:
            assert layer is before[name]


def test_a_swap_takes_effect():
    model = GPT(ModelConfig(**SMALL, tie_embeddings=False))
    ids = torch.arange(8)[None]
    before = model(ids)
    swap_linear(model, lambda name, _: name == "lm_head", Doubled)
    assert torch.equal(model(ids), 2 * before)


def test_the_layer_itself_can_be_asked():
    model = GPT(ModelConfig(**SMALL))
    swapped = swap_linear(model, lambda _, layer: layer.out_features == 12, Doubled)
    assert len(swapped) == 4
    assert all(name.endswith(("up_proj", "gate_proj")) for name in swapped)


def test_nothing_found_lists_what_there_is():
    model = GPT(ModelConfig(**SMALL))
    kinds = "q_proj, k_proj, v_proj, o_proj, up_proj, gate_proj, down_proj, lm_head"
    with pytest.raises(ConfigError, match=f"no linear layer is blue.*there are: {kinds}$"):
        swap_linear(model, lambda name, _: "c_attn" in name, Doubled, "is blue")
    with pytest.raises(ConfigError, match="has none"):
        swap_linear(nn.LayerNorm(4), lambda *_: True, Doubled)


def test_a_swap_that_fails_halfway_has_swapped_nothing():
    model = GPT(ModelConfig(**SMALL))
    before = dict(linear_layers(model))

    def make(layer):
        if layer is before["blocks.1.attn.q_proj"]:
            raise ConfigError("not this one")
        return Doubled(layer)

    with pytest.raises(ConfigError, match="not this one"):
        swap_linear(model, lambda name, _: name.endswith("q_proj"), make)
    assert dict(linear_layers(model)) == before
