"""Series hold every finite number of the events, and drawing them small loses no spike."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.reporting.series import best_validation, moving_mean, series, thin, tick_labels

bounded = settings(derandomize=True, max_examples=60, deadline=None)
floats = st.floats(-1e6, 1e6) | st.just(math.nan)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "nan"])
def test_numbers_that_are_none_are_gaps(bad: object):
    events = [{"event": "train", "step": step, "loss": 2.0} for step in (10, 20, 30)]
    events[1]["loss"] = bad
    steps, values = series([*events, {"event": "eval", "step": 40}], "train", "loss")
    assert steps.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(values, [2.0, math.nan, 2.0])


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
