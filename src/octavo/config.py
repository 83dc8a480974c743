"""Every setting of octavo, its default and its reason; YAML and words become one `Config`.

A configuration names only what differs from the defaults. The four seed projects' spellings are
accepted too; `octavo.settings` knows them, and reads YAML.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from octavo.errors import ConfigError
from octavo.model_config import Count, Dropout, ModelConfig, Positive, Share, Whole
from octavo.settings import Group, canonical, convert, merge, parse_override, read_yaml, shown

Beta = Annotated[float, (0, 0.999999)]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group, path="data"):
    """Which text, how it becomes tokens, and in which order windows of it are seen."""

    source: str | list[str] | None = None
    """A corpus by name (python-docs, shakespeare), files, folders, globs, - for standard input, a
    prepared dataset, or .npy and .bin files of ids; null: data/input.txt, else python-docs."""
    field: str | None = None
    """The field that holds the text in .jsonl and .csv files; null: text."""
    kind: Literal["text", "completion", "chat", "labels"] = "text"
    """text: learn all of it; completion: {prompt, completion}, learn what follows the prompt;
    chat: {messages}, learn the assistant's turns; labels: {text, label}, learn the label."""
    fields: list[str] | None = None
    """What a record's fields are called, in that order, where it is something else."""
    tokenizer: str = "auto"
    """char, byte, gpt2, bpe (trained on this text) or a tokenizer.json; auto: char below 5 MB of
    text, bpe above; a dataset's own, without which the model takes and gives ids."""
    bpe_vocab_size: Annotated[int, (257, 2**24)] = 4096
    """Vocabulary of a BPE trained on this text."""
    separator: bool = False
    """Put an end-of-text token between documents, for characters and bytes too."""
    unseen: Literal["error", "replace"] = "error"
    """A character outside a character vocabulary: stop with its name, or read it as U+FFFD."""
    val_fraction: Annotated[float, (0, 0.9)] = 0.1
    """The last part of the text, kept for validation."""
    val_source: str | list[str] | None = None
    """A validation text, of the same kind as the source; null: the last val_fraction of that."""
    sampling: Literal["epoch", "random"] = "epoch"
    """epoch: every window once an epoch, shuffled; random: windows drawn anywhere."""
    mask_documents: bool = False
    """Neither attention nor loss crosses from one document into the next; needs a separator."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Group, path="optim"):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW decays matrices and embeddings, never biases and norm weights. muon: the matrices
    inside the blocks by Muon, the rest by AdamW."""
    lr: Annotated[float, (0, 1e3)] = 1e-3
    """Peak learning rate."""
    muon_lr: Annotated[float, (0, 1e3)] = 0.02
    """Muon's peak learning rate, for the matrices; it follows the same schedule."""
    muon_momentum: Beta = 0.95
    """Muon's averaging constant."""
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
    budget: Annotated[float, (0, 2**40)] = 0.0
    """Seconds from start to exit: the schedule then follows the clock, and max_steps is only the
    first guess at how many steps that will be; 0: no clock."""
    micro_batch_size: Count = 32
    """Rows in one forward pass."""
    grad_accum: Count = 1
    """Forward passes in one optimizer step."""
    seed: Annotated[int, (0, 2**63 - 1)] = 1337
    """Keys every draw: initial weights, data order, dropout, samples."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto: bf16 on GPUs that have it, else fp32."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto: when the run is long enough to pay for it, falling back in one line."""
    device: str = "auto"
    """cuda, mps, cpu or auto."""
    threads: Whole = 0
    """CPU threads that a step takes at most; 0: as many as PyTorch has. Where they are even, two
    halves of the rows are taken at once."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun, all of the model on each process (ddp) or a part (fsdp); auto: fsdp where
    weights, gradients and optimizer fill more than 60 % of one device."""
    deterministic: Literal["canonical"] | None = None
    """canonical: the same weights, bit for bit, on 1, 2 and 4 processes; slow, for debugging."""
    grad_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    loss_chunk: Whole = 0
    """Rows of logits held at once in the cross-entropy; 0: all of them, in fp32 eight million."""
    dropout_final: Dropout | None = None
    """Anneal dropout linearly from model.dropout to this value; null: constant."""
    patience: Whole = 0
    """Stop after so many validations without a better one; 0: never."""
    max_bad_steps: Count = 10
    """Stop after so many non-finite steps in a row, each skipped and counted."""
    spike_window: Whole = 64
    """The last steps kept in the black box, which a spike is told by and reported with; 0: none."""
    spike_sigmas: Positive = 6.0
    """A spike: loss or gradient norm so many robust deviations above the window's median."""
    on_spike: Literal["log", "rewind"] = "log"
    """log: write down what was in it; rewind: and go back to the last checkpoint, then on with the
    rows after it."""
    quantize: Literal["int8", "int4"] | None = None
    """Pack the finished model's weights for fast writing, as `octavo quantize` does."""
    draft: bool = False
    """Train a tiny draft beside the model, with which it writes faster (speculative decoding)."""

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
    hellaswag: str | None = None
    """A HellaSwag file (.jsonl or .jsonl.gz) to judge the run by, or download; null: none."""
    hellaswag_every: Whole = 0
    """Steps between these judgements; 0: only at the end."""
    hellaswag_items: Whole = 0
    """How many of its items, from the first; 0: all."""
    hellaswag_protocol: Literal["completion", "harness"] = "completion"
    """completion: as build-nanogpt scores it; harness: as lm-evaluation-harness does."""


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
    attention: bool = False
    """Also save what each head looked at in the samples, as attention/step-N.npz in the run."""
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


RECIPES: dict[str, dict[str, Any]] = {
    "modern": {
        "model": {"qk_norm": True, "tie_embeddings": False, "zero_head": True},
        "optim": {
            "name": "muon",
            "lr": 0.015,
            "muon_lr": 0.015,
            "muon_momentum": 0.85,
            "schedule": "linear",
            "min_lr_ratio": 0.0,
            "warmup": 0,
        },
    },
}
"""Defaults that belong together, by the name that ``recipe: NAME`` has at the top of a file."""
SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
KNOWN = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in SECTIONS.items()}


def load_config(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or none), apply ``key.sub=value`` words in order, return the typed result.

    Raises `ConfigError` (exit code 2) for anything unreadable, unknown, mistyped or inconsistent.
    """
    where = f"in {path}" if path is not None else ""
    given = read_yaml(path) if path is not None else {}
    recipe = given.pop("recipe", None)
    settings = canonical(given, KNOWN, where)
    for word in overrides:
        over = parse_override(word)
        recipe = over.pop("recipe", recipe)
        settings = merge(settings, canonical(over, KNOWN))
        where = where and f"in {path} and the words after it"
    return build_config(merge(_recipe(recipe, where), settings), where)


def _recipe(name: Any, where: str) -> Mapping[str, Any]:
    """The defaults that a top-level ``recipe: NAME`` sets; null: none."""
    if name is None:
        return {}
    if str(name) not in RECIPES:
        raise ConfigError(
            f"there is no recipe {shown(name)}", where, f"choose {' or '.join(RECIPES)}"
        )
    return RECIPES[str(name)]


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
