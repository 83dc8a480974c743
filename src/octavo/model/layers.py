"""The parts of a transformer block that are not attention: norms, rotary positions, MLPs.

Shapes: B batch, T tokens, D model width, H heads, E head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.model_config import ModelConfig, RopeScaling


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016) whose bias is optional."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension to mean 0 and variance 1, then scale and shift."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


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
    return LayerNorm(config.d_model, config.norm_eps, bias=bool(config.norm_bias))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity, or three where it is gated (Shazeer 2020).

    Plain: ``down(act(up(x)))``. Gated: ``down(act(gate(x)) * up(x))``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        if config.gated:
            self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.kind in ("swiglu", "geglu"):
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


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """RoPE's angular velocities, shape (E/2,), in radians a token, and a factor for cos and sin.

    The factor is 1 except under YaRN, which sharpens attention by it.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    original = scaling.original_block_size or config.block_size
    match scaling.type:
        case "linear":
            return plain / scaling.factor, 1.0
        case "ntk":
            theta = ntk_theta(config.rope_theta, scaling.factor, config.head_dim)
            return 1.0 / theta**exponents, 1.0
        case "yarn":
            return _yarn(plain, scaling, config.rope_theta, original)
        case "llama3":
            return _llama3(plain, scaling, original), 1.0


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base that slows the slowest pair ``factor`` times and leaves the fastest alone."""
    return theta * factor ** (head_dim / max(head_dim - 2, 1))


def _yarn(plain: Tensor, scaling: RopeScaling, theta: float, original: int) -> tuple[Tensor, float]:
    """Peng et al. 2023: interpolate slow frequencies, keep fast ones, ramp between."""
    width = 2 * plain.numel()

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    pairs = torch.arange(plain.numel(), dtype=torch.float32)
    interpolated = ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
    frequencies = plain / scaling.factor * interpolated + plain * (1 - interpolated)
    return frequencies, scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _llama3(plain: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Llama 3.1: interpolate wavelengths beyond the original context, blend in between."""
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions`` (any shape), each (*positions.shape, E/2), fp32."""
    frequencies, factor = rope_frequencies(config)
    angles = positions.to(torch.float32)[..., None] * frequencies.to(positions.device)
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
