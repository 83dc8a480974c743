import math
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import MissingExtraError
from octavo.reporting.curves import (
    best_validation,
    draw_curves,
    moving_mean,
    series,
    thin,
    tick_labels,
)

bounded = settings(derandomize=True, max_examples=60, deadline=None)
floats = st.floats(-1e6, 1e6) | st.just(math.nan)


def metrics(steps: int, every: int = 10) -> list[dict]:
    """A run whose loss falls from 4.6 to 1.5, with noise."""
    noise = np.random.default_rng(0)
    events: list[dict] = [{"event": "start", "step": 0, "parameters": 802_688}]
    for step in range(every, steps + 1, every):
        loss = 1.5 + 3.1 * math.exp(-step / 100) + noise.normal(0, 0.05)
        rates = {"lr": 1e-3 * (1 - step / steps), "tokens_per_s": 11_000 + noise.normal(0, 300)}
        events.append({"event": "train", "step": step, "loss": loss, "grad_norm": 0.7, **rates})
        if step % 250 == 0:
            events.append({"event": "eval", "step": step, "val_loss": loss + 0.1})
    return events


def test_the_same_events_give_the_same_bytes(tmp_path: Path):
    events = metrics(500)
    draw_curves(events, tmp_path / "a.png")
    draw_curves(events, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_users_matplotlibrc_neither_shows_nor_is_changed(tmp_path: Path):
    events = metrics(500)
    draw_curves(events, tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        draw_curves(events, tmp_path / "red.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "red.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_an_empty_run_is_no_error(tmp_path: Path):
    draw_curves([{"event": "start", "step": 0}], tmp_path / "curve.png")


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "nan"])
def test_numbers_that_are_none_are_gaps(tmp_path: Path, bad: object):
    events = metrics(500)
    for event in events[10:15]:
        event |= dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_s", "val_loss"), bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(events, tmp_path / "curve.png")
    steps, values = series(events, "train", "loss")
    assert steps[np.isnan(values)].tolist() == [100, 110, 120, 130, 140]


def test_best_validation_is_the_first_of_the_lowest_and_never_nan():
    losses = [2.0, math.nan, 1.5, None, 1.5]
    events = [{"event": "eval", "step": i, "val_loss": loss} for i, loss in enumerate(losses)]
    best = best_validation([*events, {"event": "train", "step": 9, "val_loss": 0.1}])
    assert best is events[2]
    assert best_validation(events[1:2]) is None
    assert best_validation([]) is None


def test_a_steep_start_is_not_bent_by_smoothing():
    """The mean reaches equally far to both sides, so a straight line stays what it is."""
    line = np.linspace(5.0, 1.0, 50)
    np.testing.assert_allclose(moving_mean(line, 7), line, rtol=1e-12)


@bounded
@given(st.lists(floats, min_size=1, max_size=40), st.integers(0, 10))
def test_moving_mean_is_the_mean_of_the_finite_neighbours(values: list[float], reach: int):
    array = np.array(values)
    for i, mean in enumerate(moving_mean(array, reach)):
        near = min(reach, i, len(values) - 1 - i)
        window = array[i - near : i + near + 1]
        finite = window[np.isfinite(window)]
        expected = finite.mean() if len(finite) else math.nan
        np.testing.assert_allclose(mean, expected, rtol=1e-9, atol=1e-5)


@bounded
@given(st.lists(floats, min_size=1, max_size=300), st.integers(6, 40))
def test_thinning_keeps_order_ends_and_every_extreme(values: list[float], most: int):
    x, y = np.arange(len(values)), np.array(values)
    thin_x, thin_y = thin(x, y, most)
    assert len(thin_x) <= max(most, 2)
    assert (np.diff(thin_x) > 0).all()
    assert thin_x[0] == 0
    assert thin_x[-1] == len(values) - 1
    np.testing.assert_array_equal(y[thin_x], thin_y)
    if np.isfinite(y).any():
        assert np.nanmax(thin_y) == np.nanmax(y)
        assert np.nanmin(thin_y) == np.nanmin(y)


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([1.5, 2.0, 2.5], ["1.5", "2.0", "2.5"]),
        ([0.1 + 0.2, 0.4], ["0.3", "0.4"]),
        ([0, 1000, 2000], ["0", "1,000", "2,000"]),
        ([0, 0.0005, 0.001], ["0", "0.5e-3", "1e-3"]),
        ([2e-5, 3e-5], ["2e-5", "3e-5"]),
        ([0, 500_000, 1_500_000], ["0", "0.5M", "1.5M"]),
        ([1e9, 2.5e9], ["1B", "2.5B"]),
        ([-0.02, 0, 0.02], ["-0.02", "0.00", "0.02"]),
        ([0], ["0"]),
        ([], []),
    ],
)
def test_tick_labels_of_an_axis_are_alike(ticks: list[float], labels: list[str]):
    assert tick_labels(ticks) == labels


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "octavo\[viz\]"'):
        draw_curves(metrics(100), tmp_path / "curve.png")
