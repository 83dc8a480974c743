"""Is B better than A, or is it chance? Paired statistics over what both were judged on.

Each side is one run or several that differ in their seed; every run has a figure for each of the
same units: the nats of a window, right or wrong of a benchmark's item. Two things are chance:

- which units were drawn. The paired differences are resampled 10,000 times (the bootstrap, Efron
  1979), so what is hard for both sides cancels.
- which seeds were drawn, where a side has several. Resampling three runs could cover three times in
  four at best, so their spread enters by Student's t, added to each resample.

Figures come in as numpy arrays; the draws have a fixed seed, so the answer is always the same.
"""

import bisect
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from octavo.errors import ConfigError

LEVEL = 0.95  # of an interval
RESAMPLES = 10_000
POWER_Z = NormalDist().inv_cdf(0.8)  # a needed amount of evidence succeeds four times in five
FLIPS = 0.15  # share of HellaSwag items on which two models of equal strength usually disagree


@dataclass(frozen=True)
class Noise:
    """How far the seed alone throws a run: a standard deviation, known by ``freedom`` degrees."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Difference:
    """How much better B is than A a unit, and how sure that is; negative: how much worse."""

    gain: float
    low: float
    high: float
    detectable: float
    """The smallest difference that this evidence would find four times in five."""
    times_needed: float
    """How many times the evidence would find this difference four times in five."""
    pairs: int
    runs: tuple[int, int]
    identical: bool
    """Not one unit tells the sides apart."""

    @property
    def verdict(self) -> str:
        """What the interval allows to say of B: better, worse, identical or unknown."""
        if self.identical:
            return "identical"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unknown"


def difference(
    a: np.ndarray,
    b: np.ndarray,
    weights: np.ndarray,
    noise: Noise | None = None,
    *,
    lower_is_better: bool = True,
    level: float = LEVEL,
) -> Difference:
    """Compare figures of A's runs (S, N) with those of B's (S', N) on the same N units.

    ``weights`` (N,) says how much each unit holds (a window's tokens, 1 for an item); the gain is a
    ratio of sums. ``noise`` is the seeds' share of chance, without which the answer holds for these
    very weights only. Raises `ConfigError` below two units.
    """
    if len(weights) < 2:
        raise ConfigError("nothing can be said from a single window", fix="give a longer text")
    gains = (a.mean(0) - b.mean(0)) * (1 if lower_is_better else -1)  # (N,)
    gain = gains.sum() / weights.sum()
    draws = resample(gains, weights)
    error = draws.std()
    freedom = math.inf
    if noise is not None:
        seeds = noise.deviation * math.sqrt(1 / len(a) + 1 / len(b))
        draws = draws + seeds * np.random.default_rng(1).standard_t(noise.freedom, RESAMPLES)
        error, freedom = math.hypot(error, seeds), noise.freedom
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        gain=float(gain),
        low=float(low),
        high=float(high),
        detectable=float((_two_sided(freedom, level) + POWER_Z) * error),
        times_needed=_times_needed(abs(gain), error, freedom, level),
        pairs=len(weights),
        runs=(len(a), len(b)),
        identical=bool((gains == 0).all()),
    )


def resample(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ratio of sums in each of 10,000 drawings of N units with replacement: (R,)."""
    generator, n = np.random.default_rng(0), len(values)
    rows = max(1, 2_000_000 // n)  # at once: bounds the memory
    draws = []
    for first in range(0, RESAMPLES, rows):
        chosen = generator.integers(0, n, (min(rows, RESAMPLES - first), n))
        draws.append(values[chosen].sum(1) / weights[chosen].sum(1))
    return np.concatenate(draws)


def seed_noise(a: np.ndarray, b: np.ndarray, paired: bool) -> Noise | None:
    """The seeds' noise in the figures of two sides, (S,) and (S',); None where each is one run.

    ``paired``: both have the same seeds in the same order, and what a seed does to both cancels.
    Else what each side's runs differ by is pooled.
    """
    sides = [(a - b) / math.sqrt(2)] if paired else [a, b]
    freedom = sum(len(side) - 1 for side in sides)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in sides)
    return Noise(math.sqrt(squares / freedom), freedom) if freedom else None


def flips(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Of right and wrong answers (N,): the items only A has right, and those only B has."""
    return int((a > b).sum()), int((b > a).sum())


def sentence(result: Difference, a: str, b: str, unit: str, units: str) -> str:
    """The result in words; ``unit`` is the gain's, ``units`` what the pairs are called."""
    if result.identical:
        return (
            f"{a} and {b} have the same figure in each of {result.pairs:,} {units}: "
            "the difference is exactly 0"
        )
    gain, low, high = result.gain, result.low, result.high
    if gain < 0:
        a, b, gain, low, high = b, a, -gain, -high, -low
    places, digits = _places(high - low), _places(min(high - low, 3 * gain))
    interval = f"95 % interval [{low:.{places}f}, {high:.{places}f}]"
    claim = f"{b} is better than {a} by {gain:.{digits}f} {unit}, {interval}"
    if result.verdict != "unknown":
        return claim
    needed = f"{round_up(result.times_needed * result.pairs):,} {units}"
    if max(result.runs) > 1:
        needed += f" and {round_up(result.times_needed * max(result.runs)):,} seeds a side"
    shown = f"{interval}; a difference of {result.detectable:.{places}f} would probably have shown"
    if gain < 1e-9 * result.detectable:
        return f"cannot tell with this much evidence: {a} and {b} are level, in {unit}, {shown}"
    return (
        f"cannot tell with this much evidence: {b} is ahead of {a} by {gain:.{digits}f} {unit}, "
        f"{shown}, for this one you would need about {needed}"
    )


@dataclass(frozen=True)
class Published:
    """What two published shares of right answers say, without the answers themselves."""

    difference: float
    errors: tuple[float, float]
    """Standard error of each score."""
    z: float
    p: float
    items_needed: float
    """Items for each score, were they drawn apart, to find this difference four times in five."""
    items_needed_paired: float
    """Items if both models answer the same ones and disagree on ``FLIPS`` of them."""
    detectable_paired: float
    """The smallest difference that these items would find four times in five, paired."""


def published(a: float, b: float, items: int) -> Published:
    """The unpaired z-test of two shares of right answers, each on so many items.

    Raises `ConfigError` for what is no share, or no items.
    """
    if not (0 < a < 1 and 0 < b < 1) or items < 2:
        raise ConfigError(
            f"scores {a:g} and {b:g} on {items:,} items", fix="give shares between 0 and 1"
        )
    variances = a * (1 - a), b * (1 - b)
    gap, total = b - a, sum(variances)
    z = gap / math.sqrt(total / items)
    reach = _two_sided(math.inf, LEVEL) + POWER_Z
    enough = (reach / gap) ** 2 if gap else math.inf
    return Published(
        difference=gap,
        errors=(math.sqrt(variances[0] / items), math.sqrt(variances[1] / items)),
        z=z,
        p=2 * (1 - NormalDist().cdf(abs(z))),
        items_needed=enough * total,
        items_needed_paired=enough * FLIPS,
        detectable_paired=reach * math.sqrt(FLIPS / items),
    )


def published_sentence(result: Published, a: float, b: float, items: int) -> str:
    """The test in words, in percentage points."""
    points, error = abs(result.difference) * 100, math.hypot(*result.errors) * 100
    claim = (
        f"{a:g} against {b:g} on {items:,} items: a difference of {points:.2f} points with a "
        f"standard error of {error:.2f} (each score's is {max(result.errors) * 100:.2f}), "
        f"z = {abs(result.z):.2f}, p = {result.p:.2f}"
    )
    if result.p < 1 - LEVEL:
        return f"{claim}: evidence, for these two models, that they differ"
    if not points:
        return f"{claim}: no difference"
    apart, paired = round_up(result.items_needed), round_up(result.items_needed_paired)
    return (
        f"{claim}: not evidence. To find it four times in five takes about {apart:,} items a "
        f"model, or {paired:,} if both answer the same ones and {FLIPS * 100:.0f} % of the answers "
        f"flip; {items:,} such items find {result.detectable_paired * 100:.1f} points"
    )


def round_up(amount: float) -> int:
    """The next number of two leading digits: an estimate should not look exact."""
    if not 0 < amount < 1e18:
        return 10**18 if amount else 0
    unit = 10 ** max(math.ceil(math.log10(amount)) - 2, 0)
    return math.ceil(amount / unit) * unit


def _two_sided(freedom: float, level: float) -> float:
    """How many standard errors an interval reaches: Student's t; normal where it is all known."""
    if math.isinf(freedom):
        return NormalDist().inv_cdf((1 + level) / 2)
    draws = np.random.default_rng(2).standard_t(freedom, 50_000)  # within 2 % of the tables
    return float(np.quantile(np.abs(draws), level))


def _times_needed(gain: float, error: float, freedom: float, level: float) -> float:
    """How many times the evidence, seeds included, has to be there for this gain to show."""
    if gain == 0:
        return math.inf

    def shows(times: float) -> bool:
        reach = _two_sided(freedom * times, level) + POWER_Z
        return reach * error / math.sqrt(times) <= gain

    grid = np.geomspace(1, 1e8, 400)
    return float(grid[min(bisect.bisect_left(grid, True, key=shows), len(grid) - 1)])


def _places(width: float) -> int:
    """Decimals that give an interval of this width two digits that mean something."""
    return min(max(0, 2 - math.ceil(math.log10(width))), 9) if width > 0 else 4
