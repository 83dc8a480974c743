"""What a configuration costs: parameters, operations, bytes. Arithmetic only, no tensor."""

from dataclasses import dataclass

from octavo.model_config import ModelConfig


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


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Exact counts by formula; a test holds them against a model on the meta device."""
    D, E, F = config.d_model, config.head_dim, config.d_ff
    q_width, kv_width = config.n_head * E, config.n_kv_head * E
    bias = int(config.bias)
    attention = D * (q_width + 2 * kv_width) + q_width * D + bias * (q_width + 2 * kv_width + D)
    mlp = (3 if config.gated else 2) * D * F + bias * ((2 if config.gated else 1) * F + D)
    norm_width = D * (1 + int(bool(config.norm_bias) and config.norm == "layernorm"))
    norms_a_block = 4 if config.norm_position == "sandwich" else 2
    norms = config.n_layer * (norms_a_block * norm_width + (2 * E if config.qk_norm else 0))
    final_norm = 0 if config.norm_position == "post" else norm_width
    return ParameterCount(
        token_embedding=config.vocab_size * D,
        position_embedding=config.block_size * D if config.uses_learned_positions else 0,
        attention=config.n_layer * attention,
        mlp=config.n_layer * mlp,
        norm=norms + final_norm,
        head=0 if config.tie_embeddings else config.vocab_size * D,
    )


def flops_per_token(config: ModelConfig, length: int | None = None) -> int:
    """Floating-point operations of one token's forward pass in a text of ``length`` tokens.

    Two for each multiply-add of every matrix; attention counted as full T x T, as
    ``torch.utils.flop_counter`` does. Training costs three times as much.
    """
    T = length or config.block_size
    count = count_parameters(config)
    biases = config.n_layer * int(config.bias) * _biases_a_block(config)
    matrices = count.attention + count.mlp - biases + config.vocab_size * config.d_model
    attention = config.n_layer * 2 * T * config.n_head * config.head_dim  # QK^T and AV
    return 2 * (matrices + attention)


def cache_bytes(config: ModelConfig, length: int | None = None, bytes_a_number: int = 4) -> int:
    """Size of one sequence's keys and values."""
    T = length or config.block_size
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * T * bytes_a_number


def _biases_a_block(config: ModelConfig) -> int:
    attention = (config.n_head + 2 * config.n_kv_head) * config.head_dim + config.d_model
    return attention + (2 if config.gated else 1) * config.d_ff + config.d_model
