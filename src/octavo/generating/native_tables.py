"""What the native engine is told beside the weights: RoPE's tables, the tensors there must be.

Numpy's twin of what `octavo.model` says with PyTorch, so that writing needs none of it.
"""

import math

import numpy as np
from numpy.typing import NDArray

from octavo.model_config import ModelConfig, RopeScaling

Floats = NDArray[np.float32]


def rope_table(config: ModelConfig) -> tuple[Floats, Floats]:
    """Cosines and sines of every position, each (block_size, E/2); cf. `octavo.model.layers`."""
    frequencies, factor = _frequencies(config)
    angles = np.arange(config.block_size, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of ``GPT.state_dict`` by its name; a matrix is (out, in)."""
    D, E, F, V = config.d_model, config.head_dim, config.d_ff, config.vocab_size
    H, K = config.n_head * E, config.n_kv_head * E
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (V, D), "lm_head.weight": (V, D)}
    if config.uses_learned_positions:
        shapes["pos_emb.weight"] = (config.block_size, D)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (D,)
        if config.norm == "layernorm" and config.norm_bias:
            shapes[f"{name}.bias"] = (D,)

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if config.bias:
            shapes[f"{name}.bias"] = (out,)

    for block in (f"blocks.{layer}" for layer in range(config.n_layer)):
        norm(f"{block}.attn_norm")
        norm(f"{block}.mlp_norm")
        if config.norm_position == "sandwich":
            norm(f"{block}.attn_out_norm")
            norm(f"{block}.mlp_out_norm")
        linear(f"{block}.attn.q_proj", H, D)
        linear(f"{block}.attn.k_proj", K, D)
        linear(f"{block}.attn.v_proj", K, D)
        linear(f"{block}.attn.o_proj", D, H)
        if config.qk_norm:
            shapes[f"{block}.attn.q_norm.weight"] = shapes[f"{block}.attn.k_norm.weight"] = (E,)
        linear(f"{block}.mlp.up_proj", F, D)
        if config.gated:
            linear(f"{block}.mlp.gate_proj", F, D)
        linear(f"{block}.mlp.down_proj", D, F)
    if config.norm_position != "post":
        norm("norm_f")
    return shapes


def _frequencies(config: ModelConfig) -> tuple[Floats, float]:
    """Angular velocities, (E/2,), and the factor of cosines and sines."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)

    def falling(theta: float) -> Floats:  # PyTorch's powers are the exact ones rounded, not numpy's
        powers = float(np.float32(theta)) ** exponents.astype(np.float64)
        return np.float32(1) / powers.astype(np.float32)

    plain = falling(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    factor, original = np.float32(scaling.factor), scaling.original_block_size or config.block_size
    match scaling.type:
        case "linear":
            return plain / factor, 1.0
        case "ntk":
            stretch = scaling.factor ** (config.head_dim / max(config.head_dim - 2, 1))
            return falling(config.rope_theta * stretch), 1.0
        case "yarn":
            sharpened = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
            return _yarn(plain, scaling, config.rope_theta, original), sharpened
        case "llama3":
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            turns = np.float32(original) / (np.float32(2 * math.pi) / plain)
            kept = ((turns - np.float32(low)) / np.float32(high - low)).clip(0, 1)
            return plain / factor * (1 - kept) + plain * kept, 1.0


def _yarn(plain: Floats, scaling: RopeScaling, theta: float, original: int) -> Floats:
    width = 2 * plain.size

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    pairs = np.arange(plain.size, dtype=np.float32)
    interpolated = ((pairs - np.float32(low)) / np.float32((high - low) or 1e-3)).clip(0, 1)
    return plain / np.float32(scaling.factor) * interpolated + plain * (1 - interpolated)
