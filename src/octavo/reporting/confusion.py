"""A classifier's confusion matrix as a picture: which label was taken for which.

Rows are true labels, columns predicted ones; a cell's shade is its share of its row, its number the
texts in it. Drawn by matplotlib (the extra ``viz``); the same report gives the same bytes.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.reporting.curves import BLUE, INK, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from octavo.adapting.classify import Report

MOST_NUMBERS = 20  # labels: with more, numbers would not fit the cells


def draw_confusion(report: "Report", path: Path | str) -> None:
    """Write a PNG of ``report.confusion`` to ``path``; raises as `picture`."""
    width = min(3.2 + 0.55 * len(report.labels), 16.0)  # inches
    title = (
        f"{report.confusion.sum():,} texts: accuracy {report.accuracy:.1%}, "
        f"macro F1 {report.macro_f1:.3f}"
    )
    with picture(path, "drawing a confusion matrix", (width, width - 0.4), title) as figure:
        _draw(figure.add_subplot(), report)


def _draw(ax: "Axes", report: "Report") -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shares = report.confusion / np.maximum(report.support, 1)[:, None]
    shades = LinearSegmentedColormap.from_list("share", ["white", BLUE])
    ax.imshow(shares, cmap=shades, vmin=0, vmax=1)
    places = range(len(report.labels))
    names = [label if len(label) <= 24 else label[:23] + "…" for label in report.labels]
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
