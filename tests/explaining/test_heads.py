"""Pictures of attention: the right maps, readable labels, errors in one line."""

import sys

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError, MissingExtraError
from octavo.explaining import heads
from octavo.explaining.heads import attention_of, draw_heads, labels, visible

WEIGHTS = np.tril(np.ones((3, 4, 6, 6))) / np.arange(1, 7)[:, None]


@pytest.fixture
def drawn(monkeypatch):
    """The maps given to the drawer, as name to weights, the shape of their grid, the figure."""
    kept = []
    plain = heads._draw

    def draw(figure, maps, columns, rows, *rest):
        kept.append((maps, (rows, columns), figure))
        plain(figure, maps, columns, rows, *rest)

    monkeypatch.setattr(heads, "_draw", draw)
    return kept


def test_attention_is_the_models(make_lm):
    lm = make_lm()
    ids = lm.tokenizer.encode("sea shells")
    found = attention_of(lm, ids)
    assert found.shape == (3, 4, 10, 10)
    assert found.sum(-1) == pytest.approx(np.ones((3, 4, 10)), abs=1e-5)
    seen = []

    def attend(q, k, v, mask, dropout):
        k = k.repeat_interleave(2, 1)  # two heads share a key
        seen.append(
            (q @ k.transpose(-2, -1) / 2).masked_fill(~torch.ones(10, 10).tril().bool(), -torch.inf)
        )
        return torch.softmax(seen[-1], -1) @ v.repeat_interleave(2, 1)

    with torch.inference_mode():
        lm.model(torch.tensor([ids]), attend=attend)
    assert found == pytest.approx(torch.softmax(torch.cat(seen), -1).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("chosen", "heads_drawn", "grid"),
    [
        ({}, [(layer, head) for layer in range(3) for head in range(4)], (3, 4)),
        ({"layer": 1}, [(1, 0), (1, 1), (1, 2), (1, 3)], (2, 2)),
        ({"head": 3}, [(0, 3), (1, 3), (2, 3)], (2, 2)),
        ({"layer": 2, "head": 0}, [(2, 0)], (1, 1)),
    ],
)
def test_the_heads_one_asked_for_are_drawn(tmp_path, drawn, chosen, heads_drawn, grid):
    weights = WEIGHTS * np.arange(1, 13).reshape(3, 4, 1, 1) / 12
    draw_heads(weights, "abcdef", tmp_path / "a.png", "title", **chosen)
    [(maps, shape, figure)] = drawn
    assert shape == grid
    assert list(maps) == [f"layer {layer}, head {head}" for layer, head in heads_drawn]
    for place, found in zip(heads_drawn, maps.values(), strict=True):
        assert np.array_equal(found, weights[place])
    pictures = [ax.images[0].get_array() for ax in figure.axes[: len(maps)]]
    for picture, found in zip(pictures, maps.values(), strict=True):
        assert np.array_equal(picture.mask, np.triu(np.ones((6, 6)), 1))  # no weight: not looked at
        assert np.array_equal(picture.filled(0), found)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_heads(WEIGHTS[:1, :2], list("abcdef"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_head_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no layer 3; the layers are 0 to 2"):
        draw_heads(WEIGHTS, "abcdef", tmp_path / "a.png", layer=3)
    with pytest.raises(ConfigError, match="no head -1; the heads are 0 to 3"):
        draw_heads(WEIGHTS, "abcdef", tmp_path / "a.png", head=-1)
    assert not list(tmp_path.iterdir())


def test_a_text_longer_than_the_context_is_refused(make_lm):
    with pytest.raises(ConfigError, match="17 tokens do not fit a context of 16"):
        attention_of(make_lm(), [0] * 17)


def test_without_matplotlib_the_line_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"octavo\[viz\]\""):
        draw_heads(WEIGHTS, "abcdef", tmp_path / "a.png")


def test_labels_show_blanks_and_what_does_not_print(make_lm):
    lm = make_lm()
    assert labels(lm, lm.tokenizer.encode("e s\n")) == ["e", "␣", "s", "↵"]
    assert visible("\x07a") == "·a"
    assert visible("a" * 30) == "a" * 13 + "…"


@pytest.mark.filterwarnings("error")
def test_every_text_can_be_drawn(tmp_path):
    tokens = ["$", "日本", "\ud83d", "a^b_c", "", "{\\"]
    draw_heads(WEIGHTS, [visible(token) for token in tokens], tmp_path / "a.png", "$a_b")
