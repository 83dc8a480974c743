"""A grown model computes what it grew from, and what is new in it can learn.

Every parameter is perturbed first: at initialization biases are zero and norms are one, and a
growth that forgets them would pass.
"""

import pytest
import torch
from model_kit import random_model

from octavo.adapting import grow as growing
from octavo.adapting.grow import TOLERANCE, grow
from octavo.adapting.lora import add_adapter
from octavo.errors import ConfigError, ParityError
from octavo.model_config import ModelConfig, RopeScaling
from octavo.training.loss import cross_entropy

SMALL = dict(vocab_size=17, block_size=16, n_layer=2, n_head=4, d_model=16, d_ff=24)
MODELS = {
    "llama": dict(n_kv_head=2),
    "gpt2": dict(position="learned", norm="layernorm", mlp="gelu", bias=True, n_kv_head=1),
    "both": dict(position="both", norm="layernorm", mlp="relu2", tie_embeddings=False),
    "sandwich": dict(norm_position="sandwich", qk_norm=True, n_kv_head=2),
    "sandwich, biased": dict(norm_position="sandwich", norm="layernorm", bias=True),
    "post": dict(norm_position="post", norm="layernorm", bias=True, mlp="geglu", n_kv_head=2),
    "yarn": dict(rope_scaling=RopeScaling(type="yarn", factor=4.0, beta_fast=2.0), n_kv_head=2),
    "llama3": dict(rope_scaling=RopeScaling(type="llama3", factor=8.0)),
}
GROWTHS = {
    "deeper": dict(n_layer=4),
    "wider": dict(d_ff=40),
    "longer": dict(block_size=40),
    "more ids": dict(vocab_size=23),
    "more key/value heads": dict(n_kv_head=4),
    "all of it": dict(n_layer=3, d_ff=25, block_size=17, vocab_size=18, n_kv_head=4),
}


def make(seed=0, **switches):
    return random_model(ModelConfig(**(SMALL | switches)), seed)


def ids(length=16):
    return torch.randint(0, 17, (3, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_grows_computes_the_same(name, growth):
    if growth == "more key/value heads" and "n_kv_head" not in MODELS[name]:
        return  # it has as many as there can be
    changes = GROWTHS[growth]
    model = make(**MODELS[name])
    before, kept = model(ids()), {key: value.clone() for key, value in model.state_dict().items()}
    grown = grow(model, **changes)
    after = grown.model(ids())[..., :17]
    difference = (after - before).abs().max() / before.abs().max()
    exact = name != "post" or "n_layer" not in changes
    assert grown.exact == exact
    assert (difference <= TOLERANCE) == exact
    assert (grown.difference <= TOLERANCE) == exact
    for key, value in changes.items():
        assert getattr(grown.model.config, key) == value
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert not grown.model.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "sandwich", "sandwich, biased"])
def test_new_layers_learn_and_do_not_blow_up(name):
    """Zeroing a sandwich's o_proj would feed zeros to a norm, whose slope there is 300."""
    model = grow(make(**MODELS[name]), n_layer=4).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = cross_entropy(model, ids()[:, :-1], ids()[:, 1:])
        loss.backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        if not losses:
            new = [
                norm for name, norm in norms.items() if name.startswith(("blocks.2", "blocks.3"))
            ]
            assert max(new) < 3 * max(norm for norm in norms.values() if norm not in new)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, norm in norms.items():  # by the third step gradients reach every parameter
        assert norm > 0, name


def test_new_units_of_the_mlp_learn():
    model = grow(make(), d_ff=40).model.train()
    cross_entropy(model, ids()[:, :-1], ids()[:, 1:]).backward()
    assert model.blocks[0].mlp.down_proj.weight.grad[:, 24:].abs().min() > 0


def test_fewer_key_value_heads_are_means_of_those_their_queries_had():
    model = make(bias=True)
    grown = grow(model, n_kv_head=2)
    assert not grown.exact
    assert grown.difference > TOLERANCE
    for module in ("k_proj", "v_proj"):
        old, new = (getattr(m.blocks[1].attn, module) for m in (model, grown.model))
        for get in (lambda linear: linear.weight, lambda linear: linear.bias):
            first, second, third, fourth = get(old).split(4)  # heads of width 4
            wanted = torch.cat([(first + second) / 2, (third + fourth) / 2])
            assert torch.allclose(get(new), wanted)


@torch.no_grad()
def test_heads_that_were_shared_come_together_again_without_loss():
    model = make(n_kv_head=2)
    again = grow(grow(model, n_kv_head=4).model, n_kv_head=2)
    assert not again.exact  # nobody can know
    assert torch.allclose(again.model(ids()), model(ids()), atol=1e-5)


def test_key_value_heads_that_do_not_multiply_are_not_called_exact():
    """From 4 to 6 of 12 query heads: a new head's two queries had two different ones."""
    grown = grow(make(n_head=12, head_dim=4, n_kv_head=4), n_kv_head=6)
    assert not grown.exact
    assert grown.difference > TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_new_ids_are_as_likely_as_the_average(tied):
    logits = grow(make(tie_embeddings=tied), vocab_size=23).model(ids())
    assert torch.allclose(logits[..., 17:], logits[..., :17].mean(-1, keepdim=True), atol=1e-5)


@torch.no_grad()
def test_learned_positions_begin_again():
    model = grow(make(position="learned"), block_size=40).model
    assert torch.equal(model.pos_emb.weight[16:32], model.pos_emb.weight[:16])
    assert torch.equal(model.pos_emb.weight[32:], model.pos_emb.weight[:8])
    assert model(ids(40)).isfinite().all()


def test_the_original_context_of_rope_scaling_stays_what_it_was():
    """0 means block_size: growing that would change every frequency."""
    model = grow(make(**MODELS["yarn"]), block_size=64).model
    assert model.config.rope_scaling.original_block_size == 16


def test_what_is_new_follows_the_seed():
    def weights(seed):
        model = make()
        torch.manual_seed(seed)
        return grow(model, n_layer=3, d_ff=30).model.state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["blocks.2.attn.q_proj.weight"], other["blocks.2.attn.q_proj.weight"])


def test_training_mode_is_kept():
    model = make().train()
    assert grow(model, d_ff=30).model.training
    assert model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_layer=1), "n_layer would shrink from 2 to 1"),
        (dict(d_ff=8), "d_ff would shrink"),
        (dict(block_size=8), "block_size would shrink"),
        (dict(vocab_size=5), "vocab_size would shrink"),
        (dict(d_model=32), "d_model cannot grow; can grow: n_layer, d_ff"),
        (dict(n_layer=2), "nothing would grow"),
        ({}, "nothing would grow"),
        (dict(n_kv_head=3), "not a multiple of model.n_kv_head=3"),
        (dict(n_layer="many"), "give a whole number"),
    ],
)
def test_what_cannot_grow_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        grow(make(), **changes)


def test_adapters_must_be_merged_first():
    model = make()
    add_adapter(model)
    with pytest.raises(ConfigError, match="merge its adapters first"):
        grow(model, n_layer=3)


def test_an_exact_growth_that_changes_the_logits_is_refused(monkeypatch):
    monkeypatch.setattr(growing, "_silent", lambda name, fresh, config: fresh)
    with pytest.raises(ParityError, match="growing n_layer"):
        grow(make(), n_layer=4)
