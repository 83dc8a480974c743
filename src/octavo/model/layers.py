"""The parts of a transformer block that are not attention: norms, rotary positions, MLPs.

Shapes: B batch, T tokens, D model width, H heads, E head width. LayerNorm (Ba et al. 2016) is
PyTorch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.linear import Linear
from octavo.model.rope import rope_frequencies
from octavo.model_config import ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang and Sennrich 2019): no mean, no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Divide the last dimension by its root mean square, then scale."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The configured norm over the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=bool(config.norm_bias))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity, or three where it is gated (Shazeer 2020).

    Plain: ``down(act(up(x)))``. Gated: ``down(act(gate(x)) * up(x))``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.gated = config.mlp, config.gated
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.bias)
        if config.gated:
            self.gate_proj = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.gated:
            return self.down_proj(activate(self.kind, self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(activate(self.kind, self.up_proj(x)))


def activate(kind: str, x: Tensor) -> Tensor:
    """The nonlinearity called ``kind``; for gated MLPs the one on the gate."""
    match kind:
        case "gelu" | "geglu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":  # So et al. 2021
            return F.relu(x).square()
        case "silu" | "swiglu":
            return F.silu(x)
    raise ValueError(f"unknown activation {kind!r}")


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions`` (any shape), each (*positions.shape, E/2), fp32."""
    frequencies, factor = rope_frequencies(config)
    steps = torch.tensor(frequencies, device=positions.device)
    angles = positions.to(torch.float32)[..., None] * steps
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+E/2}) of ``x`` (B, H, T, E) by its position's angle.

    Su et al. 2021. ``cos`` and ``sin`` are (T, E/2), or (B, 1, T, E/2) where rows differ in
    position. The pairs are the two halves of a head, Hugging Face's layout; real arithmetic, so
    bf16 and MPS work.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
