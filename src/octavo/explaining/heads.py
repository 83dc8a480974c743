"""What every head looks at, as one picture: a map a head, rows the tokens that look.

Drawn by matplotlib (the extra ``viz``); lightness alone tells the weights, by their square root, so
that it reads in grey and to colour-blind eyes. The same weights give the same bytes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo.errors import ConfigError
from octavo.explaining.reading import check_ids, vocab_size
from octavo.generating.recording import Recorder, token_text
from octavo.language_model import LanguageModel
from octavo.reporting.curves import BLUE, GRID, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TOKENS = 256  # of a picture: more than one can tell apart
LABEL = 6.4  # points between two labels
TICKS = (0, 0.1, 0.25, 0.5, 1)


def attention_of(lm: LanguageModel, ids: Sequence[int]) -> np.ndarray:
    """What each token looks at, of a text that fits the context: (layers, H, T, T) float32.

    Raises `ConfigError` for a text that is empty, too long, or has ids the model has not.
    """
    check_ids(ids, vocab_size(lm))
    if len(ids) > lm.config.block_size:
        raise ConfigError(f"{len(ids)} tokens do not fit a context of {lm.config.block_size}")
    recorder = Recorder()
    device = next(lm.model.parameters()).device
    with torch.inference_mode():
        lm.model.hidden(torch.tensor([list(ids)], device=device), attend=recorder)
    return torch.cat(recorder.calls).numpy()


def labels(lm: LanguageModel, ids: Sequence[int]) -> list[str]:
    """Tokens as they stand beside a picture: short, blanks made visible."""
    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    return [visible(token_text(tokenizer, int(token))) for token in ids]


def visible(text: str) -> str:
    """A token's text without anything that does not print."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    shown = "".join(signs.get(c, c if c.isprintable() else "·") for c in text)
    return shown if len(text) <= 14 else shown[:13] + "…"


def draw_heads(
    weights: np.ndarray,
    tokens: Sequence[str],
    path: Path | str,
    title: str = "",
    layer: int | None = None,
    head: int | None = None,
) -> None:
    """Write a PNG of ``weights`` (layers, H, T, T): all heads, one layer's, one head's, or one map.

    Raises `ConfigError` for a layer or head that is not there, else as `picture`.
    """
    layers = _chosen("layer", layer, weights.shape[0])
    heads = _chosen("head", head, weights.shape[1])
    maps = {f"layer {la}, head {he}": weights[la, he] for la in layers for he in heads}
    columns = len(heads)
    if min(len(layers), len(heads)) == 1:  # a row of maps: fold it
        columns = math.ceil(math.sqrt(len(maps)))
    side = min(max(14 / columns, 1.1), 7.0 if len(maps) == 1 else 3.2)  # inches of a map
    rows = math.ceil(len(maps) / columns)
    size = (columns * side + 1.5, rows * (side + 0.05) + 0.9)
    with picture(path, "drawing attention", size, title) as figure:
        figure.set_dpi(200 if max(size) < 20 else 120)
        figure.set_layout_engine("constrained", h_pad=0.04, w_pad=0.04)
        _draw(figure, maps, columns, rows, tokens, side)


def _chosen(what: str, number: int | None, count: int) -> Sequence[int]:
    if number is None:
        return range(count)
    if not 0 <= number < count:
        raise ConfigError(f"there is no {what} {number}", fix=f"the {what}s are 0 to {count - 1}")
    return [number]


def _draw(
    figure: "Figure",
    maps: dict[str, np.ndarray],
    columns: int,
    rows: int,
    tokens: Sequence[str],
    side: float,
) -> None:
    """The maps, labelled at the left and below, and one colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shades = LinearSegmentedColormap.from_list("weight", ["white", BLUE, "#04233f"])
    shades = shades.with_extremes(bad=GRID)
    axes = [figure.add_subplot(rows, columns, n + 1) for n in range(len(maps))]
    later = np.triu(np.ones((len(tokens), len(tokens)), dtype=bool), 1)
    for number, (ax, (name, weights)) in enumerate(zip(axes, maps.items(), strict=True)):
        image = ax.imshow(
            np.ma.masked_array(weights, later), cmap=shades, norm=PowerNorm(0.5, 0, 1)
        )
        ax.set_title(name, fontsize=min(9, 5 * side), pad=3)
        lowest = number + columns >= len(maps)
        _label(ax, tokens, side, left=number % columns == 0, below=lowest)
    figure.supxlabel("token looked at (grey: later ones, which no token sees)", fontsize=9)
    figure.supylabel("token that looks", fontsize=9)
    scale = {"ticks": TICKS, "label": "attention weight", "aspect": 40}
    bar = figure.colorbar(image, ax=axes, shrink=min(1, 7 / figure.get_figheight()), **scale)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in TICKS])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _label(ax: "Axes", tokens: Sequence[str], side: float, left: bool, below: bool) -> None:
    """Tokens along the edges, as many as stay readable."""
    step = math.ceil(len(tokens) * LABEL / (72 * side * 0.9))
    places = range(0, len(tokens), step)
    names = [tokens[place] for place in places]
    ax.set_xticks(places, labels=names if below else [], rotation=90, fontsize=6)
    ax.set_yticks(places, labels=names if left else [], fontsize=6)
    ax.tick_params(length=2, left=left, bottom=below)
    ax.spines[:].set_visible(False)
