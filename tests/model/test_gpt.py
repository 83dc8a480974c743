"""The whole network: causality, tying, initialisation, dropout, recomputation and the loss."""

import math

import pytest
import torch

from octavo.errors import ConfigError
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig, RopeScaling
from octavo.training.loss import cross_entropy

VARIANTS = [
    *(dict(position=position) for position in ("learned", "rope", "both", "none")),
    *(dict(mlp=mlp) for mlp in ("gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu")),
    *(
        dict(norm=norm, norm_position=position)
        for norm in ("layernorm", "rmsnorm")
        for position in ("pre", "post", "sandwich")
    ),
    dict(bias=True, qk_norm=True, n_kv_head=2, tie_embeddings=False, head_dim=6),
    dict(rope_scaling=RopeScaling(type="yarn", factor=2.0), n_kv_head=1),
]


def named(switches):
    return "-".join(map(str, switches.values()))


@pytest.mark.parametrize("switches", VARIANTS, ids=named)
def test_a_later_token_never_changes_an_earlier_logit(make_model, ids, switches):
    """Bitwise: causality is not a matter of tolerance."""
    model = make_model(**switches)
    before = model(ids)
    assert before.shape == (3, 16, 17)
    for t in (1, 7, 15):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 17
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("switches", VARIANTS, ids=named)
def test_every_parameter_matters(make_model, ids, switches):
    """Nothing is declared and then left out of the computation."""
    model = make_model(**switches)
    cross_entropy(model, ids[:, :-1], ids[:, 1:]).backward()
    # A bias on keys shifts all scores of a query alike; without positions softmax cancels it.
    idle = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.grad.any() and not (name.endswith("k_proj.bias"))
    ]
    assert idle == []


ORDERS = {
    "pre": ["attn_norm", "attn", "mlp_norm", "mlp"],
    "post": ["attn", "attn_norm", "mlp", "mlp_norm"],
    "sandwich": ["attn_norm", "attn", "attn_out_norm", "mlp_norm", "mlp", "mlp_out_norm"],
}


@pytest.mark.parametrize("norm_position", ORDERS)
def test_norms_stand_where_they_should(make_model, ids, norm_position):
    model = make_model(norm_position=norm_position)
    order, inputs, outputs = [], {}, {}
    for name, module in [*model.blocks[0].named_children(), ("norm_f", model.norm_f)]:

        def note(module, args, out, name=name):
            order.append(name)
            inputs[name], outputs[name] = args[0], out

        module.register_forward_hook(note)
    states = model.hidden(ids)
    assert [name for name in order if name != "drop"] == [*ORDERS[norm_position], "norm_f"]
    if norm_position == "post":
        assert torch.equal(inputs["attn"], model.tok_emb(ids))
        assert torch.equal(inputs["attn_norm"], model.tok_emb(ids) + outputs["attn"])
        assert torch.equal(inputs["mlp"], outputs["attn_norm"])
        assert torch.equal(states, inputs["norm_f"])  # its last block ends with a norm already
    else:
        assert torch.equal(inputs["attn"], outputs["attn_norm"])
        assert torch.equal(inputs["mlp"], outputs["mlp_norm"])
        assert torch.equal(states, outputs["norm_f"])
    if norm_position == "sandwich":
        assert torch.equal(inputs["drop"], outputs["mlp_out_norm"])
        assert torch.equal(inputs["attn_out_norm"], outputs["attn"])
        assert torch.equal(inputs["mlp_norm"], model.tok_emb(ids) + outputs["attn_out_norm"])


def test_rope_has_no_parameters_and_no_place_in_the_checkpoint(make_model):
    rope, none = make_model(position="rope"), make_model(position="none")
    assert rope.state_dict().keys() == none.state_dict().keys()
    assert len(list(rope.parameters())) == len(list(none.parameters()))


def test_a_tied_head_is_one_matrix_with_one_gradient(make_model, ids):
    tied, untied = make_model(), make_model(tie_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.tok_emb.weight
    assert untied.lm_head.weight.data_ptr() != untied.tok_emb.weight.data_ptr()
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    for model in (tied, untied):
        cross_entropy(model, ids[:, :-1], ids[:, 1:]).backward()
    both = untied.lm_head.weight.grad + untied.tok_emb.weight.grad
    torch.testing.assert_close(tied.tok_emb.weight.grad, both, atol=1e-4, rtol=1e-5)


def test_initialization_scales_what_writes_to_the_residual_stream():
    """NanoGPT's rule: 0.02, and 0.02 / sqrt(2 n_layer) for both output projections."""
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(vocab_size=300, n_layer=8, n_head=4, d_model=96, bias=True, norm="layernorm")
    )
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            residual = "o_proj" in name or "down_proj" in name
            wanted = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * wanted


def test_a_fresh_model_guesses_uniformly():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=65, block_size=32, n_layer=4, n_head=4, d_model=64))
    ids = torch.randint(0, 65, (4, 33))
    loss = cross_entropy(model, ids[:, :-1], ids[:, 1:]) / 128
    assert loss.item() == pytest.approx(math.log(65), abs=0.05)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_dropout_acts_in_training_only_and_can_be_changed(make_model, ids, position):
    plain, model = make_model(position=position), make_model(position=position, dropout=0.3)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(ids), plain(ids))  # evaluation
    model.train()
    noisy = model(ids)
    assert not torch.allclose(noisy, plain(ids), atol=0.1)
    assert not torch.equal(model(ids), noisy)
    model.set_dropout(0.0)
    assert torch.equal(model(ids), plain(ids))
    model.set_dropout(0.3)
    torch.manual_seed(1)
    first = model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)


def test_dropout_reaches_attention_weights_and_every_sublayer(make_model, ids):
    """Where dropout belongs: the embedding, attention's weights, both outputs of a block."""
    model = make_model(dropout=0.5).train()
    rates = []

    def attend(q, k, v, mask, dropout):
        rates.append(dropout)
        return torch.zeros_like(q)

    calls = []
    for module in (model.drop, *(block.drop for block in model.blocks)):
        module.register_forward_hook(lambda module, args, out: calls.append(module.p))
    model(ids, attend=attend)
    assert rates == [0.5, 0.5]
    assert calls == [0.5] * 5  # two in each block
    model.eval()(ids, attend=attend)
    assert rates[2:] == [0.0, 0.0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_activations_gives_the_same_gradients(make_model, ids, dropout):
    gradients = []
    for recompute in (False, True):
        model = make_model(dropout=dropout, bias=True).train()
        model.grad_checkpoint = recompute
        torch.manual_seed(11)
        cross_entropy(model, ids[:, :-1], ids[:, 1:]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [None, "linear", "ntk", "yarn", "llama3"])
def test_rope_runs_beyond_the_length_it_was_built_for(make_model, assert_near, kind):
    scaling = kind and RopeScaling(type=kind, factor=4.0, original_block_size=16)
    short, long = make_model(rope_scaling=scaling), make_model(rope_scaling=scaling, block_size=64)
    long.load_state_dict(short.state_dict())
    ids = torch.randint(0, 17, (2, 64))
    assert torch.equal(short(ids), long(ids))
    if kind:
        plain = make_model()
        plain.load_state_dict(short.state_dict())
        assert not torch.allclose(plain(ids), short(ids), atol=1e-2)


@pytest.mark.parametrize("position", ["learned", "both"])
def test_learned_positions_end_with_a_clear_error(make_model, position):
    with pytest.raises(ConfigError, match="17 tokens do not fit the 16 learned positions"):
        make_model(position=position)(torch.zeros(1, 17, dtype=torch.long))


def test_a_vocabulary_must_be_known():
    with pytest.raises(ConfigError, match="vocab_size"):
        GPT(ModelConfig())


@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
def test_other_precisions_run(make_model, ids, kind):
    model = make_model(bias=True, qk_norm=True, n_kv_head=2)
    wanted = model(ids)
    given = model.to(getattr(torch, kind))(ids)
    assert given.dtype == getattr(torch, kind)
    assert (given.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
