"""Every setting of octavo, its default and its reason; YAML and words become one `Config`.

A configuration names only what differs from the defaults. The four seed projects' spellings are
accepted too; `octavo.settings` knows them, and reads YAML.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from octavo.errors import ConfigError
from octavo.settings import Group, canonical, convert, merge, parse_override, read_yaml

# No count in this project is larger than 2**40; a bound turns typing slips into errors.
Count = Annotated[int, (1, 2**40)]
Whole = Annotated[int, (0, 2**40)]
Positive = Annotated[float, (1e-6, 1e6)]
Share = Annotated[float, (0, 1)]
Dropout = Annotated[float, (0, 0.999)]
Beta = Annotated[float, (0, 0.999999)]

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


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group, path="data"):
    """Which text, how it becomes tokens, and in which order windows of it are seen."""

    source: str | list[str] | None = None
    """A corpus by name (python-docs, shakespeare), files, folders, globs, or - for standard input;
    null: data/input.txt where it exists, else python-docs."""
    field: str | None = None
    """The field that holds the text in .jsonl and .csv files; null: text."""
    kind: Literal["text", "completion", "chat", "labels"] = "text"
    """text: learn all of it; completion: {prompt, completion}, learn what follows the prompt;
    chat: {messages}, learn the assistant's turns; labels: {text, label}, learn the label."""
    fields: list[str] | None = None
    """What a record's fields are called, in that order, where it is something else."""
    tokenizer: str = "auto"
    """char, byte, gpt2, bpe (trained on this text) or a tokenizer.json; auto: char below 5 MB of
    text, bpe above."""
    bpe_vocab_size: Annotated[int, (257, 2**24)] = 4096
    """Vocabulary of a BPE trained on this text."""
    separator: bool = False
    """Put an end-of-text token between documents, for characters and bytes too."""
    unseen: Literal["error", "replace"] = "error"
    """A character outside a character vocabulary: stop with its name, or read it as U+FFFD."""
    val_fraction: Annotated[float, (0, 0.9)] = 0.1
    """The last part of the text, kept for validation."""
    val_source: str | list[str] | None = None
    """A validation text of its own; null: the last val_fraction of the source."""
    sampling: Literal["epoch", "random"] = "epoch"
    """epoch: every window once an epoch, shuffled; random: windows drawn anywhere."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Group, path="optim"):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """AdamW decays matrices and embeddings, never biases and norm weights."""
    lr: Annotated[float, (0, 1e3)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, (0, 1e3)] = 0.1
    """Decoupled weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's averaging constants."""
    eps: Share = 1e-8
    """AdamW's denominator guard."""
    warmup: Annotated[float, (0, 2**40)] = 0.05
    """Linear warmup: a number of steps, or below 1 a fraction of max_steps."""
    schedule: Literal["cosine", "linear", "constant", "trapezoid"] = "cosine"
    """How the rate falls after warmup; trapezoid stays flat and falls in the last cooldown."""
    min_lr_ratio: Share = 0.1
    """The last rate as a share of lr."""
    cooldown: Share = 0.2
    """The trapezoid's falling part, as a fraction of max_steps."""
    grad_clip: Annotated[float, (0, 1e9)] = 1.0
    """Largest gradient norm; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Group, path="train"):
    """The loop: how long, how large a step, and on what."""

    max_steps: Whole = 2000
    """Optimizer steps."""
    micro_batch_size: Count = 32
    """Rows in one forward pass."""
    grad_accum: Count = 1
    """Forward passes in one optimizer step."""
    seed: Annotated[int, (0, 2**63 - 1)] = 1337
    """Keys every draw: initial weights, data order, dropout, samples."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto: bf16 on GPUs that have it, fp32 on CPUs."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto: when the run is long enough to pay for it, falling back in one line."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    grad_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    loss_chunk: Whole = 0
    """Rows of logits held at once in the cross-entropy; 0: all of them."""
    dropout_final: Dropout | None = None
    """Anneal dropout linearly from model.dropout to this value; null: constant."""
    patience: Whole = 0
    """Stop after so many validations without a better one; 0: never."""
    max_bad_steps: Count = 10
    """Stop after so many non-finite steps in a row, each skipped and counted."""

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step."""
        return self.micro_batch_size * self.grad_accum


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Group, path="eval"):
    """Validation during training."""

    every: Whole = 250
    """Steps between validations; 0: only at the end."""
    windows: Count = 384
    """Fixed windows of block_size tokens, evenly spread over the validation text."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Group, path="checkpoint"):
    """When the run is saved and how much of it is kept."""

    every: Whole = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """How many of the latest checkpoints stay on disk; the best one stays besides."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Group, path="log"):
    """What is written down while training; metrics.jsonl always is."""

    every: Count = 10
    """Steps between metric lines."""
    sample_every: Whole = 250
    """Steps between written samples; 0: only at the end."""
    sample_prompt: str = ""
    """What samples begin with; empty: a newline, or the end-of-text token where there is one."""
    sample_tokens: Count = 200
    """Length of a sample."""
    layers: bool = False
    """Also log each layer's gradient norm and update/weight ratio."""
    to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Other places that get the same numbers."""
    project: str = "octavo"
    """W&B's project."""
    run_name: str | None = None
    """W&B's run name; null: the run directory's."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Group, path="lora"):
    """Low-rank adapters beside frozen weights (Hu et al. 2021); `octavo finetune` sets them."""

    rank: Whole = 0
    """Width of the adapters; 0: none."""
    alpha: Positive = 16.0
    """An adapter counts alpha / rank times."""
    dropout: Dropout = 0.0
    """On what goes into the adapters."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """The linear layers that get one, by name."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Group, path="finetune"):
    """Where a run begins that does not begin from random weights."""

    base: str | None = None
    """The run whose weights this one begins with."""
    base_sha256: str = ""
    """SHA-256 of those weights: an adapter belongs to no others."""
    head_only: bool = False
    """Train a classifier's head and nothing else."""
    labels: list[str] = field(default_factory=list)
    """A classifier's labels, sorted; found in the data."""


@dataclass(frozen=True, kw_only=True)
class Config(Group):
    """A whole run's settings: what ``config.yaml`` holds."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
KNOWN = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in SECTIONS.items()}


def load_config(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or none), apply ``key.sub=value`` words in order, return the typed result.

    Raises `ConfigError` (exit code 2) for anything unreadable, unknown, mistyped or inconsistent.
    """
    where = f"in {path}" if path is not None else ""
    settings = canonical(read_yaml(path), KNOWN, where) if path is not None else {}
    for word in overrides:
        settings = merge(settings, canonical(parse_override(word), KNOWN))
        where = where and f"in {path} and the words after it"
    return build_config(settings, where)


def build_config(settings: Mapping[str, Mapping[str, Any]], where: str = "") -> Config:
    """Nested settings under canonical names as a `Config`, each converted to its field's type."""
    try:
        return convert(settings, Config, "")
    except ConfigError as error:
        raise ConfigError(error.what, error.where or where, error.fix) from None


def to_yaml(config: Config) -> str:
    """Write every setting out, in the order of the dataclasses."""
    plain = dataclasses.asdict(config, dict_factory=_plain_dict)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that escapes what does not print: YAML reads U+0085 back as a line break."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _plain_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}
