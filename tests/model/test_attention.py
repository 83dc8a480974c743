"""The fused attention is softmax(Q K^T / sqrt(E)) V, and grouped heads are repeated heads."""

import math

import pytest
import torch

from octavo.model.layers import rope_table, rotate


def by_hand(q, k, v, mask, dropout):
    """Attention as the textbook has it, for `attend`."""
    assert dropout == 0.0
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(-1))
    if mask is None:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_fused_attention_is_softmax_by_hand(make_model, ids, assert_near, n_kv_head, position):
    model = make_model(n_kv_head=n_kv_head, position=position)
    assert_near(model(ids, attend=by_hand), model(ids))


def test_with_a_mask_too(make_model, ids, assert_near):
    model = make_model(n_kv_head=2)
    mask = torch.ones(16, 16, dtype=torch.bool).tril() & (torch.rand(3, 1, 16, 16) < 0.6)
    mask |= torch.eye(16, dtype=torch.bool)
    assert_near(model(ids, mask=mask, attend=by_hand), model(ids, mask=mask))
    assert not torch.allclose(model(ids, mask=mask), model(ids), atol=0.1)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_heads_are_multi_head_with_tied_keys_and_values(
    make_model, ids, assert_near, n_kv_head
):
    grouped, full = make_model(n_kv_head=n_kv_head), make_model()
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.unflatten(0, (n_kv_head, 4))  # (K, E, D)
            weights[name] = heads.repeat_interleave(4 // n_kv_head, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    assert_near(full(ids), grouped(ids))


def test_query_and_key_norms_come_before_rotation(make_model, ids):
    """A norm with a weight does not commute with a rotation."""
    model = make_model(qk_norm=True)
    attention = model.blocks[0].attn
    normed, attended = [], []
    for norm in (attention.q_norm, attention.k_norm):
        norm.register_forward_hook(lambda module, args, out: normed.append(out))

    def attend(q, k, v, mask, dropout):
        attended.append((q, k))
        return by_hand(q, k, v, mask, dropout)

    model(ids, attend=attend)
    table = rope_table(model.config, torch.arange(16))
    for before, after in zip(normed, attended[0], strict=True):
        assert torch.equal(after, rotate(before, *table))
        assert not torch.equal(after, before)
