"""A run's numbers as series, and its curves as one PNG to pass on.

The PNG is drawn from the events of metrics.jsonl by matplotlib (the extra ``viz``), imported when
something is drawn. The colours are Okabe and Ito's, which stay apart for colour-blind readers. The
same events give the same bytes.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.disk import write_atomic
from octavo.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Event = dict[str, Any]
"""One line of metrics.jsonl."""

MOST_POINTS = 600  # of one line: more than a page has pixels for, and the file stays small
BLUE, SKY, VERMILION, INK, GRID = "#0072b2", "#56b4e9", "#d55e00", "#1b1f24", "#d9dce0"
STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True)
class Panel:
    """One diagram: a quantity of the ``train`` events over the steps."""

    key: str
    title: str
    unit: str

    @property
    def caption(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


PANELS = (
    Panel("loss", "Loss", "nats a token"),
    Panel("lr", "Learning rate", ""),
    Panel("grad_norm", "Gradient norm", "before clipping"),
)


def draw_curves(events: Sequence[Event], path: Path | str) -> None:
    """Write a PNG of the loss, over the learning rate and the gradient norm, to ``path``.

    Raises `MissingExtraError` without matplotlib and `ResourceError` when the disk refuses.
    """
    with styled("drawing curves", {"font.size": 10}):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        figure = Figure(
            figsize=(9, 6.5), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
        )
        grid = figure.add_gridspec(2, 2, height_ratios=(1.7, 1))
        for panel, place in zip(PANELS, (grid[0, :], grid[1, 0], grid[1, 1]), strict=False):
            ax = figure.add_subplot(place)
            ax.set_title(panel.caption, fontsize=10)
            draw_panel(ax, panel, events)
        figure.suptitle(_title(events), fontsize=12, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(Path(path), buffer.getvalue())


def draw_panel(ax: "Axes", panel: Panel, events: Sequence[Event]) -> None:
    """Draw one quantity over the steps.

    What is noisy is drawn light, under its moving mean; validations have a marker each.
    """
    steps, values = series(events, "train", panel.key)
    noisy = panel.key != "lr" and len(values) >= 20
    if noisy:
        ax.plot(*thin(steps, values), color=SKY, alpha=0.6, linewidth=0.8, label="train")
    mean = moving_mean(values, max(len(values) // 50, 2)) if noisy else values
    ax.plot(*thin(steps, mean), color=BLUE, label="train, smoothed" if noisy else "train")
    drawn = np.isfinite(values).any()
    if panel.key == "loss":
        steps, values = series(events, "eval", "val_loss")
        marks = {"marker": "o", "markersize": 4, "markevery": max(len(steps) // 25, 1)}
        ax.plot(steps, values, color=VERMILION, label="validation", **marks)
        drawn |= np.isfinite(values).any()
        legend = ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
        for line in legend.get_lines():
            line.set_linewidth(2)
    if panel.key == "grad_norm" and spiky(values):
        ax.set_yscale("log")
    if drawn:
        _label_axes(ax)
    else:
        ax.set(xticks=[], yticks=[])


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


def moving_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and up to ``reach`` neighbours on either side, passing over NaN.

    Towards the ends it reaches less far, but as far on both sides: a steep start is not bent.
    """
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


def _label_axes(ax: "Axes") -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    log = ax.get_yscale() == "log"
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.yaxis.set_major_locator(
        LogLocator(subs=(1, 3)) if log else MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10])
    )
    ax.minorticks_off()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        axis.set_ticks(ticks, labels=tick_labels(ticks))


def spiky(values: np.ndarray) -> bool:
    """Whether a few large values would press all others flat on a linear axis."""
    finite = values[np.isfinite(values)]
    return len(finite) > 0 and finite.min() > 0 and finite.max() > 10 * np.median(finite)


def _title(events: Sequence[Event]) -> str:
    start = next((event for event in events if event["event"] == "start"), {})
    best = best_validation(events)
    title = f"A GPT of {start['parameters']:,} parameters" if "parameters" in start else "A GPT"
    if best is None:
        return title
    return f"{title}: best validation loss {best['val_loss']:.3f} at step {best['step']:,}"


@contextmanager
def styled(wanted_for: str, more: dict[str, Any]) -> Iterator[None]:
    """Matplotlib with our style and nobody's matplotlibrc, its settings put back afterwards."""
    try:
        from matplotlib import style
    except ImportError:
        raise MissingExtraError("viz", wanted_for) from None
    with style.context(["default", {**STYLE, **more}]):
        yield
