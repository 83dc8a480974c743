"""Two checkpoints side by side: which settings, tokens and weights differ, and by how much.

Needs no torch where both are runs.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.checkpoint import Run
from octavo.language_model import load
from octavo.reporting.page import flat
from octavo.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Change:
    """One tensor of both: by how much the second is another."""

    name: str
    shape: tuple[int, ...]
    relative: float | None
    """|b - a| / |a|, Euclidean norms; None where a is zero and b is not."""
    norm_a: float
    norm_b: float


@dataclass(frozen=True)
class Diff:
    """What differs from a to b."""

    a: str
    b: str
    settings: dict[str, tuple[Any, Any]]
    """By section.name; None where a model from elsewhere has no such setting."""
    tokenizer: str
    """In words."""
    changes: list[Change]
    """Tensors of the same name and shape, the most changed first."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tensors of the same name whose shapes differ."""
    only_a: list[str]
    only_b: list[str]
    relative: float | None
    """Of all ``changes`` as one vector."""
    remarks: list[str]

    @property
    def same_weights(self) -> bool:
        """Whether every weight of one is in the other, bit for bit."""
        apart = self.shapes or self.only_a or self.only_b
        return not apart and all(change.relative == 0 for change in self.changes)

    @property
    def identical(self) -> bool:
        """Whether the two give the same text the same answer, for certain."""
        model = any(name.startswith("model.") for name in self.settings)
        return self.same_weights and not model and self.tokenizer == SAME


SAME = "the same"


def diff(a: Path | str, b: Path | str) -> Diff:
    """Compare two runs, checkpoints or Hugging Face directories; a run is its best checkpoint.

    Raises `ConfigError` for what is none of these and `CheckpointError` for what is damaged.
    """
    first, second = _side(Path(a)), _side(Path(b))
    both = [name for name in first.weights if name in second.weights]
    shapes = {name: (first.weights[name].shape, second.weights[name].shape) for name in both}
    alike = [name for name in both if shapes[name][0] == shapes[name][1]]
    rows = [(name, *_norms(first.weights[name], second.weights[name])) for name in alike]
    changes = [
        Change(name, shapes[name][0], _ratio(apart, norm_a), norm_a, norm_b)
        for name, norm_a, norm_b, apart in rows
    ]
    return Diff(
        a=first.name,
        b=second.name,
        settings=_settings(first, second),
        tokenizer=_tokenizers(first.tokenizer, second.tokenizer),
        changes=sorted(changes, key=lambda c: -math.inf if c.relative is None else -c.relative),
        shapes={name: pair for name, pair in shapes.items() if name not in alike},
        only_a=[name for name in first.weights if name not in second.weights],
        only_b=[name for name in second.weights if name not in first.weights],
        relative=_ratio(math.hypot(*(row[3] for row in rows)), math.hypot(*(r[1] for r in rows))),
        remarks=[side.remark for side in (first, second) if side.remark],
    )


@dataclass(frozen=True, eq=False)
class _Side:
    name: str
    settings: dict[str, Any]
    tokenizer: Tokenizer | None
    weights: dict[str, np.ndarray]
    remark: str = ""


def _side(path: Path) -> _Side:
    if (path / "config.json").is_file():
        lm = load(path, device="cpu")
        weights = {name: t.float().numpy() for name, t in lm.model.state_dict().items()}
        settings = flat({"model": dataclasses.asdict(lm.config)})
        tokenizer = lm.tokenizer if lm.has_tokenizer else None
        return _Side(str(path), settings, tokenizer, _untied(weights))
    run = Run.open(path)
    checkpoint = run.load(run.best)
    config, only = run.config, ""
    if config.finetune.base and (config.lora.rank or config.finetune.head_only):
        only = f"{path} holds only what was trained beside {config.finetune.base}; octavo merge"
        only += " makes one plain model of both"
    settings = flat(dataclasses.asdict(config))
    weights = _untied(checkpoint.model_arrays())
    return _Side(f"{run.path}, step {checkpoint.step:,}", settings, run.tokenizer, weights, only)


def _untied(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without further names of one tensor."""
    owners: dict[int, str] = {}
    return {
        name: array
        for name, array in weights.items()
        if owners.setdefault(array.ctypes.data, name) == name
    }


def _norms(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The Euclidean norms of a, b and b - a."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm_a, norm_b, apart = (float(np.linalg.norm(x.ravel())) for x in (a, b, b - a))
    return norm_a, norm_b, apart


def _ratio(apart: float, norm: float) -> float | None:
    return apart / norm if norm else None if apart else 0.0


def _settings(a: _Side, b: _Side) -> dict[str, tuple[Any, Any]]:
    """Those that differ; where one is from elsewhere, the model's alone."""
    in_a, in_b = ({name.partition(".")[0] for name in side.settings} for side in (a, b))
    names = [name for name in a.settings | b.settings if name.partition(".")[0] in in_a & in_b]
    pairs = {name: (a.settings.get(name), b.settings.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _tokenizers(a: Tokenizer | None, b: Tokenizer | None) -> str:
    if a is None or b is None:
        return SAME if a is b else f"only {'the second' if a is None else 'the first'} has one"
    if a.fingerprint == b.fingerprint:
        return SAME
    common = min(a.vocab_size, b.vocab_size)
    equal = sum(a.token_bytes(i) == b.token_bytes(i) for i in range(common))
    return (
        f"{a.kind} of {a.vocab_size:,} tokens, {b.kind} of {b.vocab_size:,}; "
        f"{equal:,} ids mean the same"
    )
