"""What a study found: the table of its arms, each setting's main effect, and what to choose.

Differences are to the first arm, and for a setting to its first value, averaged over all the rest.
Each seed gives one difference of each kind, whose spread over the seeds is the seeds' share of
chance: arms of one seed begin with the same weights and see the same data, so they vary together,
and to take them for independent would count the same luck several times. The settings' intervals
hold all together (Bonferroni), as a choice rests on all of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.checkpoint import Run
from octavo.errors import CheckpointError
from octavo.evaluating.compare import LEVEL, Difference, sentence
from octavo.language_model import load
from octavo.reporting.report import read_metrics
from octavo.studies.ablate import Study
from octavo.studies.comparing import as_dict, contrast, judge_runs
from octavo.studies.judging import make_ruler
from octavo.studies.readable import aligned
from octavo.text.files import counted

TIME_TOLERANCE = 0.1  # between arms that should have taken the same time


@dataclass(frozen=True)
class Row:
    """One arm, its means over the seeds; ``against_first`` is None for the first."""

    name: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    """Of training, without validations and saves."""
    losses: list[float]
    against_first: Difference | None

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.losses))


@dataclass(frozen=True)
class Effect:
    """What a value of a setting does in place of its first value, over all other settings."""

    key: str
    first: Any
    value: Any
    result: Difference

    def sentence(self, unit: str, units: str) -> str:
        """In words."""
        return f"{self.key}: " + sentence(
            self.result, str(self.first), str(self.value), unit, units
        )


@dataclass(frozen=True)
class Ablation:
    """The findings of a study, its unit and what it was judged on."""

    rows: list[Row]
    effects: list[Effect]
    recommended: dict[str, Any]
    undecided: list[str]
    seeds: list[int]
    unit: str
    units: str
    judged_on: str
    equal: str

    def lines(self) -> list[str]:
        """The table, each setting's effect, the conclusion, and what the intervals mean."""
        head = ("arm", "parameters", "tokens", "seconds", "loss", "better by", "interval")
        effects = [effect.sentence(self.unit, self.units) for effect in self.effects]
        return [
            *aligned([head, *map(_cells, self.rows)], "<>>>>>>"),
            "",
            *effects,
            "",
            self.conclusion(),
            f"- {self.scope()}",
        ]

    def scope(self) -> str:
        """What the figures are and what the intervals speak of."""
        said = (
            f"{self.unit} of the last checkpoints on {self.judged_on}; equal {self.equal}; 95 % "
            "intervals, each for itself in the table, all together for the settings"
        )
        if len(self.seeds) == 1:
            return f"{said}; one seed: this is about these weights, not about the settings"
        freedom = counted(len(self.seeds) - 1, "degree")
        return f"{said}; {len(self.seeds)} seeds, paired, by Student's t with {freedom} of freedom"

    @property
    def disturbed(self) -> bool:
        """Whether equal time was not equal: a schedule that fell short is no fault of its arm."""
        seconds = [row.seconds for row in self.rows]
        return self.equal == "time" and max(seconds) > (1 + TIME_TOLERANCE) * min(seconds)

    def conclusion(self) -> str:
        """What to choose, as far as the evidence goes."""
        if self.disturbed:
            return (
                "nothing is recommended: the arms' times differ by more than "
                f"{TIME_TOLERANCE * 100:.0f} %, so other work on the machine took part in this"
            )
        chosen = " ".join(f"{key}={value}" for key, value in self.recommended.items())
        if not chosen:
            return "nothing is recommended: no difference is more than chance"
        rest = f"; not decided by this evidence: {', '.join(self.undecided)}"
        return f"recommended: {chosen}" + (rest if self.undecided else "")

    def to_dict(self) -> dict[str, Any]:
        """What ablation.json holds."""
        arms = [
            vars(row)
            | {"loss": row.loss, "against_first": row.against_first and as_dict(row.against_first)}
            for row in self.rows
        ]
        effects = [
            {"setting": e.key, "first": e.first, "value": e.value, **as_dict(e.result)}
            | {"sentence": e.sentence(self.unit, self.units)}
            for e in self.effects
        ]
        return {
            "unit": self.unit,
            "judged_on": self.judged_on,
            "equal": self.equal,
            "seeds": self.seeds,
            "arms": arms,
            "effects": effects,
            "disturbed": self.disturbed,
            "recommended": {} if self.disturbed else self.recommended,
            "undecided": self.undecided,
            "conclusion": self.conclusion(),
            "scope": self.scope(),
        }


def judge_study(study: Study, windows: int | None = None) -> Ablation:
    """Judge every run by its last checkpoint, all on one ruler."""
    paths = [[_last(study, n, seed) for seed in study.seeds] for n in range(len(study.arms))]
    flat = [path for row in paths for path in row]
    ruler = make_ruler([load(row[0]) for row in paths], count=windows)
    (found,) = judge_runs(flat, [ruler.figures])
    figures = found.reshape(len(study.arms), len(study.seeds), -1)  # (A, S, N)
    effects = _effects(study, figures, ruler.weights)
    recommended = _recommended(study, effects)
    return Ablation(
        rows=_rows(study, figures, ruler.weights),
        effects=effects,
        recommended=recommended,
        undecided=[key for key in study.vary if key not in recommended],
        seeds=study.seeds,
        unit=ruler.unit,
        units=ruler.units,
        equal=study.equal,
        judged_on=f"{len(ruler.weights):,} {ruler.units} of {ruler.text}",
    )


def _last(study: Study, arm: int, seed: int) -> str:
    run = Run.open(study.run(study.arms[arm], seed))
    if run.latest is None:
        raise CheckpointError(f"{run.path} has no sound checkpoint", fix="delete it and go on")
    return str(run.latest)


def _rows(study: Study, figures: np.ndarray, weights: np.ndarray) -> list[Row]:
    losses, seeds = figures.sum(2) / weights.sum(), (study.seeds, study.seeds)
    return [
        Row(
            name=arm.name,
            parameters=arm.parameters,
            steps=study.steps[arm.name],
            tokens=study.steps[arm.name] * arm.tokens_a_step,
            seconds=float(np.mean([training_seconds(study, n, seed) for seed in study.seeds])),
            losses=losses[n].tolist(),
            against_first=contrast(figures[0], figures[n], weights, seeds)[0] if n else None,
        )
        for n, arm in enumerate(study.arms)
    ]


def _effects(study: Study, figures: np.ndarray, weights: np.ndarray) -> list[Effect]:
    level = 1 - (1 - LEVEL) / sum(len(values) - 1 for values in study.vary.values())
    seeds, effects = (study.seeds, study.seeds), []
    for key, values in study.vary.items():
        sides = [
            np.mean(
                [figures[n] for n, a in enumerate(study.arms) if a.values[key] == value], axis=0
            )
            for value in values
        ]  # each (S, N): a seed's mean over the arms with this value
        for value, side in zip(values[1:], sides[1:], strict=True):
            result, _ = contrast(sides[0], side, weights, seeds, level=level)
            effects.append(Effect(key, values[0], value, result))
    return effects


def _recommended(study: Study, effects: list[Effect]) -> dict[str, Any]:
    """The value of each setting that the evidence is for; a setting it leaves open is missing."""
    chosen = {}
    for key, values in study.vary.items():
        own = [effect for effect in effects if effect.key == key]
        best = max(own, key=lambda effect: effect.result.gain)
        if best.result.verdict == "better":
            chosen[key] = best.value
        elif all(effect.result.verdict == "worse" for effect in own):
            chosen[key] = values[0]
    return chosen


def training_seconds(study: Study, arm: int, seed: int) -> float:
    """Time that a run spent in optimizer steps, by its own log."""
    seconds, before = 0.0, 0
    for event in read_metrics(study.run(study.arms[arm], seed)):
        if event["event"] == "train":
            seconds += (event["tokens"] - before) / event["tokens_per_s"]
            before = event["tokens"]
    return seconds


def _cells(row: Row) -> tuple[str, ...]:
    """A row of the printed table."""
    figures = f"{row.tokens:,}", f"{row.seconds:,.0f}", f"{row.loss:.4f}"
    cells, result = (row.name, f"{row.parameters:,}", *figures), row.against_first
    if result is None:
        return (*cells, "", "")
    return (*cells, f"{result.gain:+.4f}", f"[{result.low:+.4f}, {result.high:+.4f}]")
