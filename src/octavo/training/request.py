"""What someone wants trained: a command line's words as a configuration and a run directory."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import octavo
from octavo.checkpoint import Run
from octavo.config import Config, load_config
from octavo.errors import ConfigError
from octavo.text.files import RECORD_SUFFIXES, find_files, read_bytes, records

# What fine-tuning changes of the defaults; any setting that is named wins over it.
FINETUNING = (
    "train.max_steps=300", "train.micro_batch_size=16", "optim.lr=1e-3", "eval.every=50",
    "checkpoint.every=100", "log.sample_every=100",
)  # fmt: skip
ADAPTER_RANK = 8


@dataclass(frozen=True)
class Request:
    """What someone wants trained: a configuration under a name, or a run to go on with."""

    config: Config
    name: str
    run: Path | None = None
    texts: list[str] = field(default_factory=list)
    """Those named where nothing else was."""

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
    if recipe is not None:
        return Request(config, recipe.stem)
    return Request(config, _name_of(texts[0]), texts=texts)


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


def finetune_request(
    words: list[str], settings: list[str], train_all: bool, head_only: bool, labels: bool
) -> Request:
    """A run that begins with the weights of a run, the first of ``words``, and learns the others.

    It trains adapters unless ``train_all`` or ``head_only`` says otherwise. What the data are is
    seen from their first record, but for ``labels``.
    """
    if len(words) < 2:
        raise ConfigError(
            "a run and something to teach it are wanted", fix="octavo finetune RUN TEXT"
        )
    if head_only and not labels:
        raise ConfigError("--head trains a classifier's head", fix="add --labels")
    run, data = Run.open(words[0]), words[1:]
    given = {
        "model": dataclasses.asdict(run.config.model),
        "finetune": {"base": str(run.path.resolve()), "head_only": head_only},
        "lora": {"rank": 0 if train_all or head_only else ADAPTER_RANK},
        "data": {"source": data, "kind": "labels" if labels else kind_of(data)},
    }
    words = [f"{section}={json.dumps(values)}" for section, values in given.items()]
    config = load_config(None, [*words, *FINETUNING, *settings])
    return Request(config, f"{run.path.name}-{_name_of(data[0])}")


def kind_of(data: list[str]) -> str:
    """What the first record of the first file is for: completion, chat, or just text."""
    if not data[0].lower().endswith(RECORD_SUFFIXES):
        return "text"
    path = find_files(data[0], RECORD_SUFFIXES)[0][0]
    first = next(records(read_bytes(path), path), None)
    names = set(first.values) if first else set()
    if {"prompt", "completion"} <= names:
        return "completion"
    return "chat" if "messages" in names else "text"
