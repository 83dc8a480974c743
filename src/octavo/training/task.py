"""What must be known before step 0: the text, its tokens or examples, the base, every setting."""

import dataclasses
import glob
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from octavo.adapting.classify import Classifier, Report, evaluate_labels
from octavo.checkpoint import Run, weights_sha256
from octavo.config import Config, ModelConfig
from octavo.errors import ConfigError, DataError
from octavo.evaluating.perplexity import Score, score_windows
from octavo.language_model import LanguageModel, load_base
from octavo.manifest import read_json, to_json
from octavo.model.counts import flops_per_token
from octavo.model.gpt import GPT
from octavo.text.batches import Batches, fixed_windows
from octavo.text.chat import ChatTemplate
from octavo.text.examples import Examples, read_examples, split_examples
from octavo.text.token_files import Tokens
from octavo.text.tokenizer import Tokenizer
from octavo.training.source import Source, read_source

DATA = "data.json"  # which text a run learns from: name, SHA-256, tokens

# Compiling takes a minute or so and gains about a tenth on CPUs, a third and more on GPUs: `auto`
# compiles when the run is expected to last so much longer. Rough rates are enough to tell.
COMPILE_PAYS_AFTER = {"cpu": 3600.0, "cuda": 300.0}  # seconds of training
ASSUMED_RATE = {"cpu": 5e10, "cuda": 1e14}  # floating-point operations a second


@dataclass(frozen=True)
class Task:
    """Everything `train` needs but the model: settings in full, batches, validation windows."""

    config: Config
    tokenizer: Tokenizer | None
    """None where the data are ids of an unknown tokenizer: the model takes and gives ids."""
    batches: Batches | Examples
    val: tuple[np.ndarray, np.ndarray] | None
    data: dict[str, Any]
    files: dict[str, bytes]
    """What else the run directory holds from the start: data.json, text that was piped in, a chat
    template."""
    base: GPT | None = None
    """The model whose weights a fine-tuned run begins with."""

    @property
    def byte_lengths(self) -> np.ndarray | None:
        """Bytes in each token (V,); None where the targets are labels, or ids without a text."""
        if self.config.finetune.labels or self.tokenizer is None:
            return None
        return self.tokenizer.byte_lengths()

    @property
    def mask_id(self) -> int | None:
        """The end-of-text token that attention may not cross; None where it may."""
        return self.batches.eot_id if isinstance(self.batches, Batches) else None

    def score(self, model: nn.Module) -> Score:
        """The loss of ``model`` on the validation windows."""
        assert self.val is not None
        return score_windows(model, *self.val, self.byte_lengths, eot_id=self.mask_id)

    def judge(self, model: nn.Module) -> Report:
        """How well the classifier ``model`` sorts the validation texts."""
        assert isinstance(model, Classifier)
        assert self.val is not None
        return evaluate_labels(model, *self.val)


def prepare(
    config: Config,
    device: str,
    out: Path,
    tokenizer: Tokenizer | None = None,
    source: Source | None = None,
) -> Task:
    """Read and tokenize the data and fill in what the configuration left open.

    ``out`` is the run directory, where text from standard input is kept, and ``tokenizer`` the
    run's own when one is resumed; a ``source`` was read before. Raises `DataError` where
    the text is too short for the context and `ConfigError` where the settings cannot go together.
    """
    base = load_base(config.finetune) if config.finetune.base else None
    tokenizer = tokenizer or (base.tokenizer if base and base.has_tokenizer else None)
    if config.data.kind == "text":
        task = _windows(config, source or read_source(config, out, tokenizer))
    else:
        task = _examples(config, out, tokenizer, base)
    data = task.data | {
        "tokenizer": task.tokenizer.kind if task.tokenizer else None,
        "tokenizer_sha256": task.tokenizer.fingerprint if task.tokenizer else None,
    }
    return dataclasses.replace(
        task,
        config=_resolve(task, device, base),
        data=data,
        files=task.files | {DATA: to_json(data)},
        base=base.model if base else None,
    )


def _windows(config: Config, source: Source) -> Task:
    """Windows of one long text, or of tokens that were prepared before."""
    eot_id = source.eot_id if config.data.mask_documents else None
    if config.data.mask_documents and eot_id is None:
        raise ConfigError(
            "data.mask_documents needs an end-of-text token, and there is none",
            fix="data.separator=true gives one to characters and bytes; bpe and gpt2 have one",
        )
    T, seed = config.model.block_size, config.train.seed
    has_val = len(source.val) > 0
    return Task(
        config=_fitted(config, source.vocab_size, []),
        tokenizer=source.tokenizer,
        batches=Batches(source.train, T, seed, config.data.sampling, eot_id),
        val=fixed_windows(source.val, T, config.eval.windows, eot_id) if has_val else None,
        data=source.data | {"tokens": len(source.train), "val_tokens": len(source.val)},
        files=source.files,
    )


def _examples(
    config: Config, out: Path, tokenizer: Tokenizer | None, base: LanguageModel | None
) -> Task:
    """Records, one a row: completions, conversations, labelled texts."""
    kind, source = config.data.kind, config.data.source
    if tokenizer is None or source is None or kind == "text":
        raise ConfigError(
            f"data.kind={kind} teaches a model that can read already",
            fix="octavo finetune RUN DATA",
        )
    template = None
    if kind == "chat":
        homes = [out] + ([base.run.path] if base and base.run else [])
        kept = (ChatTemplate.load(home) for home in homes if home.is_dir())
        template = next(filter(None, kept), None) or ChatTemplate.default(tokenizer)
    known = config.finetune.labels or None
    block_size = config.model.block_size
    read = read_examples(source, kind, tokenizer, block_size, config.data.fields, template, known)
    train, val = split_examples(read.examples, config.data.val_fraction)
    width = min(read.longest, block_size)
    data = {"name": read.name, "sha256": read.sha256, "description": read.description}
    data |= {"tokens": sum(len(example.x) for example in train)}
    data |= {"val_tokens": sum(len(example.x) for example in val)}
    return Task(
        config=_fitted(config, tokenizer.vocab_size, read.labels),
        tokenizer=tokenizer,
        batches=Examples(train, width, config.train.seed),
        val=Examples(val, width, 0).all() if val else None,
        data=data,
        files=template.files() if template else {},
    )


def check_resumable(old: Config, new: Config) -> None:
    """Refuse settings that would make the rest of a run another experiment, naming each."""
    free = ("eval.", "checkpoint.", "log.", "train.max_steps", "train.budget", "train.device")
    free += ("train.patience", "train.max_bad_steps", "train.compile", "train.micro_batch_size")
    free += ("train.grad_accum", "train.parallel", "train.quantize", "train.draft")
    free += ("train.threads", "train.spike_", "train.on_spike")
    before, after = flatten(old), flatten(new)
    changed = [
        f"{key} {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and not key.startswith(free)
    ]
    if old.train.batch_size != new.train.batch_size:
        changed.append(f"rows a step {old.train.batch_size} -> {new.train.batch_size}")
    if changed:
        raise ConfigError(
            "the run was started with other settings: " + ", ".join(changed),
            fix="start another run with --out, or leave them as they were",
        )


def check_same_text(task: Task, run: Path) -> None:
    """Refuse to go on with another text than the run was started with."""
    before = read_json(run / DATA)
    for key, what in (("sha256", "text"), ("val_sha256", "validation text")):
        if before.get(key) != task.data.get(key):
            raise DataError(
                f"the {what} has changed: its SHA-256 is {task.data.get(key)}, "
                f"the run began with {before.get(key)}",
                str(task.data["name"]),
                "restore the text, or start another run with --out",
            )


def score_validation(lm: LanguageModel) -> Score:
    """The loss of a run's model on the validation windows it was trained with."""
    return _validated_task(lm).score(lm.model)


def judge_validation(lm: LanguageModel) -> Report:
    """How well a run's classifier sorts the validation texts it was trained beside."""
    return _validated_task(lm).judge(lm.model)


def validation_tokens(lm: LanguageModel) -> np.ndarray | Tokens:
    """The ids (N,) of the text that a run was validated on, in order."""
    run = _trained_run(lm)
    return read_source(run.config, run.path, run.tokenizer).val


def _validated_task(lm: LanguageModel) -> Task:
    run = _trained_run(lm)
    task = prepare(run.config, "cpu", run.path, run.tokenizer)
    if task.val is None:
        raise ConfigError(f"{run.path} has no validation text", fix="use --perplexity FILE")
    return task


def _trained_run(lm: LanguageModel) -> Run:
    if lm.run is None or lm.run.config.data.source is None:
        raise ConfigError(
            "this model came from elsewhere, without a validation text",
            fix="use --perplexity FILE",
        )
    return lm.run


def flatten(config: Config) -> dict[str, Any]:
    """Settings as ``section.field`` keys."""
    return {
        f"{section}.{field.name}": getattr(part, field.name)
        for section, part in vars(config).items()
        for field in dataclasses.fields(part)
    }


def _fitted(config: Config, vocab_size: int, labels: list[str]) -> Config:
    """With room for every id, and the labels that the data have."""
    model = fit_vocabulary(config.model, vocab_size)
    finetune = dataclasses.replace(config.finetune, labels=labels)
    return dataclasses.replace(config, model=model, finetune=finetune)


def _resolve(task: Task, device: str, base: LanguageModel | None) -> Config:
    """What was left open, filled in, and paths made absolute: a run goes on from anywhere."""
    config, finetune = task.config, task.config.finetune
    if base is not None:
        given = dataclasses.replace(config.model, dropout=base.config.dropout)
        if given != base.config:
            raise ConfigError(
                "the model is the base's, and cannot be changed but for model.dropout",
                fix="leave the other model settings out; octavo grow enlarges a model",
            )
        assert base.run is not None
        assert base.checkpoint is not None
        path, sha256 = str(base.run.path.resolve()), weights_sha256(base.checkpoint)
        finetune = dataclasses.replace(finetune, base=path, base_sha256=sha256)
    chosen = config.data.tokenizer == "auto" and task.tokenizer
    data = dataclasses.replace(
        config.data,
        source=_absolute(config.data.source or task.data["name"]),
        val_source=_absolute(config.data.val_source),
        tokenizer=chosen.kind if chosen else _absolute(config.data.tokenizer),
    )
    pays = _compile_pays(config, device.partition(":")[0])
    train = dataclasses.replace(config.train, compile=pays)
    judge = dataclasses.replace(config.eval, hellaswag=_absolute(config.eval.hellaswag))
    return dataclasses.replace(config, data=data, train=train, eval=judge, finetune=finetune)


def fit_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """The model's configuration with room for every id of a tokenizer of ``vocab_size``."""
    wanted = model.vocab_size or vocab_size
    if wanted < vocab_size:
        raise ConfigError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {vocab_size}",
            fix="leave model.vocab_size out: the tokenizer decides",
        )
    padded = math.ceil(wanted / model.pad_vocab_to) * model.pad_vocab_to
    return dataclasses.replace(model, vocab_size=padded)


def _absolute(source: Any) -> Any:
    """A path or several made absolute; names stay names, and null null."""
    if isinstance(source, list):
        return [_absolute(item) for item in source]
    if source is None or source == "-":
        return source
    is_path = Path(source).exists() or glob.has_magic(source)
    return str(Path(source).resolve()) if is_path else source


def _compile_pays(config: Config, device: str) -> bool:
    if config.train.compile != "auto":
        return config.train.compile
    tokens = config.train.max_steps * config.train.batch_size * config.model.block_size
    seconds = 3 * flops_per_token(config.model) * tokens / ASSUMED_RATE.get(device, math.inf)
    return seconds > COMPILE_PAYS_AFTER.get(device, math.inf)
