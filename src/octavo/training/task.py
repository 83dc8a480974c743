"""What must be known before step 0: what was asked for, its text, its tokens, every setting."""

import dataclasses
import glob
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import octavo
from octavo.checkpoint import Run
from octavo.config import Config, DataConfig, ModelConfig, load_config
from octavo.errors import ConfigError, DataError
from octavo.evaluating.perplexity import Score, score_windows
from octavo.language_model import LanguageModel
from octavo.manifest import read_json, to_json
from octavo.model.counts import flops_per_token
from octavo.text.batches import Batches, fixed_windows
from octavo.text.corpus import Corpus, choose_tokenizer, read_corpus, split, tokenize
from octavo.text.tokenizer import Tokenizer

DATA = "data.json"  # which text a run learns from: name, SHA-256, tokens
PIPED = "input.txt"  # where a run keeps the text it got on standard input

# Compiling takes a minute or so and gains about a tenth on CPUs, a third and more on GPUs: `auto`
# compiles when the run is expected to last so much longer. Rough rates are enough to tell.
COMPILE_PAYS_AFTER = {"cpu": 3600.0, "cuda": 300.0}  # seconds of training
ASSUMED_RATE = {"cpu": 5e10, "cuda": 1e14}  # floating-point operations a second


@dataclass(frozen=True)
class Request:
    """What someone wants trained: a configuration under a name, or a run to go on with."""

    config: Config
    name: str
    run: Path | None = None

    def directory(self, out: str | None, resume: bool) -> Path:
        """The run directory meant: ``out``, else the run itself, else a free name under runs/."""
        if self.run is not None and out is not None:
            raise ConfigError(f"{self.run} is a run already", fix=f"leave out --out {out}")
        if self.run is not None or out is not None:
            return self.run or Path(str(out))
        names = [self.name, *(f"{self.name}-{number}" for number in range(2, 1000))]
        there = [name for name in names if (Path("runs") / name).exists()]
        free = [name for name in names if name not in there]
        return Path("runs") / (there[-1] if resume and there else free[0])


def read_request(words: list[str], settings: list[str]) -> Request:
    """Sort a command line's bare words into a configuration, a run and texts.

    A word ending in .yaml or .yml is a configuration, a run directory or one of its checkpoints is
    a run, anything else is text, which wins over the configuration's.
    """
    recipes = [word for word in words if word.endswith((".yaml", ".yml"))]
    runs = [word for word in words if word not in recipes and Run.find(Path(word))]
    texts = [word for word in words if word not in recipes and word not in runs]
    if len(recipes) + len(runs) > 1 or (runs and texts):
        raise ConfigError(
            f"cannot train {', '.join(words)} together", fix="give one configuration or one run"
        )
    if not words:
        raise ConfigError(
            "nothing to train on", fix="name a text, a CONFIG.yaml or a run: octavo train my.txt"
        )
    if runs:
        run = Run.open(runs[0])
        return Request(
            load_config(run.path / "config.yaml", settings), run.path.name, Path(runs[0])
        )
    recipe = find_recipe(recipes[0]) if recipes else None
    config = load_config(recipe, settings)
    if texts:
        source: str | list[str] = texts[0] if len(texts) == 1 else texts
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    return Request(config, recipe.stem if recipe else _name_of(texts[0]))


def find_recipe(name: str) -> Path:
    """A configuration by path, or one of the recipes that come with octavo by its file name."""
    package = Path(octavo.__file__).parent
    # In the wheel the recipes lie in the package, in a clone beside src.
    places = [Path(name), package / "configs" / name, package.parents[1] / "configs" / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        recipes = sorted(path.name for place in places[1:] for path in place.parent.glob("*.yaml"))
        raise ConfigError(
            f"there is no configuration {name}", fix=f"octavo comes with {', '.join(recipes)}"
        )
    return found


def _name_of(text: str) -> str:
    name = re.sub(r"[^\w.-]+", "-", Path(text).stem).strip("-.")
    return name or ("stdin" if text == "-" else "text")


@dataclass(frozen=True)
class Task:
    """Everything `train` needs but the model: settings in full, batches, validation windows."""

    config: Config
    tokenizer: Tokenizer
    batches: Batches
    val: tuple[np.ndarray, np.ndarray] | None
    byte_lengths: np.ndarray
    data: dict[str, Any]
    files: dict[str, bytes]
    """What else the run directory holds from the start: data.json, and text that was piped in."""


def prepare(config: Config, device: str, out: Path, tokenizer: Tokenizer | None = None) -> Task:
    """Read and tokenize the text and fill in what the configuration left open.

    ``out`` is the run directory, where text from standard input is kept, and ``tokenizer`` the
    run's own when one is resumed. Raises `DataError` where the text is too short for the context
    and `ConfigError` where the settings cannot go together.
    """
    from_stdin = config.data.source == "-"
    kept = from_stdin and (out / PIPED).exists()
    corpus = read_corpus(str(out / PIPED) if kept else config.data.source, config.data.field)
    tokenizer = tokenizer or choose_tokenizer(corpus, config.data)
    tokens = tokenize(corpus, tokenizer)
    data = {"name": corpus.name, "sha256": corpus.sha256, "description": corpus.description}
    if config.data.val_source is None:
        train_tokens, val_tokens = split(tokens, config.data.val_fraction)
    else:
        val_corpus = read_corpus(config.data.val_source, config.data.field)
        train_tokens, val_tokens = tokens, tokenize(val_corpus, tokenizer)
        data["val_sha256"] = val_corpus.sha256
    data |= {"tokens": len(train_tokens), "val_tokens": len(val_tokens)}
    data |= {"tokenizer": tokenizer.kind, "tokenizer_sha256": tokenizer.fingerprint}
    resolved = _resolve(config, tokenizer, corpus, device)
    model, seed = resolved.model, resolved.train.seed
    val = None
    if len(val_tokens):
        val = fixed_windows(val_tokens, model.block_size, resolved.eval.windows)
    return Task(
        config=resolved,
        tokenizer=tokenizer,
        batches=Batches(train_tokens, model.block_size, seed, resolved.data.sampling),
        val=val,
        byte_lengths=tokenizer.byte_lengths(),
        data=data,
        files={DATA: to_json(data)} | ({PIPED: corpus.text.encode()} if from_stdin else {}),
    )


def check_resumable(old: Config, new: Config) -> None:
    """Refuse settings that would make the rest of a run another experiment, naming each."""
    free = ("eval.", "checkpoint.", "log.", "train.max_steps", "train.device", "train.patience")
    free += ("train.max_bad_steps", "train.compile", "train.micro_batch_size", "train.grad_accum")
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
    if before.get("sha256") != task.data["sha256"]:
        raise DataError(
            f"the text has changed: its SHA-256 is {task.data['sha256']}, "
            f"the run began with {before.get('sha256')}",
            str(task.data["name"]),
            "restore the text, or start another run with --out",
        )


def score_validation(lm: LanguageModel) -> Score:
    """The loss of a run's model on the validation windows it was trained with."""
    assert lm.run is not None
    task = prepare(lm.run.config, "cpu", lm.run.path, lm.tokenizer)
    if task.val is None:
        raise ConfigError(f"{lm.run.path} has no validation text", fix="use --perplexity FILE")
    return score_windows(lm.model, *task.val, task.byte_lengths)


def flatten(config: Config) -> dict[str, Any]:
    """Settings as ``section.field`` keys."""
    return {
        f"{section}.{field.name}": getattr(part, field.name)
        for section, part in vars(config).items()
        for field in dataclasses.fields(part)
    }


def _resolve(config: Config, tokenizer: Tokenizer, corpus: Corpus, device: str) -> Config:
    model = fit_vocabulary(config.model, tokenizer)
    data = dataclasses.replace(
        config.data,
        source=absolute(config.data.source or corpus.name),
        val_source=absolute(config.data.val_source),
        tokenizer=_tokenizer_name(config.data, tokenizer),
    )
    train = dataclasses.replace(
        config.train, compile=_compile_pays(config, model, device.partition(":")[0])
    )
    return dataclasses.replace(config, model=model, data=data, train=train)


def fit_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's configuration with room for every id of ``tokenizer``."""
    wanted = model.vocab_size or tokenizer.vocab_size
    if wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {tokenizer.vocab_size}",
            fix="leave model.vocab_size out: the tokenizer decides",
        )
    padded = math.ceil(wanted / model.pad_vocab_to) * model.pad_vocab_to
    return dataclasses.replace(model, vocab_size=padded)


def absolute(source: str | list[str] | None) -> str | list[str] | None:
    """Paths made absolute, so that a run goes on from any directory; names stay names."""
    if isinstance(source, list):
        return [str(absolute(item)) for item in source]
    if source is None or source == "-":
        return source
    return (
        str(Path(source).resolve()) if Path(source).exists() or glob.has_magic(source) else source
    )


def _tokenizer_name(data: DataConfig, tokenizer: Tokenizer) -> str:
    if data.tokenizer == "auto":
        return tokenizer.kind
    return str(Path(data.tokenizer).resolve()) if Path(data.tokenizer).exists() else data.tokenizer


def _compile_pays(config: Config, model: ModelConfig, device: str) -> bool:
    if config.train.compile != "auto":
        return config.train.compile
    tokens = config.train.max_steps * config.train.batch_size * model.block_size
    seconds = 3 * flops_per_token(model) * tokens / ASSUMED_RATE.get(device, math.inf)
    return seconds > COMPILE_PAYS_AFTER.get(device, math.inf)
