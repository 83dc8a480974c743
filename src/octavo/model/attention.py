"""Causal self-attention: multi-head, grouped-query and multi-query in one module.

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, E head width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from octavo.linear import Linear
from octavo.model.kv_cache import CacheView
from octavo.model.layers import RMSNorm, rotate
from octavo.model_config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(q (B,H,T,E), k (B,K,S,E), v (B,K,S,E), mask or None, dropout) to (B,H,T,E)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """PyTorch's fused attention, FlashAttention inside where the device has it.

    ``mask`` is boolean, True where a query may look; None means causal, and that a single query
    comes after every key.
    """
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q.size(2) > 1,
        enable_gqa=q.size(1) != k.size(1),
    )


class Attention(nn.Module):
    """Vaswani et al. 2017, with fewer key/value heads if so configured (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        q_width, kv_width = config.n_head * self.head_dim, config.n_kv_head * self.head_dim
        # Separate projections: LoRA on q and k alone is then a matter of names.
        self.q_proj = Linear(config.d_model, q_width, bias=config.bias)
        self.k_proj = Linear(config.d_model, kv_width, bias=config.bias)
        self.v_proj = Linear(config.d_model, kv_width, bias=config.bias)
        self.o_proj = Linear(q_width, config.d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: CacheView | None = None,
        attend: Attend = sdpa,
    ) -> Tensor:
        """(B, T, D) to (B, T, D); ``rope`` holds the cosines and sines of the T positions."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
