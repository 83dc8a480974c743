"""What a configuration makes and costs: shapes, parameters, operations, bytes.

Arithmetic only: no tensor, and no PyTorch.
"""

import math
from dataclasses import dataclass

from octavo.model_config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
"""Of tensors by name; a matrix is (out, in)."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by group; ``total`` counts a tied head once."""

    token_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    @property
    def non_embedding(self) -> int:
        """Without the embeddings (nanoGPT subtracts positions only)."""
        return self.total - self.token_embedding - self.position_embedding


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Of every tensor of ``GPT.state_dict``, tied ones under both names."""
    embedding = (config.vocab_size, config.d_model)
    shapes: Shapes = {"tok_emb.weight": embedding, "lm_head.weight": embedding}
    if config.uses_learned_positions:
        shapes["pos_emb.weight"] = (config.block_size, config.d_model)
    block = block_shapes(config)
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | _final_norm(config)


def block_shapes(config: ModelConfig) -> Shapes:
    """Of one block's tensors, by their names in it."""
    D, E, F = config.d_model, config.head_dim, config.d_ff
    H, K = config.n_head * E, config.n_kv_head * E
    norms = ("attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm")
    shapes: Shapes = {}
    for name in norms[: 4 if config.norm_position == "sandwich" else 2]:
        shapes |= _norm(config, name)
    linears = {"attn.q_proj": (H, D), "attn.k_proj": (K, D), "attn.v_proj": (K, D)}
    linears |= {"attn.o_proj": (D, H), "mlp.up_proj": (F, D), "mlp.gate_proj": (F, D)}
    linears |= {"mlp.down_proj": (D, F)}
    if not config.gated:
        del linears["mlp.gate_proj"]
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if config.bias:
            shapes[f"{name}.bias"] = shape[:1]
    if config.qk_norm:
        shapes |= {"attn.q_norm.weight": (E,), "attn.k_norm.weight": (E,)}
    return shapes


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Exact counts; a test holds them against a model on the meta device."""
    block = {name: math.prod(shape) for name, shape in block_shapes(config).items()}

    def in_blocks(*parts: str) -> int:  # what has all of these in its name
        named = (n for name, n in block.items() if all(part in name for part in parts))
        return config.n_layer * sum(named)

    embedding = config.vocab_size * config.d_model
    positions = config.block_size * config.d_model
    return ParameterCount(
        token_embedding=embedding,
        position_embedding=positions if config.uses_learned_positions else 0,
        attention=in_blocks("attn.", "_proj"),
        mlp=in_blocks("mlp."),
        norm=in_blocks("_norm") + sum(map(math.prod, _final_norm(config).values())),
        head=0 if config.tie_embeddings else embedding,
    )


def flops_per_token(config: ModelConfig, length: int | None = None) -> int:
    """Floating-point operations of one token's forward pass in a text of ``length`` tokens.

    Two for each multiply-add of every matrix; attention counted as full T x T, as
    ``torch.utils.flop_counter`` does. Training costs three times as much.
    """
    T = length or config.block_size
    matrices = sum(math.prod(shape) for shape in block_shapes(config).values() if len(shape) == 2)
    attention = 2 * T * config.n_head * config.head_dim  # QK^T and AV
    return 2 * (config.n_layer * (matrices + attention) + config.vocab_size * config.d_model)


def cache_bytes(config: ModelConfig, length: int | None = None, bytes_a_number: int = 4) -> int:
    """Size of one sequence's keys and values."""
    T = length or config.block_size
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * T * bytes_a_number


def _norm(config: ModelConfig, name: str) -> Shapes:
    biased = config.norm == "layernorm" and config.norm_bias
    parts = ("weight", "bias") if biased else ("weight",)
    return {f"{name}.{part}": (config.d_model,) for part in parts}


def _final_norm(config: ModelConfig) -> Shapes:
    """After the last block, which ends with one of its own where norms come after."""
    return {} if config.norm_position == "post" else _norm(config, "norm_f")
