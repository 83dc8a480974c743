"""Line charts for a page: SVG by arithmetic alone, coloured by the page that it stands in.

A chart is a whole ``<figure>`` with caption and legend. It scales with the page, needs neither
script nor font nor library, and is the same for the same numbers, byte for byte.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from octavo.reporting.series import MOST_POINTS, thin, tick_labels

WIDTH, HEIGHT, FONT = 440, 250, 13  # of the drawing, in its own units
TOP, RIGHT, BOTTOM = 10, 14, 40  # margins; the left one is as wide as its numbers
CHARACTER = 0.58 * FONT  # about the width of a digit
MARK = "var(--accent)"
LEAST = 1e-30  # that a logarithmic axis shows


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart: y over x, with gaps where y is NaN; no label, no place in the legend."""

    x: np.ndarray
    y: np.ndarray
    label: str = ""
    colour: str = "var(--line)"
    width: float = 2.0
    opacity: float = 1.0
    dash: str = ""
    marks: bool = False

    @property
    def style(self) -> str:
        """How it is drawn, as attributes."""
        more = f' stroke-opacity="{self.opacity:g}"' if self.opacity < 1 else ""
        more += f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return f'stroke="{self.colour}" stroke-width="{self.width:g}"{more}'


@dataclass(frozen=True)
class Scale:
    """From numbers to places between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        """Where ``values`` stand."""
        low, high, there = self.low, self.high, np.asarray(values, dtype=np.float64)
        if self.log:
            low, high = math.log(low), math.log(high)
            there = np.log(there)
        return self.start + (there - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """About ``most`` round numbers in the range."""
        if self.log:
            decades = math.log10(self.high / self.low)
            subs = (1,) if decades > 3 else (1, 3) if decades > 1 else (1, 2, 3, 5, 7)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [sub * 10.0**power for power in powers for sub in subs]
            kept = [tick for tick in found if self.low <= tick <= self.high]
            return kept[:: max(1, round(len(kept) / most))]
        step = round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [round((first + i) * step, 12) for i in range(count)]


def chart(
    caption: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    from_zero: bool = False,
    x_label: str = "step",
    spikes: Sequence[tuple[float, str]] = (),
) -> str:
    """The lines in one diagram; empty where none of them has a finite number.

    ``spikes`` are marked where they stand on the horizontal axis, with their titles.
    """
    lines = [replace(line, y=_drawable(line.y, log)) for line in lines]
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    y_low, y_high = _range([line.y for line in lines], log, from_zero)
    y = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, log)
    y_ticks = y.ticks(6)
    labels = tick_labels(y_ticks) if not log else [f"{tick:g}" for tick in y_ticks]
    left = 12 + CHARACTER * max(map(len, labels), default=0)
    x_low, x_high = _range([line.x for line in lines], False, True, margin=0.0)
    x = Scale(x_low, x_high, left, WIDTH - RIGHT)
    whole = x_label == "step" and x_high - x_low >= 1
    x_ticks = [tick for tick in x.ticks(5) if not whole or tick == round(tick)]
    most = min(MOST_POINTS, max(6000 // len(lines), 60))
    seen = [(place, title) for place, title in spikes if x_low <= place <= x_high]
    parts = [
        *_horizontal(y(np.array(y_ticks)), labels, left),
        *_vertical(x(np.array(x_ticks)), tick_labels(x_ticks), x_label, left),
        *(_mark(float(x(place)), title) for place, title in seen),
        *(_path(line, x, y, most) for line in lines),
    ]
    drawing, nowhere = "\n".join(parts), np.array([])
    spike = Line(nowhere, nowhere, "spike", MARK, 1.0, dash="3 3")
    return (
        f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n"
        f"{_legend([*lines, spike] if seen else lines)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="{FONT}" '
        f'aria-label="{escape(caption)} over {x_label}">\n{drawing}\n</svg>\n</figure>'
    )


def _legend(lines: Sequence[Line]) -> str:
    """What each line with a label is; nothing where there is but one."""
    named = [line for line in lines if line.label]
    if len(named) < 2:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path d="M1 4h20" {line.style}/></svg>'
        f"{escape(line.label)}</li>"
        for line in named
    )
    return f'<ul class="legend">{items}</ul>\n'


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and their tenfolds that is no less than ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least * (1 - 1e-9))


def _drawable(values: np.ndarray, log: bool) -> np.ndarray:
    return np.where(np.isfinite(values) & ((values > LEAST) | (not log)), values, math.nan)


def _range(
    values: Sequence[np.ndarray], log: bool, from_zero: bool, margin: float = 0.05
) -> tuple[float, float]:
    """From the least to the greatest and a little beyond; something even around a single number."""
    joined = np.concatenate(values)
    low, high = float(np.nanmin(joined)), float(np.nanmax(joined))
    if log:
        room = (high / low) ** margin if high > low else 2.0
        return low / room, high * room
    if from_zero:
        low = min(low, 0.0)
    room = (high - low) * margin if high > low else max(abs(high) * 0.5, 0.5)
    return (low if from_zero and low == 0 else low - room), high + room


def _horizontal(places: np.ndarray, labels: Sequence[str], left: float) -> Iterator[str]:
    for place, label in zip(places, labels, strict=True):
        yield f'<path d="M{left:g} {place:.1f}H{WIDTH - RIGHT}" stroke="var(--rule)"/>'
        yield _text(left - 6, place + 0.35 * FONT, label, "end")


def _vertical(
    places: np.ndarray, labels: Sequence[str], x_label: str, left: float
) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    ticks = "".join(f"M{place:.1f} {bottom}v4" for place in places)
    axis = f"M{left:g} {bottom}H{right}{ticks}"
    yield f'<path d="{axis}" stroke="currentColor" stroke-opacity=".4"/>'
    for place, label in zip(places, labels, strict=True):
        yield _text(place, bottom + 17, label)
    yield _text((left + right) / 2, HEIGHT - 6, x_label)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _mark(place: float, title: str) -> str:
    return (
        f'<path d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{MARK}" '
        f'stroke-dasharray="3 3"><title>{escape(title)}</title></path>'
    )


def _path(line: Line, x: Scale, y: Scale, most: int) -> str:
    """The line, broken at NaN; what stands alone between two gaps is a dot."""
    across, up = thin(line.x, line.y, most)
    points = np.column_stack((x(across), y(up)))
    draw, words, marks = False, [], []
    for place, height in points:
        if not math.isfinite(height):
            draw = False
            continue
        words.append(f"{'L' if draw else 'M'}{place:.1f} {height:.1f}" + ("" if draw else "h0"))
        draw = True
        marks.append(f'<circle cx="{place:.1f}" cy="{height:.1f}" r="3" fill="{line.colour}"/>')
    path = (
        f'<path d="{"".join(words)}" fill="none" {line.style} '
        f'stroke-linejoin="round" stroke-linecap="round"/>'
    )
    return path + ("".join(marks) if line.marks and len(marks) <= 60 else "")
