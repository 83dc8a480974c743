"""A run's events as series of numbers, and what is made of them before they are drawn."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Event = dict[str, Any]
"""One line of metrics.jsonl."""

MOST_POINTS = 600  # of one line: more than a page has pixels for, and the file stays small


def last(events: Sequence[Event], kind: str) -> Event:
    """The newest event of a kind, or an empty one."""
    return next((event for event in reversed(events) if event["event"] == kind), {})


def series(events: Iterable[Event], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity; what is no finite number becomes NaN."""
    rows = [(event["step"], event.get(key)) for event in events if event["event"] == kind]
    values = [value if isinstance(value, int | float) else math.nan for _, value in rows]
    array = np.array(values, dtype=np.float64)
    return np.array([step for step, _ in rows]), np.where(np.isfinite(array), array, math.nan)


def best_validation(events: Iterable[Event]) -> Event | None:
    """The ``eval`` event with the lowest loss, the earliest of equals."""
    scored = [event for event in events if event["event"] == "eval"]
    _, losses = series(scored, "eval", "val_loss")
    return scored[int(np.nanargmin(losses))] if np.isfinite(losses).any() else None


def moving_mean(values: np.ndarray, reach: int | None = None) -> np.ndarray:
    """The mean of each value and up to ``reach`` neighbours on either side, passing over NaN.

    None reaches a fiftieth of all. Towards the ends it reaches less far, but as far on both sides:
    a steep start is not bent.
    """
    reach = max(len(values) // 50, 2) if reach is None else reach
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    low, high = index - reaches, index + reaches + 1
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points that look the same: the ends, and each stretch's extremes.

    No spike is lost by it.
    """
    if len(x) <= most:
        return x, y
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), most // 2 - 1):
        kept |= {int(stretch[low[stretch].argmin()]), int(stretch[high[stretch].argmax()])}
    index = sorted(kept)
    return x[index], y[index]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Numbers for an axis, alike in their decimals: 0.5 1.0, 2,000 4,000, 0.5e-3 1e-3, 1.5M."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if largest >= size:
            return [f"{tick / size:g}{unit}" if tick else "0" for tick in ticks]
    if 0 < largest < 0.01:
        exponent = math.floor(math.log10(largest))
        return [f"{tick / 10**exponent:g}e{exponent}" if tick else "0" for tick in ticks]
    decimals = max((len(f"{tick:g}".partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick:,.{decimals}f}" for tick in ticks]
