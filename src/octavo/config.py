"""Every setting of octavo, its default and its reason; YAML and ``key.sub=value`` become one `Config`.

A configuration names only what differs from the defaults. The four seed projects' spellings
(``n_embd``, ``n_heads``, ``training: {max_iters: ...}``) are accepted at this edge and nowhere else.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from octavo.errors import ConfigError

# The seeds' and nanoGPT's names for our fields, by section.
ALIASES: dict[str, dict[str, str]] = {
    "model": {
        "n_embd": "d_model",
        "n_heads": "n_head",
        "n_layers": "n_layer",
        "n_kv_heads": "n_kv_head",
        "activation_function": "mlp",
        "pos": "position",
    },
    # S2 keeps the optimizer, the loop and the intervals in one section.
    "training": {
        "batch_size": "train.micro_batch_size",
        "max_iters": "train.max_steps",
        "gradient_accumulation_steps": "train.grad_accum",
        "gradient_checkpointing": "train.grad_checkpoint",
        "compile": "train.compile",
        "seed": "train.seed",
        "learning_rate": "optim.lr",
        "weight_decay": "optim.weight_decay",
        "warmup_iters": "optim.warmup",
        "grad_clip": "optim.grad_clip",
        "eval_interval": "eval.every",
        "save_interval": "checkpoint.every",
        "log_interval": "log.every",
    },
    "advanced": {
        "gradient_checkpointing": "train.grad_checkpoint",
        "compile": "train.compile",
    },
}
VALUE_ALIASES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
AUTO_FIELDS = ("n_kv_head", "d_ff", "head_dim", "vocab_size")  # 0, null and auto mean: derive it
LARGEST = 2**40  # no count in this project is larger; a bound turns typing slips into errors

T = TypeVar("T")


def _seed_names(cls: type[T]) -> type[T]:
    """Let ``cls(n_embd=...)`` and ``cls(d_ff=None)`` mean what the seeds mean by them."""
    plain_init: Callable[..., None] = cls.__init__

    @functools.wraps(plain_init)
    def init(self: Any, **settings: Any) -> None:
        plain_init(self, **_canonical_section("model", settings)["model"])

    cls.__init__ = init
    return cls


def _check(section: str, values: Mapping[str, Any], **bounds: tuple[float, float]) -> None:
    """Raise unless every named value is a finite number inside its closed bounds."""
    for name, (low, high) in bounds.items():
        value = values[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise ConfigError(
                f"{section}.{name} is {value!r}",
                fix=f"give a number from {low:g} to {high:g}",
            )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are stretched to reach beyond the length a model was trained on."""

    type: Literal["linear", "ntk", "yarn", "llama3"] = "linear"
    """linear: position interpolation (Chen et al. 2023); ntk: a larger theta (bloc97); yarn: Peng et
    al. 2023; llama3: Llama 3.1's piecewise rule."""
    factor: float = 1.0
    """How many times longer than the original context."""
    original_block_size: int = 0
    """The context before stretching; 0: block_size."""
    beta_fast: float = 32.0
    """YaRN: rotations in the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """YaRN: rotations below which a frequency is fully interpolated."""
    low_freq_factor: float = 1.0
    """Llama 3: wavelengths above original/low are interpolated fully."""
    high_freq_factor: float = 4.0
    """Llama 3: wavelengths below original/high are left alone."""

    def __post_init__(self) -> None:
        _check("rope_scaling", vars(self), factor=(1, 1e6), original_block_size=(0, LARGEST))


@_seed_names
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the network is. The defaults are a stock Llama; GPT-2 is a matter of four switches.

    Derived fields (``n_kv_head``, ``head_dim``, ``d_ff``) are filled in when left at 0, so a later
    ``dataclasses.replace`` of ``d_model`` should set them to 0 again.
    """

    vocab_size: int = 0
    """Rows of the embedding; 0: the tokenizer's, rounded up to pad_vocab_to."""
    pad_vocab_to: int = 1
    """Round the vocabulary up to a multiple (64 suits GPUs); padded ids are never sampled."""
    block_size: int = 256
    """Context length in tokens."""
    n_layer: int = 6
    """Transformer blocks."""
    n_head: int = 6
    """Query heads."""
    n_kv_head: int = 0
    """Key/value heads: n_head (0), fewer (grouped-query) or 1 (multi-query attention)."""
    d_model: int = 384
    """Width of the residual stream."""
    head_dim: int = 0
    """Width of a head; 0: d_model / n_head."""
    d_ff: int = 0
    """Width of the MLP; 0: 4 d_model, or 8/3 d_model rounded up to 64 for gated MLPs."""
    position: Literal["learned", "rope", "both", "none"] = "rope"
    """Where positions enter: an embedding (learned), rotated queries and keys (rope)."""
    rope_theta: float = 10_000.0
    """RoPE's base."""
    rope_scaling: RopeScaling | None = None
    """How RoPE is stretched beyond its trained length; null: not."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """The normalization."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Before each sublayer, after each residual sum, or before and after each sublayer."""
    norm_eps: float = 1e-5
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
    dropout: float = 0.0
    """On the embedding, the attention weights and each sublayer's output; see train.dropout_final."""

    def __post_init__(self) -> None:
        count = (1, LARGEST)
        _check("model", vars(self), vocab_size=(0, LARGEST), pad_vocab_to=count, block_size=count)
        _check("model", vars(self), n_layer=(1, 100_000), n_head=count, n_kv_head=(0, LARGEST))
        _check("model", vars(self), d_model=count, d_ff=(0, LARGEST), head_dim=(0, LARGEST))
        _check("model", vars(self), rope_theta=(1e-6, 1e15), norm_eps=(0, 1), dropout=(0, 0.999))
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
class DataConfig:
    """Which text, how it becomes tokens, and in which order windows of it are seen."""

    source: str | list[str] | None = None
    """A corpus by name (python-docs, shakespeare), files, folders, globs, or - for standard input;
    null: data/input.txt where it exists, else python-docs."""
    field: str | None = None
    """The field that holds the text in .jsonl and .csv files."""
    tokenizer: str = "auto"
    """char, byte, gpt2, bpe (trained on this text) or a tokenizer.json; auto: char below 5 MB of
    text, bpe above."""
    bpe_vocab_size: int = 4096
    """Vocabulary of a BPE trained on this text."""
    separator: bool = False
    """Put an end-of-text token between documents, for characters and bytes too."""
    unseen: Literal["error", "replace"] = "error"
    """What a character outside a character vocabulary does: stop with its name, or become U+FFFD."""
    val_fraction: float = 0.1
    """The last part of the text, kept for validation."""
    val_source: str | list[str] | None = None
    """A validation text of its own; null: the last val_fraction of the source."""
    sampling: Literal["epoch", "random"] = "epoch"
    """epoch: every window once an epoch, shuffled; random: windows drawn anywhere."""

    def __post_init__(self) -> None:
        _check("data", vars(self), bpe_vocab_size=(257, 2**24), val_fraction=(0, 0.9))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """AdamW decays matrices and embeddings, never biases and norm weights."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging constants."""
    eps: float = 1e-8
    """AdamW's denominator guard."""
    warmup: float = 0.05
    """Linear warmup: a number of steps, or below 1 a fraction of max_steps."""
    schedule: Literal["cosine", "linear", "constant", "trapezoid"] = "cosine"
    """How the rate falls after warmup; trapezoid stays flat and falls in the last cooldown."""
    min_lr_ratio: float = 0.1
    """The last rate as a share of lr."""
    cooldown: float = 0.2
    """The trapezoid's falling part, as a fraction of max_steps."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        _check("optim", vars(self), lr=(0, 1e3), weight_decay=(0, 1e3), eps=(0, 1))
        _check("optim", vars(self), warmup=(0, LARGEST), min_lr_ratio=(0, 1), cooldown=(0, 1))
        _check("optim", vars(self), grad_clip=(0, 1e9))
        for beta in self.betas:
            _check("optim", {"betas": beta}, betas=(0, 0.999999))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large a step, and on what."""

    max_steps: int = 2000
    """Optimizer steps."""
    micro_batch_size: int = 32
    """Rows in one forward pass."""
    grad_accum: int = 1
    """Forward passes in one optimizer step."""
    seed: int = 1337
    """Keys every draw: initial weights, data order, dropout, samples."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto: bf16 on GPUs that have it, fp32 on CPUs."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto: when the run is long enough to pay for it, falling back in one line."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    grad_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    loss_chunk: int = 0
    """Rows of logits held at once in the cross-entropy; 0: all of them."""
    dropout_final: float | None = None
    """Anneal dropout linearly from model.dropout to this value; null: constant."""
    patience: int = 0
    """Stop after so many validations without a better one; 0: never."""
    max_bad_steps: int = 10
    """Stop after so many non-finite steps in a row, each skipped and counted."""

    def __post_init__(self) -> None:
        count = (1, LARGEST)
        _check("train", vars(self), max_steps=(0, LARGEST), micro_batch_size=count)
        _check("train", vars(self), grad_accum=count, seed=(0, 2**63 - 1), loss_chunk=(0, LARGEST))
        _check("train", vars(self), patience=(0, LARGEST), max_bad_steps=count)
        if self.dropout_final is not None:
            _check("train", vars(self), dropout_final=(0, 0.999))

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step."""
        return self.micro_batch_size * self.grad_accum


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during training."""

    every: int = 250
    """Steps between validations; 0: only at the end."""
    windows: int = 384
    """Fixed windows of block_size tokens, evenly spread over the validation text."""

    def __post_init__(self) -> None:
        _check("eval", vars(self), every=(0, LARGEST), windows=(1, LARGEST))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved and how much of it is kept."""

    every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """How many of the latest checkpoints stay on disk; the best one stays besides."""

    def __post_init__(self) -> None:
        _check("checkpoint", vars(self), every=(0, LARGEST), keep=(1, LARGEST))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down while training; metrics.jsonl always is."""

    every: int = 10
    """Steps between metric lines."""
    sample_every: int = 250
    """Steps between written samples; 0: only at the end."""
    sample_prompt: str = ""
    """What samples begin with; empty: a newline, or the end-of-text token where there is one."""
    sample_tokens: int = 200
    """Length of a sample."""
    layers: bool = False
    """Also log each layer's gradient norm and update/weight ratio."""
    to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Other places that get the same numbers."""
    project: str = "octavo"
    """W&B's project."""
    run_name: str | None = None
    """W&B's run name; null: the run directory's."""

    def __post_init__(self) -> None:
        _check("log", vars(self), every=(1, LARGEST), sample_every=(0, LARGEST))
        _check("log", vars(self), sample_tokens=(1, LARGEST))


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run's settings: what ``config.yaml`` holds."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}  # type: ignore[misc]


def load_config(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or none), apply ``key.sub=value`` words in order, return the typed result.

    Raises `ConfigError` (exit code 2) for anything unreadable, unknown, mistyped or inconsistent.
    """
    settings = read_yaml(path) if path is not None else {}
    where = f"in {path}" if path is not None else ""
    merged = _canonical(settings, where)
    for word in overrides:
        key, _, value = word.partition("=")
        override = _canonical(_nested(key.split("."), parse_yaml(value, f"in {word!r}")), "")
        for section, values in override.items():
            merged.setdefault(section, {}).update(values)
    return build_config(merged, where)


def build_config(settings: Mapping[str, Mapping[str, Any]], where: str = "") -> Config:
    """Turn nested settings under canonical names into a `Config`, converting types by annotation."""
    from jsonargparse import ArgumentError, ArgumentParser

    for section, values in settings.items():
        _check_known(section, SECTIONS, "", where)
        known = {f.name for f in dataclasses.fields(SECTIONS[section])}
        for name in values:
            _check_known(name, known, f"{section}.", where)
    parser = ArgumentParser(exit_on_error=False)
    for section, cls in SECTIONS.items():
        parser.add_argument(f"--{section}", type=cls)
    try:
        parsed = parser.parse_object({name: dict(values) for name, values in settings.items()})
        return Config(**vars(parser.instantiate(parsed)))
    except ArgumentError as error:
        raise ConfigError(_plain(str(error)), where) from None
    except ConfigError as error:
        raise ConfigError(error.what, error.where or where, error.fix) from None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read one YAML mapping; refuses duplicate keys, anchors and tags."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    settings = parse_yaml(text, f"in {path}")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(
            "a configuration is a mapping of sections", f"in {path}", "start with 'model:'"
        )
    return settings


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text without anchors, tags or duplicate keys; errors become one line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"invalid YAML: {problem}", where + line) from None


def to_yaml(config: Config) -> str:
    """Write every setting out, in the order of the dataclasses."""
    plain = dataclasses.asdict(config, dict_factory=_plain_dict)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like ``name``, if any does."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that also refuses duplicate keys and anchors (no alias bombs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not supported", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _canonical(settings: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Translate the seeds' sections and names into ours; values are not looked at yet."""
    merged: dict[str, dict[str, Any]] = {}
    for section, values in settings.items():
        if values is None:
            continue
        _check_known(str(section), [*SECTIONS, *ALIASES], "", where)
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"the section '{section}' holds {values!r}, not settings",
                where,
                f"write '{section}.NAME=VALUE', or '{section}: {{NAME: VALUE}}' in YAML",
            )
        for name, translated in _canonical_section(str(section), values, where).items():
            merged.setdefault(name, {}).update(translated)
    return merged


def _canonical_section(
    section: str, values: Mapping[str, Any], where: str = ""
) -> dict[str, dict[str, Any]]:
    """One section under canonical section and field names."""
    aliases = ALIASES.get(section, {})
    result: dict[str, dict[str, Any]] = {section: {}} if section in SECTIONS else {}
    for name, value in values.items():
        if section not in SECTIONS:
            _check_known(str(name), aliases, f"{section}.", where)
        target = aliases.get(str(name), str(name))
        target_section, _, target_name = target.rpartition(".")
        if target_name in AUTO_FIELDS and value in (None, "auto"):
            value = 0
        if isinstance(value, str):
            value = VALUE_ALIASES.get(value, value)
        result.setdefault(target_section or section, {})[target_name] = value
    return result




def _check_known(name: str, known: Iterable[str], prefix: str, where: str) -> None:
    known = sorted(known)
    if name not in known:
        guess = nearest(name, known)
        fix = f"did you mean {prefix}{guess}?" if guess else f"known: {', '.join(known)}"
        raise ConfigError(f"unknown key {prefix}{name}", where, fix)


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _plain(message: str) -> str:
    """jsonargparse's several lines as one: ``model.d_model: expected int, got 'x'``."""
    key = re.search(r'key "([^"]+)"', message)
    got = re.search(r"(?:Got value|Given value): (.*)", message)
    wanted = re.search(r"Expected an? (.*?)(?:\. Got|$)", message, re.MULTILINE)
    options = re.search(r"Literal\[(.*?)\]", message)
    subtypes = re.search(r"Subtypes: \[(.*)\]", message)
    if not key or not got:
        return " ".join(message.split())
    expected = options or subtypes or wanted
    text = expected.group(1) if expected else "another type"
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("'", "").replace("NoneType", "null")
    return f"{key.group(1)} is {got.group(1)!r}, expected {'one of ' if options else ''}{text}"


def _plain_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}
