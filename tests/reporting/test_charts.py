"""Which charts a run has, and how several are laid over each other."""

import re

import numpy as np

from octavo.reporting.charts import RAMP, _ramp, comparison_charts, run_charts


def events(loss: float = 2.0, steps: int = 100, every: int = 10, layers: int = 0) -> list[dict]:
    told: list[dict] = [{"event": "start", "step": 0}]
    for step in range(every, steps + 1, every):
        at = {"step": step, "tokens": 100 * step, "seconds": step / 2}
        values = {"loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 900.0}
        if layers:
            norms = {f"blocks.{i}": 0.1 * (i + 1) for i in range(layers)} | {"rest": 0.3}
            values |= {"layers": norms, "updates": dict.fromkeys(norms, 0.001)}
        told.append({"event": "train", **at, **values})
        if step % 50 == 0:
            told.append({"event": "eval", **at, "val_loss": loss + 0.1})
    return told


def captions(charts: list[str]) -> list[str]:
    return [re.findall("<figcaption>(.*?)</figcaption>", chart)[0] for chart in charts]


def test_a_run_has_the_charts_of_what_it_logged():
    plain = captions(run_charts(events()))
    assert [caption.partition(" (")[0] for caption in plain] == [
        "Loss", "Learning rate", "Gradient norm", "Speed"
    ]  # fmt: skip
    judged = {"event": "judge", "step": 50, "hellaswag_acc": 0.26, "hellaswag_acc_norm": 0.27}
    more = captions(run_charts([*events(layers=3), judged]))
    assert len(more) == 7
    assert run_charts([{"event": "start", "step": 0}]) == []


def test_each_layer_has_a_line_and_depth_a_colour():
    *_, norms, updates = run_charts(events(layers=12))
    for drawn in (norms, updates):
        assert drawn.count('fill="none"') == 13
        assert all(_ramp(i / 11) in drawn for i in range(12))
        assert drawn.count("<li>") == 8
        assert "block 0<" in drawn
        assert "block 11<" in drawn
    ends = ["#" + "".join(f"{part:02x}" for part in colour) for colour in RAMP]
    assert [_ramp(share) for share in (0, 0.5, 1)] == ends


def test_runs_keep_their_colour_in_every_chart_and_the_eighth_is_dashed():
    runs = {f"run {i}": events(loss=2.0 + i) for i in range(9)}
    for drawn in comparison_charts(runs):
        drawing = drawn[drawn.index('role="img"') :]
        colours = re.findall(r'fill="none" stroke="var\(--c(\d)\)"(.*?)stroke-linejoin', drawing)
        assert [int(colour) for colour, _ in colours] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
        assert ["dasharray" in style for _, style in colours] == [False] * 7 + [True] * 2


def test_time_is_in_minutes_and_of_long_runs_in_hours():
    def axis(runs: dict) -> str:
        (drawn,) = [chart for chart in comparison_charts(runs) if "The same by time" in chart]
        return re.findall(r'aria-label=".*? over (\w+)"', drawn)[0]

    assert axis({"a": events(), "b": events()}) == "minutes"
    assert axis({"a": events(), "b": events(steps=40_000, every=1000)}) == "hours"


def test_a_run_without_validation_is_laid_over_all_the_same():
    bare = [event for event in events() if event["event"] != "eval"]
    drawn = comparison_charts({"bare": bare, "whole": events()})
    assert "Training loss, smoothed (nats a token)" in captions(drawn)
    assert all(np.char.find(chart, "nan") < 0 for chart in drawn)
