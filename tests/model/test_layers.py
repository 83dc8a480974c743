"""Norms, MLPs and rotary positions, each held against its formula or another implementation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.model.layers import MLP, RMSNorm, activate, rope_table, rotate
from octavo.model.rope import rope_frequencies
from octavo.model_config import ModelConfig, RopeScaling

ROPE = dict(vocab_size=5, n_head=2, d_model=32, block_size=64)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_rmsnorm_is_its_formula_and_torchs():
    ours, theirs = RMSNorm(12, 1e-3), nn.RMSNorm(12, eps=1e-3)
    with torch.no_grad():
        ours.weight.copy_(randn(12))
        theirs.weight.copy_(randn(12))
    x = randn(4, 12) * 0.1
    formula = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * ours.weight
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), formula)


def test_both_gelus_are_torchs_and_differ():
    x = torch.linspace(-4, 4, 200)
    exact = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    tanh = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    torch.testing.assert_close(activate("gelu", x), exact)
    torch.testing.assert_close(activate("gelu_tanh", x), tanh)
    assert torch.equal(activate("gelu", x), F.gelu(x))
    assert torch.equal(activate("gelu_tanh", x), F.gelu(x, approximate="tanh"))
    assert not torch.allclose(exact, tanh, atol=1e-6)


def test_the_other_activations():
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert activate("relu", x).tolist() == [0, 0, 3]
    assert activate("relu2", x).tolist() == [0, 0, 9]
    torch.testing.assert_close(activate("silu", x), x * torch.sigmoid(x))
    with pytest.raises(ValueError, match="swish"):
        activate("swish", x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "act"), [("swiglu", F.silu), ("geglu", F.gelu), ("gelu", F.gelu)])
def test_mlps_are_their_formulas(kind, act, bias):
    """S2 writes it (W1 x * SiLU(W2 x)) W3: up, gate and down here."""
    torch.manual_seed(0)
    mlp = MLP(ModelConfig(vocab_size=5, n_head=1, d_model=8, d_ff=20, mlp=kind, bias=bias))
    x = randn(2, 3, 8)
    up = x @ mlp.up_proj.weight.T + (mlp.up_proj.bias if bias else 0)
    inner = act(up)
    if kind != "gelu":
        inner = up * act(x @ mlp.gate_proj.weight.T + (mlp.gate_proj.bias if bias else 0))
    wanted = inner @ mlp.down_proj.weight.T + (mlp.down_proj.bias if bias else 0)
    torch.testing.assert_close(mlp(x), wanted, atol=1e-6, rtol=1e-6)


def test_any_gated_kind_uses_its_gate(monkeypatch):
    """The MLP asked for two names: a third gated one left its gate aside, and trained without."""
    monkeypatch.setattr(ModelConfig, "gated", True)
    mlp, x = MLP(ModelConfig(vocab_size=5, n_head=1, d_model=8, mlp="relu")), randn(2, 3, 8)
    assert torch.equal(mlp(x), mlp.down_proj(F.relu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_hidden_width_rules():
    """4 d without a gate; with one 8/3 d rounded up to 64, which is a third fewer parameters."""
    assert ModelConfig(d_model=768, n_head=12, mlp="gelu").d_ff == 3072
    assert [ModelConfig(d_model=d, n_head=4).d_ff for d in (128, 256, 512, 768)] == [
        384,
        704,
        1408,
        2048,
    ]


def test_real_rotation_is_the_complex_one():
    """S1 multiplies complex numbers; real arithmetic does the same, in bf16 and on MPS too."""
    config = ModelConfig(**ROPE)
    x, positions = randn(2, 2, 64, 16), torch.arange(64)
    angles = positions[:, None] * torch.tensor(rope_frequencies(config)[0])
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(rotate(x, *rope_table(config, positions)), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scaling", [None, RopeScaling(type="llama3", factor=4.0)])
def test_scores_depend_on_distance_only_and_lengths_stay(scaling):
    config = ModelConfig(**ROPE, rope_scaling=scaling)
    q, k = randn(1, 1, 1, 16).expand(1, 1, 40, 16), randn(2, 1, 1, 16)[1:].expand(1, 1, 40, 16)

    def scores(shift):
        table = rope_table(config, torch.arange(40) + shift)
        return rotate(q, *table) @ rotate(k, *table).transpose(2, 3)

    torch.testing.assert_close(scores(0), scores(23), atol=1e-5, rtol=0)
    turned = rotate(q, *rope_table(config, torch.arange(40)))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert not torch.allclose(turned, q, atol=0.1)


def test_theta_is_the_slowest_wavelength():
    config = ModelConfig(**ROPE, rope_theta=500.0)
    frequencies, factor = rope_frequencies(config)
    assert factor == 1.0
    assert frequencies.tolist() == pytest.approx([500.0 ** (-2 * i / 16) for i in range(8)])


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest():
    plain, _ = rope_frequencies(ModelConfig(**ROPE))
    ntk, _ = rope_frequencies(ModelConfig(**ROPE, rope_scaling=RopeScaling(type="ntk", factor=4.0)))
    assert ntk[0] == plain[0]
    assert ntk[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-5)


SCALINGS = [
    dict(type="linear", factor=3.0),
    dict(type="yarn", factor=4.0, original_block_size=32),
    dict(type="yarn", factor=4.0, original_block_size=64, beta_fast=4.0, beta_slow=0.5),
    dict(type="yarn", factor=16.0, original_block_size=4096),
    dict(type="yarn", factor=2.0, original_block_size=4),
    dict(type="yarn", factor=8.0, original_block_size=2**20),
    dict(type="yarn", factor=1.5, original_block_size=100, attention_factor=0.7),
    dict(type="yarn", factor=1.0),
    dict(type="llama3", factor=8.0, original_block_size=32),
    dict(type="llama3", factor=32.0, original_block_size=8192),
    dict(
        type="llama3",
        factor=4.0,
        original_block_size=256,
        low_freq_factor=0.5,
        high_freq_factor=9.0,
    ),
]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 20.0])
@pytest.mark.parametrize("head_dim", [4, 16, 64, 128])
@pytest.mark.parametrize(
    "numbers", SCALINGS, ids=lambda numbers: "-".join(map(str, numbers.values()))
)
def test_scaled_frequencies_are_transformers(numbers, head_dim, theta):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from octavo.exchanging.families import rope_parameters

    config = ModelConfig(
        vocab_size=5,
        n_head=2,
        d_model=2 * head_dim,
        block_size=64,
        rope_theta=theta,
        rope_scaling=RopeScaling(**numbers),
    )
    theirs = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=rope_parameters(config),
    )
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[numbers["type"]](theirs)
    frequencies, factor = rope_frequencies(config)
    torch.testing.assert_close(torch.tensor(frequencies), wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(wanted_factor)
