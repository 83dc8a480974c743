"""A study as one picture: how much better or worse than the first arm each arm is, and how surely.

Above the arms, each seed a dot; below the settings' main effects. What lies right of the line is
better; an interval that crosses it is no evidence.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.reporting.curves import BLUE, GRID, INK, SKY, VERMILION, picture
from octavo.studies.ablation import Ablation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from octavo.evaluating.compare import Difference

COLOURS = {"better": BLUE, "worse": VERMILION, "unknown": INK, "identical": INK}
SHAPES = {"better": ">", "worse": "<", "unknown": "o", "identical": "o"}  # not by colour alone


def draw_ablation(study: Ablation, path: Path | str) -> None:
    """Write a PNG to ``path``; raises as `picture`."""
    effects = study.effects if len(study.rows) > len(study.effects) + 1 else []
    counts = [len(study.rows), *([len(effects)] if effects else [])]
    height = 1.6 + 0.34 * sum(counts) + 0.5 * len(counts)  # inches
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    title = f"{len(study.rows)} arms, {seeds} (dots), 95 % intervals"
    with picture(path, "drawing a study", (9, height), title) as figure:
        axes = figure.subplots(len(counts), 1, sharex=True, height_ratios=counts, squeeze=False)
        _draw_arms(axes[0, 0], study)
        if effects:
            ax = axes[1, 0]
            ax.set_title("Each setting alone, over all the others")
            _draw(ax, [f"{e.value}, not {e.first}" for e in effects], [e.result for e in effects])
        axes[-1, 0].set_xlabel(
            f"better by so many {study.unit.replace(' a ', ' per ')} →   (left of the line: worse)"
        )


def _draw_arms(ax: "Axes", study: Ablation) -> None:
    first = study.rows[0]
    ax.set_title(f"Each arm beside {first.name}, whose loss is {first.loss:.3f}")
    for place, row in enumerate(study.rows):
        gains = np.array(first.losses) - np.array(row.losses)
        ax.scatter(gains, np.full(len(gains), place + 0.25), s=14, color=SKY, zorder=2)
    _draw(ax, [row.name for row in study.rows], [row.against_first for row in study.rows])


def _draw(ax: "Axes", names: list[str], results: "list[Difference | None]") -> None:
    """One line a result: its interval and its mean, shaped and coloured by the verdict."""
    for place, result in enumerate(results):
        if result is None:
            continue
        colour = COLOURS[result.verdict]
        ax.hlines(place, result.low, result.high, color=colour, linewidth=2, zorder=3)
        ax.plot(result.gain, place, SHAPES[result.verdict], color=colour, markersize=7, zorder=4)
    ax.axvline(0, color=GRID, linewidth=1.5, zorder=1)
    ax.set_yticks(range(len(names)), labels=names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(left=False)
