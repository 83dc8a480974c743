"""Charts drawn by arithmetic: every number where it belongs, whatever the numbers are."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.reporting.svg import (
    BOTTOM,
    FONT,
    HEIGHT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Scale,
    chart,
    round_step,
)

STEPS = np.arange(0, 101, 10)


def figure(*args, **kwargs) -> ET.Element:
    """The chart as elements; it must be well-formed."""
    return ET.fromstring(chart("Loss (nats)", *args, **kwargs))


def paths(drawn: ET.Element) -> list[ET.Element]:
    """The lines of the data."""
    (svg,) = drawn.findall("svg")
    return [path for path in svg.iter("path") if path.get("fill") == "none"]


def points(path: ET.Element) -> np.ndarray:
    """Where a line goes, (N, 2)."""
    pairs = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.get("d", ""))
    return np.array(pairs, dtype=float)


def texts(drawn: ET.Element) -> list[str]:
    return [text.text or "" for text in drawn.iter("text")]


def test_the_line_is_the_numbers_and_the_ticks_stand_beside_theirs():
    drawn = figure([Line(STEPS, STEPS / 10.0)])
    places = points(paths(drawn)[0])
    assert places[0, 0] < places[-1, 0] == WIDTH - RIGHT
    # Straight line in, straight line out; more is higher.
    np.testing.assert_allclose(np.diff(places[:, 1]), np.diff(places[:, 1])[0], atol=0.11)
    assert (np.diff(places[:, 1]) < 0).all()
    texts_at = {t.text: float(t.get("y", 0)) for t in drawn.iter("text") if t.get("text-anchor")}
    assert texts_at["4"] == pytest.approx(places[4, 1] + 0.35 * FONT, abs=0.2)
    assert texts(drawn)[-1] == "step"


def test_gaps_stay_gaps_and_a_point_between_two_of_them_is_seen():
    y = np.array([1.0, 2, math.nan, 3, math.nan, math.inf, 4, 5])
    (path,) = paths(figure([Line(np.arange(8), y)]))
    assert path.get("d", "").count("M") == 3
    assert path.get("d", "").count("h0") == 3
    assert path.get("stroke-linecap") == "round", "else h0 draws nothing"


def test_a_logarithmic_axis_has_no_place_for_zero():
    y = np.array([0.0, 0.1, 1, 10, 100, -1])
    drawn = figure([Line(np.arange(6), y)], log=True)
    places = points(paths(drawn)[0])
    assert len(places) == 4
    np.testing.assert_allclose(np.diff(places[:, 1]), np.diff(places[:, 1])[0], atol=0.11)
    assert {"0.1", "1", "10", "100"} <= set(texts(drawn))


@pytest.mark.parametrize("log", [False, True])
@given(st.lists(st.floats(-1e12, 1e12) | st.just(math.nan), min_size=1, max_size=30))
def test_whatever_the_numbers_are_everything_stays_inside(log: bool, values: list[float]):
    y = np.array(values)
    drawn = chart("x", [Line(np.arange(len(y)) * 7, y)], log=log)
    drawable = np.isfinite(y) & ((y > 1e-30) | (not log))
    assert bool(drawn) == drawable.any()
    if drawn:
        assert "nan" not in drawn
        (path,) = paths(ET.fromstring(drawn))
        across, up = points(path).T
        assert (across >= 0).all()
        assert (across <= WIDTH - RIGHT + 0.1).all()
        assert (up >= TOP - 0.1).all()
        assert (up <= HEIGHT - BOTTOM + 0.1).all()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_in_the_range(low: float, extent: float):
    scale = Scale(low, low + extent, 0, 100)
    ticks = scale.ticks(6)
    assert len(ticks) <= 7
    assert all(scale.low - extent * 1e-6 <= tick <= scale.high + extent * 1e-6 for tick in ticks)


@given(st.floats(1e-12, 1e12))
def test_a_round_step_is_the_next_one_up(least: float):
    step = round_step(least)
    assert least * (1 - 1e-9) <= step <= 2.5 * least * (1 + 1e-9)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_a_legend_names_each_line_that_has_a_name():
    assert figure([Line(STEPS, STEPS, "alone")]).find("ul") is None
    lines = [Line(STEPS, STEPS, "a & b"), Line(STEPS, STEPS + 1, "<c>", "var(--c1)")]
    drawn = figure([*lines, Line(STEPS, STEPS + 2)])
    assert ["".join(item.itertext()) for item in drawn.iter("li")] == ["a & b", "<c>"]


def test_marks_say_what_they_are_and_only_where_the_axis_is():
    drawn = figure([Line(STEPS, STEPS)], spikes=[(50, "spike <50>"), (500, "later")])
    assert [title.text for title in drawn.iter("title")] == ["spike <50>"]


def test_many_long_lines_stay_small():
    noise = np.random.default_rng(0).normal(size=100_000)
    lines = [Line(np.arange(100_000), noise + i, f"block {i}") for i in range(48)]
    assert len(chart("x", lines)) < 150_000


def test_steps_are_whole_numbers_and_other_axes_need_not_be():
    def below(**kwargs) -> list[str | None]:
        drawn = figure([Line(np.array([1.0, 1.5, 3]), np.ones(3))], **kwargs)
        return [text.text for text in drawn.iter("text") if text.get("text-anchor") == "middle"]

    assert below() == ["0", "1", "2", "3", "step"]
    assert below(x_label="hours") == ["0", "1", "2", "3", "hours"]
