"""A run's curves as one PNG to pass on, and the style and the writing of every such picture.

Drawn by matplotlib (the extra ``viz``), imported when something is drawn. The colours are Okabe and
Ito's, which stay apart for colour-blind readers. The same events give the same bytes.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.disk import write_atomic
from octavo.errors import MissingExtraError
from octavo.reporting.charts import main_lines, spiky
from octavo.reporting.series import Event, best_validation, last, thin, tick_labels
from octavo.reporting.svg import Line, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, SKY, VERMILION, INK, GRID = "#0072b2", "#56b4e9", "#d55e00", "#1b1f24", "#d9dce0"
COLOURS = {"var(--line)": BLUE, "var(--noise)": SKY, "var(--accent)": VERMILION}  # of page.css
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
PICTURE = {
    "axes.grid": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.1,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 150,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.size": 10,
    "text.parse_math": False,  # a $ is a $
}


def draw_curves(events: Sequence[Event], path: Path | str) -> None:
    """Write a PNG of the loss, over the learning rate and the gradient norm; raises as `picture`.

    What is noisy is drawn light, under its moving mean; validations have a marker each.
    """
    best, parameters = best_validation(events), last(events, "start").get("parameters")
    title = "A GPT" if parameters is None else f"A GPT of {parameters:,} parameters"
    if best is not None:
        title += f": best validation loss {best['val_loss']:.3f} at step {best['step']:,}"
    with picture(path, "drawing curves", (9, 6.5), title) as figure:
        axes = list(figure.subplot_mosaic("AA;BC", height_ratios=(1.7, 1)).values())
        for ax, (caption, lines) in zip(axes, main_lines(events).items(), strict=True):
            ax.set_title(caption)
            ax.grid(axis="y")
            _plot(ax, lines)
        axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)


@contextmanager
def picture(
    path: Path | str, wanted_for: str, size: tuple[float, float], title: str
) -> Iterator["Figure"]:
    """A figure of ``size`` inches to draw on, written to ``path`` as a PNG when all is drawn.

    It has our style and nobody's matplotlibrc, whose settings are put back. Raises
    `MissingExtraError` without matplotlib and `ResourceError` when the disk refuses.
    """
    try:
        from matplotlib import figure, style
    except ImportError:
        raise MissingExtraError("viz", wanted_for) from None
    buffer = io.BytesIO()
    with style.context(["default", STYLE, PICTURE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # what the font has not becomes a box
        drawn = figure.Figure(figsize=size, layout="constrained")
        drawn.suptitle(title)
        yield drawn
        drawn.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(Path(path), buffer.getvalue())


def _plot(ax: "Axes", lines: Sequence[Line]) -> None:
    for line in lines:
        ax.plot(
            *thin(line.x, line.y),
            color=COLOURS[line.colour],
            linewidth=line.width,
            alpha=line.opacity,
            label=line.label,
            marker="o" if line.marks else "",
            markersize=4,
            markevery=max(len(line.x) // 25, 1),
        )
    if not any(np.isfinite(line.y).any() for line in lines):
        ax.set(xticks=[], yticks=[])
        return
    if spiky(lines):
        ax.set_yscale("log")
    ax.set_xlabel("step")
    for axis in (ax.xaxis, ax.yaxis):
        scale = Scale(*axis.get_view_interval(), 0, 1, log=axis.get_scale() == "log")
        ticks = [tick for tick in scale.ticks(6) if axis is ax.yaxis or tick == round(tick)]
        axis.set_ticks(ticks, labels=tick_labels(ticks))
    ax.minorticks_off()
