"""What the network is: `ModelConfig`, from which a model, its arithmetic and its exports follow.

The four seed projects' names for its fields are accepted too; `octavo.settings` knows them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from octavo.errors import ConfigError
from octavo.settings import Group, canonical

# No count in this project is larger than 2**40; a bound turns typing slips into errors.
Count = Annotated[int, (1, 2**40)]
Whole = Annotated[int, (0, 2**40)]
Positive = Annotated[float, (1e-6, 1e6)]
Share = Annotated[float, (0, 1)]
Dropout = Annotated[float, (0, 0.999)]

T = TypeVar("T")


def _seed_names(cls: type[T]) -> type[T]:
    """Let ``cls(n_embd=...)`` and ``cls(d_ff=None)`` mean what the seeds mean by them."""
    plain_init: Callable[..., None] = cls.__init__
    known = {"model": list(cls.__dataclass_fields__)}  # type: ignore[attr-defined]

    @functools.wraps(plain_init)
    def init(self: Any, **settings: Any) -> None:
        plain_init(self, **canonical({"model": settings}, known).get("model", {}))

    cls.__init__ = init
    return cls


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Group, path="model.rope_scaling"):
    """How RoPE's frequencies are stretched to reach beyond the length a model was trained on."""

    type: Literal["linear", "ntk", "yarn", "llama3"] = "linear"
    """linear: position interpolation (Chen et al. 2023); ntk: a larger theta (bloc97); yarn: Peng
    et al. 2023; llama3: Llama 3.1's piecewise rule."""
    factor: Annotated[float, (1, 1e6)] = 1.0
    """How many times longer than the original context."""
    original_block_size: Whole = 0
    """The context before stretching; 0: block_size."""
    beta_fast: Positive = 32.0
    """YaRN: rotations in the original context above which a frequency is left alone."""
    beta_slow: Positive = 1.0
    """YaRN: rotations below which a frequency is fully interpolated."""
    low_freq_factor: Positive = 1.0
    """Llama 3: wavelengths above original/low are interpolated fully."""
    high_freq_factor: Positive = 4.0
    """Llama 3: wavelengths below original/high are left alone."""
    attention_factor: Annotated[float, (0, 1e6)] = 0.0
    """YaRN: scales the cosines and sines; 0: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for high, low in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
            if getattr(self, high) <= getattr(self, low):
                raise ConfigError(f"model.rope_scaling.{high} is not above {low}")


@_seed_names
@dataclass(frozen=True, kw_only=True)
class ModelConfig(Group, path="model"):
    """What the network is. The defaults are a stock Llama; GPT-2 is a matter of four switches.

    Derived fields (``n_kv_head``, ``head_dim``, ``d_ff``) are filled in when left at 0, so a later
    ``dataclasses.replace`` of ``d_model`` should set them to 0 again.
    """

    vocab_size: Whole = 0
    """Rows of the embedding; 0: the tokenizer's, rounded up to pad_vocab_to."""
    pad_vocab_to: Count = 1
    """Round the vocabulary up to a multiple (64 suits GPUs); padded ids are never sampled."""
    block_size: Count = 256
    """Context length in tokens."""
    n_layer: Annotated[int, (1, 100_000)] = 6
    """Transformer blocks."""
    n_head: Count = 6
    """Query heads."""
    n_kv_head: Whole = 0
    """Key/value heads: n_head (0), fewer (grouped-query) or 1 (multi-query attention)."""
    d_model: Count = 384
    """Width of the residual stream."""
    head_dim: Whole = 0
    """Width of a head; 0: d_model / n_head."""
    d_ff: Whole = 0
    """Width of the MLP; 0: 4 d_model, or 8/3 d_model rounded up to 64 for gated MLPs."""
    position: Literal["learned", "rope", "both", "none"] = "rope"
    """Where positions enter: an embedding (learned), rotated queries and keys (rope)."""
    rope_theta: Annotated[float, (2, 1e15)] = 10_000.0
    """RoPE's base."""
    rope_scaling: RopeScaling | None = None
    """How RoPE is stretched beyond its trained length; null: not."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """The normalization."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Before each sublayer, after each residual sum, or before and after each sublayer."""
    norm_eps: Share = 1e-5
    """Added to the variance."""
    norm_bias: bool | None = None
    """A bias in LayerNorm; null: as in bias."""
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu"] = "swiglu"
    """The MLP's nonlinearity; swiglu and geglu are gated and have three matrices."""
    bias: bool = False
    """Biases in the linear layers."""
    qk_norm: bool = False
    """RMSNorm with a weight on each head's queries and keys, before RoPE."""
    tie_embeddings: bool = True
    """The output head shares the token embedding's matrix."""
    dropout: Dropout = 0.0
    """On the embedding, the attention weights, each sublayer's output; cf. train.dropout_final."""
    embed_std: Positive = 0.02
    """Standard deviation of a new model's token embedding."""
    zero_head: bool = False
    """A new model's head is zero, so that it begins by calling every token equally likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_dim and self.d_model % self.n_head:
            raise ConfigError(
                f"model.d_model={self.d_model} is not divisible by model.n_head={self.n_head}",
                fix=f"try d_model={self.n_head * math.ceil(self.d_model / self.n_head)}",
            )
        set_field = functools.partial(object.__setattr__, self)
        set_field("n_kv_head", self.n_kv_head or self.n_head)
        set_field("head_dim", self.head_dim or self.d_model // self.n_head)
        gated_width = math.ceil(8 * self.d_model / 3 / 64) * 64
        set_field("d_ff", self.d_ff or (gated_width if self.gated else 4 * self.d_model))
        set_field("norm_bias", self.bias if self.norm_bias is None else self.norm_bias)
        if self.n_head % self.n_kv_head:
            raise ConfigError(
                f"model.n_head={self.n_head} is not a multiple of model.n_kv_head={self.n_kv_head}",
                fix="give a divisor of n_head",
            )
        if self.uses_rope and self.head_dim % 2:
            raise ConfigError(
                f"RoPE rotates pairs, but head_dim is {self.head_dim}, an odd number",
                f"d_model={self.d_model}, n_head={self.n_head}",
                "choose an even d_model / n_head, or position=learned",
            )
        if self.zero_head and self.tie_embeddings:
            raise ConfigError(
                "model.zero_head would make the token embedding zero too",
                fix="choose tie_embeddings=false with it",
            )
        if self.rope_scaling and not self.uses_rope:
            raise ConfigError(
                f"model.rope_scaling has no effect with position={self.position}",
                fix="remove it or choose position=rope",
            )

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by an activated gate (three matrices instead of two)."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def uses_rope(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.position in ("rope", "both")

    @property
    def uses_learned_positions(self) -> bool:
        """Whether a position embedding is added to the token embedding."""
        return self.position in ("learned", "both")
