"""RoPE's frequencies, by numpy, so that the model and every engine turn by the same angles.

E is the width of a head: its pair i turns by frequency i with every position.
"""

import math

import numpy as np
from numpy.typing import NDArray

from octavo.model_config import ModelConfig, RopeScaling

Floats = NDArray[np.float32]


def rope_frequencies(config: ModelConfig) -> tuple[Floats, float]:
    """Angular velocities, shape (E/2,), in radians a token, and a factor for cosines and sines.

    The factor is 1 except under YaRN, which sharpens attention by it.
    """
    plain, scaling = _falling(config.rope_theta, config.head_dim), config.rope_scaling
    if scaling is None:
        return plain, 1.0
    original = scaling.original_block_size or config.block_size
    match scaling.type:
        case "linear":
            return plain / scaling.factor, 1.0
        case "ntk":
            theta = ntk_theta(config.rope_theta, scaling.factor, config.head_dim)
            return _falling(theta, config.head_dim), 1.0
        case "yarn":
            sharpened = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
            return _yarn(plain, scaling, config.rope_theta, original), sharpened
        case "llama3":
            return _llama3(plain, scaling, original), 1.0


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base that slows the slowest pair ``factor`` times and leaves the fastest alone."""
    return theta * factor ** (head_dim / max(head_dim - 2, 1))


def _falling(theta: float, head_dim: int) -> Floats:
    """theta^(-2i/E); the powers are rounded once, as PyTorch's are and numpy's fp32 ones not."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    powers = float(np.float32(theta)) ** exponents.astype(np.float64)
    return np.float32(1) / powers.astype(np.float32)


def _yarn(plain: Floats, scaling: RopeScaling, theta: float, original: int) -> Floats:
    """Peng et al. 2023: interpolate slow frequencies, keep fast ones, ramp between."""
    width = 2 * plain.size

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    pairs = np.arange(plain.size, dtype=np.float32)
    interpolated = ((pairs - low) / ((high - low) or 1e-3)).clip(0, 1)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _llama3(plain: Floats, scaling: RopeScaling, original: int) -> Floats:
    """Llama 3.1: interpolate wavelengths beyond the original context, blend in between."""
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((original / wavelengths - low) / (high - low)).clip(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept
