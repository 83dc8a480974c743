"""Two sides, each one run or several seeds of one method: which is better, and is it evidence?

The runs are read one after the other; their figures on one ruler go to `evaluating.compare`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from octavo.evaluating.compare import (
    LEVEL,
    RESAMPLES,
    Difference,
    difference,
    flips,
    seed_noise,
    sentence,
)
from octavo.evaluating.hellaswag import HellaSwag, Item, ProtocolName
from octavo.language_model import LanguageModel, load
from octavo.studies.judging import Ruler, check_side, find_runs, make_ruler
from octavo.text.token_files import watched

T = TypeVar("T")
Pair = tuple[T, T]
Seeds = Sequence[int]
Judge = Callable[[LanguageModel], np.ndarray]
"""From a model to its figure for each unit (N,)."""


@dataclass(frozen=True)
class Finding:
    """One quantity of both sides and what their difference amounts to."""

    quantity: str
    means: Pair[float]
    result: Difference
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON wants it."""
        a, b = self.means
        return {"a": a, "b": b, **as_dict(self.result), "sentence": self.sentence}


@dataclass(frozen=True)
class Comparison:
    """Both sides, by what they were judged, and the findings."""

    runs: Pair[list[str]]
    judged_on: str
    findings: list[Finding]
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """HellaSwag's items and the way to put them."""

    items: Sequence[Item]
    protocol: ProtocolName = "completion"

    def figures(self, lm: LanguageModel) -> np.ndarray:
        """For ``acc`` and ``acc_norm`` 100 where the item is right, else 0: (2, N)."""
        score = HellaSwag(self.items, lm.tokenizer, self.protocol).score(lm.model)
        right = np.stack([score.choices_acc == score.labels, score.choices == score.labels])
        return 100.0 * right


def as_dict(result: Difference) -> dict[str, Any]:
    """What JSON holds of a difference."""
    names = ("gain", "verdict", "detectable", "pairs")
    return {name: getattr(result, name) for name in names} | {"interval": [result.low, result.high]}


def compare_runs(
    a: str,
    b: str,
    text: str | None = None,
    windows: int | None = None,
    benchmark: Benchmark | None = None,
    device: str = "auto",
) -> Comparison:
    """Compare what two words name: each a run, runs joined by commas, a glob or a folder of runs.

    Raises `ConfigError` for what is no run, has no checkpoint or cannot be judged on one text.
    """
    runs = find_runs(a), find_runs(b)
    sides = [[load(run, device) for run in side] for side in runs]
    remarks = [remark for side in sides for remark in check_side(side)]
    ruler = make_ruler([*sides[0], *sides[1]], text, windows)
    judges: list[Judge] = [ruler.figures, *([benchmark.figures] if benchmark else [])]
    figures = judge_runs([*runs[0], *runs[1]], judges, device)
    seeds = tuple([lm.run.config.train.seed if lm.run else -1 for lm in side] for side in sides)
    names, pair = _names(a, b), (seeds[0], seeds[1])
    findings = [_on_text(ruler, figures[0], names, pair)]
    if benchmark:
        findings += _on_items(benchmark, figures[1], names, pair)
    return Comparison(
        runs,
        f"{len(ruler.weights):,} {ruler.units} of {ruler.text}",
        findings,
        [*filter(None, [ruler.remark]), *remarks, _scope(*pair)],
    )


def _on_text(ruler: Ruler, figures: np.ndarray, names: Pair[str], seeds: Pair[Seeds]) -> Finding:
    sides = figures[: len(seeds[0])], figures[len(seeds[0]) :]
    result, means = contrast(*sides, ruler.weights, seeds)
    return Finding(ruler.unit, means, result, sentence(result, *names, ruler.unit, ruler.units))


def _on_items(
    benchmark: Benchmark, figures: np.ndarray, names: Pair[str], seeds: Pair[Seeds]
) -> list[Finding]:
    findings = []
    for number, name in enumerate(("acc", "acc_norm")):
        a, b = figures[: len(seeds[0]), number], figures[len(seeds[0]) :, number]
        result, means = contrast(a, b, np.ones(a.shape[1]), seeds, lower_is_better=False)
        unit = f"points of HellaSwag {name} ({benchmark.protocol})"
        said = sentence(result, *names, unit, "items")
        if result.runs == (1, 1):
            only_a, only_b = flips(a[0], b[0])
            said += (
                f"; {names[0]} alone is right on {only_a:,} items, {names[1]} alone on {only_b:,}"
            )
        findings.append(Finding(f"% HellaSwag {name}", means, result, said))
    return findings


def judge_runs(
    runs: Sequence[str], judges: Sequence[Judge], device: str = "auto"
) -> list[np.ndarray]:
    """Each judge's figures of each run: (S, N) or (S, ..., N); one model is in memory at a time."""
    figures: list[list[np.ndarray]] = [[] for _ in judges]
    for run in watched(runs, len(runs), "judging"):
        lm = load(run, device)
        for judge, found in zip(judges, figures, strict=True):
            found.append(judge(lm))
    return [np.stack(found) for found in figures]


def contrast(
    a: np.ndarray,
    b: np.ndarray,
    weights: np.ndarray,
    seeds: Pair[Seeds],
    lower_is_better: bool = True,
    level: float = LEVEL,
) -> tuple[Difference, Pair[float]]:
    """The difference of two sides' figures (S, N), (S', N), and the mean of each side."""
    in_a, in_b = a.sum(1) / weights.sum(), b.sum(1) / weights.sum()
    by_seed = in_a[np.argsort(seeds[0])], in_b[np.argsort(seeds[1])]
    noise = seed_noise(*by_seed, paired_seeds(*seeds))
    result = difference(a, b, weights, noise, lower_is_better=lower_is_better, level=level)
    return result, (float(in_a.mean()), float(in_b.mean()))


def paired_seeds(a: Seeds, b: Seeds) -> bool:
    """Whether each seed of one side has its fellow in the other."""
    return len(a) > 1 and sorted(a) == sorted(b) and len(set(a)) == len(a)


def _names(a: str, b: str) -> Pair[str]:
    """What the sides are called: as typed where that is short and says one thing, else A and B."""
    short = all(len(word) <= 40 and not set(word) & set(",*?[") for word in (a, b))
    return (a, b) if short and a != b else ("A", "B")


def _scope(a: Seeds, b: Seeds) -> str:
    """What the interval speaks of: these weights, or the methods they came from."""
    if len(a) == len(b) == 1:
        return (
            "this is about these two weights, not about two methods: another seed might turn it; "
            "to judge methods train each with several seeds and name them all"
        )
    how = "paired, as both sides have the same" if paired_seeds(a, b) else "not paired"
    return (
        f"this is about the methods: {len(a)} and {len(b)} seeds ({how}) enter by Student's t, "
        f"what they read by {RESAMPLES:,} resamples"
    )
