"""A run's curves: one PNG to pass on, and SVG that takes its colours from the page it stands in.

Both are drawn from the events of metrics.jsonl by matplotlib (the extra ``viz``), imported when
something is drawn. The colours are Okabe and Ito's, which stay apart for colour-blind readers. The
same events give the same bytes.
"""

import io
import math
import re
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
    from matplotlib.figure import Figure

Event = dict[str, Any]
"""One line of metrics.jsonl."""

MOST_POINTS = 600  # of one line: more than a page has pixels for, and the file stays small
BLUE, SKY, VERMILION, INK, GRID = "#0072b2", "#56b4e9", "#d55e00", "#1b1f24", "#d9dce0"
ON_PAGE = {
    BLUE: "var(--line)",
    SKY: "var(--noise)",
    VERMILION: "var(--accent)",
    GRID: "var(--rule)",
    INK: "currentColor",
}
"""The page's name for each colour, so that it can choose lighter ones on a dark ground."""

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
    "svg.fonttype": "none",  # text stays text: small, sharp, and read aloud
    "svg.hashsalt": "octavo",  # the same ids every time
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
    Panel("tokens_per_s", "Speed", "tokens a second"),
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


def svg_curves(events: Sequence[Event]) -> dict[Panel, str]:
    """Each panel that has something to show, as an ``<svg>`` to put into a page.

    The background is transparent, text takes the page's font, and the colours are its custom
    properties ``--line --noise --accent --rule`` and ``currentColor``. Raises `MissingExtraError`
    without matplotlib.
    """
    with styled("drawing curves", {"font.size": 9.5}):
        from matplotlib.figure import Figure

        drawn = {}
        for panel in PANELS:
            figure = Figure(figsize=(4.6, 3))
            figure.subplots_adjust(left=0.145, right=0.96, bottom=0.16, top=0.9)
            if draw_panel(figure.add_subplot(), panel, events):
                drawn[panel] = _svg(figure, panel)
        return drawn


def draw_panel(ax: "Axes", panel: Panel, events: Sequence[Event]) -> bool:
    """Draw one quantity over the steps; False where no finite number of it is there.

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
    if panel.key == "tokens_per_s":
        ax.set_ylim(bottom=0)  # else a steady speed looks like a wild one
    if panel.key == "grad_norm" and _spiky(values):
        ax.set_yscale("log")
    if drawn:
        _label_axes(ax)
    else:
        ax.set(xticks=[], yticks=[])
    return bool(drawn)


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
    if largest >= 1e6:
        return [f"{tick / 1e6:g}M" for tick in ticks]
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


def _spiky(values: np.ndarray) -> bool:
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


def _svg(figure: "Figure", panel: Panel) -> str:
    """The figure as an element of a page: scales with it, coloured by it, described in words."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    body = re.sub(
        r"<(metadata|style)\b.*?</\1>",
        "",
        svg[svg.index(">", svg.index("<svg")) + 1 :],
        flags=re.DOTALL,
    )
    body = re.sub(r' id="[a-z][a-z0-9.]*_\d+"', "", body)  # of groups: every figure has the same
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    for colour, name in ON_PAGE.items():
        body = body.replace(colour, name)
    width, height = (72 * inches for inches in figure.get_size_inches())
    label = f"{panel.caption} over the steps"
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}'
