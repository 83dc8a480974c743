"""Muon against the singular value decomposition it stands for, and against AdamW beside it."""

import pytest
import torch

from octavo.config import ModelConfig, OptimConfig
from octavo.model.gpt import GPT
from octavo.training import muon
from octavo.training.muon import is_block_matrix, orthogonalize
from octavo.training.optim import build_optimizer, set_lr

TINY = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "d_model": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_singular_values_become_one_and_directions_stay(shape, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype))
    assert values.min() > 0.8
    assert values.max() < 1.2
    # A square matrix has singular values near zero, which five polynomials do not lift fully.
    share = (orthogonalize(matrices, dtype) * (u @ v)).sum((1, 2)) / min(shape)
    assert share.min() > 0.95


def test_matrices_of_one_shape_do_not_touch_each_other():
    torch.manual_seed(0)
    matrices = torch.randn(4, 8, 24)
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices), alone, atol=1e-3)
    across = orthogonalize(matrices.mT.contiguous()).mT
    assert torch.allclose(orthogonalize(matrices), across, atol=1e-3)


def test_the_scale_of_a_gradient_does_not_matter_and_zeros_stay_zeros():
    torch.manual_seed(0)
    matrices = torch.randn(2, 8, 8)
    assert torch.allclose(orthogonalize(matrices * 1e4), orthogonalize(matrices), atol=1e-3)
    assert torch.equal(orthogonalize(torch.zeros(1, 8, 8)), torch.zeros(1, 8, 8))


def stepped(name: str, **settings: float) -> tuple[GPT, GPT]:
    """A model before and after one optimizer step on fixed rows."""
    torch.manual_seed(0)
    before, after = GPT(ModelConfig(**TINY)), GPT(ModelConfig(**TINY))
    after.load_state_dict(before.state_dict())
    config = OptimConfig(name=name, lr=1e-3, **settings)
    optimizer = build_optimizer(after, config)
    set_lr(optimizer, config.lr)
    rows = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    after(rows).square().mean().backward()
    optimizer.step()
    return before, after


def test_a_first_step_is_the_gradients_direction_at_the_rate_of_its_shape(monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: False)  # it would round too much
    before, after = stepped("muon", muon_lr=0.01, weight_decay=0.5)
    rows = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    before(rows).square().mean().backward()
    old = before.get_parameter("blocks.0.mlp.up_proj.weight")
    new = after.get_parameter("blocks.0.mlp.up_proj.weight")
    rows, columns = old.shape
    assert rows > columns
    direction = orthogonalize(old.grad[None])[0] * (rows / columns) ** 0.5
    assert torch.allclose(new, old * (1 - 0.01 * 0.5) - 0.01 * direction, atol=1e-4)
    assert (new - old).abs().max() > 1e-3


def test_what_is_no_matrix_of_a_block_is_adamws_bit_for_bit():
    _, by_muon = stepped("muon")
    _, by_adamw = stepped("adamw")
    for name, parameter in by_muon.named_parameters():
        equal = torch.equal(parameter, by_adamw.get_parameter(name))
        assert equal != is_block_matrix(name, parameter), name
    assert not is_block_matrix("tok_emb.weight", by_muon.tok_emb.weight)
    assert not is_block_matrix("lm_head.weight", by_muon.lm_head.weight)
