import math
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from octavo.errors import MissingExtraError
from octavo.reporting.curves import draw_curves


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


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "octavo\[viz\]"'):
        draw_curves(metrics(100), tmp_path / "curve.png")
