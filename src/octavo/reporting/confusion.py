"""A classifier's confusion matrix as a picture: which label was taken for which.

Rows are true labels, columns predicted ones; a cell's shade is its share of its row, its number the
texts in it. Drawn by matplotlib (the extra ``viz``); the same report gives the same bytes.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.disk import write_atomic
from octavo.reporting.curves import BLUE, INK, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from octavo.adapting.classify import Report

MOST_NUMBERS = 20  # labels: with more, numbers would not fit the cells


def draw_confusion(report: "Report", path: Path | str) -> None:
    """Write a PNG of ``report.confusion`` to ``path``.

    Raises `MissingExtraError` without matplotlib and `ResourceError` when the disk refuses.
    """
    with styled("drawing a confusion matrix", {"axes.grid": False, "font.size": 10}):
        from matplotlib.figure import Figure

        n = len(report.labels)
        width = min(3.2 + 0.55 * n, 16.0)  # inches
        figure = Figure(figsize=(width, width - 0.4), dpi=150, layout="constrained")
        figure.suptitle(
            f"{report.confusion.sum():,} texts: accuracy {report.accuracy:.1%}, "
            f"macro F1 {report.macro_f1:.3f}",
            fontsize=11,
            fontweight="bold",
        )
        _draw(figure.add_subplot(), report)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(Path(path), buffer.getvalue())


def _draw(ax: "Axes", report: "Report") -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shares = report.confusion / np.maximum(report.support, 1)[:, None]
    shades = LinearSegmentedColormap.from_list("share", ["white", BLUE])
    ax.imshow(shares, cmap=shades, vmin=0, vmax=1)
    places = range(len(report.labels))
    names = [_short(label) for label in report.labels]
    ax.set_xticks(places, labels=names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, labels=names)
    ax.set(xlabel="predicted", ylabel="true")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(True)
    if len(report.labels) <= MOST_NUMBERS:
        for row, column in np.ndindex(report.confusion.shape):
            colour = "white" if shares[row, column] > 0.5 else INK
            number = f"{report.confusion[row, column]:,}"
            ax.text(column, row, number, color=colour, ha="center", va="center", fontsize=9)


def _short(label: str) -> str:
    """A label that fits beside an axis, with nothing that matplotlib reads as mathematics."""
    short = label if len(label) <= 24 else label[:23] + "…"
    return short.replace("$", r"\$")
