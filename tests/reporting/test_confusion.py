import sys

import numpy as np
import pytest
from matplotlib import image

from octavo.adapting.classify import Report
from octavo.errors import MissingExtraError, ResourceError
from octavo.reporting.confusion import draw_confusion


def make_report(n, labels=None):
    counts = np.random.default_rng(0).integers(0, 9, (n, n)) + np.diag([40] * n)
    return Report(labels or [f"label {i}" for i in range(n)], counts)


@pytest.mark.parametrize("n", [2, 5, 60])
def test_a_picture_of_any_number_of_labels_is_drawn(tmp_path, n):
    draw_confusion(make_report(n), tmp_path / "a.png")
    draw_confusion(make_report(n), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    height, width, _ = image.imread(tmp_path / "a.png").shape
    assert 400 < height <= width < 2500


def test_a_cell_is_as_dark_as_its_share_of_its_row(tmp_path):
    """Two labels of very unequal numbers: shaded by counts, the rare one's row would be white."""
    draw_confusion(Report(["rare", "common"], np.array([[0, 3], [0, 9000]])), tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[..., :3].reshape(-1, 3)
    dark = (np.abs(pixels - np.array([0x00, 0x72, 0xB2]) / 255) < 0.01).all(1)
    white = (pixels == 1).all(1)
    assert dark.mean() == pytest.approx(0.27, abs=0.1)  # two of the four cells
    assert white.mean() > dark.mean()


@pytest.mark.filterwarnings("error")  # what the font lacks becomes a box
@pytest.mark.parametrize("label", ["$a_{$", "a_{b", "x" * 500, "日本語", "<b>", "two\nlines"])
def test_labels_are_drawn_as_they_are(tmp_path, label):
    draw_confusion(make_report(2, [label, "other"]), tmp_path / "a.png")
    height, width, _ = image.imread(tmp_path / "a.png").shape
    assert max(height, width) < 900


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="viz"):
        draw_confusion(make_report(2), tmp_path / "a.png")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ResourceError, match=r"a\.png"):
        draw_confusion(make_report(2), tmp_path / "nowhere" / "a.png")
