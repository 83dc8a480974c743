"""The benchmarks' method: what is compared, what is refused, what is written down."""

import argparse
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import measure
import record

RATES = {"ours": 30.0, "theirs": 20.0}


def peers(answers: dict[str, int]) -> measure.Peers:
    """Peers that do nothing at a constant rate."""
    return {
        what: partial(measure.Work, answer, partial(float, RATES[what]))
        for what, answer in answers.items()
    }


def equal(answers: dict[str, int]) -> None:
    if len(set(answers.values())) != 1:
        raise SystemExit(f"error: {answers}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> argparse.Namespace:
    """Ten recorded rounds on a quiet machine with a steady witness."""
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(measure.ForeignCpu, "share", lambda self: 0.01)
    monkeypatch.setattr(
        sys, "argv", ["/home/me/x.py", "--a=/home/me", "/home/me/b", "a;b", "--record"]
    )
    namespace = measure.options("a benchmark").parse_args(["--record", "--threads", "1"])
    namespace.versions = record.versions("numpy")
    namespace.witness = partial(measure.Work, 0, partial(float, 50.0))
    return namespace


def records(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "records").glob("*.json"))


def test_a_record_holds_medians_ranges_ratios_and_no_path(
    asked: argparse.Namespace, tmp_path: Path
):
    measure.measure("idle", peers({"ours": 1, "theirs": 1}), equal, "rounds/s", asked)
    (path,) = records(tmp_path)
    assert path.name.startswith("idle-")
    text = path.read_text(encoding="utf-8")
    assert "/home" not in text
    written = json.loads(text)
    assert written["command"] == "python benchmarks/x.py --a=PATH PATH 'a;b' --record"
    assert not written["noisy"]
    rows = {row["what"]: (row["value"], row["unit"]) for row in written["results"]}
    assert rows == {
        "ours": (30.0, "rounds/s"),
        "theirs": (20.0, "rounds/s"),
        "matrix product": (50.0, "GFLOP/s"),
        "ours / theirs": (1.5, "×"),
    }


def test_peers_that_disagree_are_not_timed(asked: argparse.Namespace, tmp_path: Path):
    with pytest.raises(SystemExit, match="'theirs': 2"):
        measure.measure("idle", peers({"ours": 1, "theirs": 2}), equal, "rounds/s", asked)
    assert records(tmp_path) == []


def test_a_peer_that_dies_ends_the_benchmark_by_name(asked: argparse.Namespace):
    broken = {**peers({"ours": 1}), "theirs": partial(int, "no work")}
    with pytest.raises(SystemExit, match="theirs failed"):
        measure.measure("idle", broken, equal, "rounds/s", asked)


def test_a_busy_machine_is_refused_and_with_allow_noise_marked(
    asked: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure.ForeignCpu, "share", lambda self: 0.04)
    with pytest.raises(SystemExit, match="not quiet"):
        measure.measure("idle", peers({"ours": 1}), equal, "rounds/s", asked)
    assert records(tmp_path) == []
    asked.allow_noise = True
    measure.measure("idle", peers({"ours": 1}), equal, "rounds/s", asked)
    assert json.loads(records(tmp_path)[0].read_text(encoding="utf-8"))["noisy"]


def test_a_round_in_which_the_machine_was_slow_is_set_aside(
    asked: argparse.Namespace, tmp_path: Path
):
    """The second of eleven rounds: the witness halves, and what was measured beside it goes too."""

    def in_order(*rates: float) -> partial[float]:
        return partial(list.pop, [*reversed(rates)])

    witness = in_order(50.0, 50.0, 25.0, *[50.0] * 9)  # the first one warms up
    ours = in_order(30.0, 30.0, 99.0, *[30.0] * 9)
    asked.witness = partial(measure.Work, 0, witness)
    measure.measure("idle", {"ours": partial(measure.Work, 1, ours)}, equal, "rounds/s", asked)
    written = json.loads(records(tmp_path)[0].read_text(encoding="utf-8"))
    assert (written["rounds"], written["set_aside"], written["noisy"]) == (10, 1, False)
    assert written["results"][0]["high"] == 30.0


def test_a_machine_that_is_never_steady_is_refused(asked: argparse.Namespace):
    witness = partial(list.pop, [50.0, 25.0, 25.0] * 10)
    asked.witness = partial(measure.Work, 0, witness)
    asked.allow_noise = False
    with pytest.raises(SystemExit, match="not quiet"):
        measure.measure("idle", peers({"ours": 1}), equal, "rounds/s", asked)


def test_too_few_rounds_are_refused(asked: argparse.Namespace):
    asked.rounds = 9
    with pytest.raises(SystemExit, match="at least 10"):
        measure.measure("idle", peers({"ours": 1}), equal, "rounds/s", asked)


def test_our_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch):
    """Ticks of the machine busy, of the machine in all, of our processes: 30 of 100 are others'."""
    readings = iter([(1000, 5000, 200), (1070, 5100, 240)])
    monkeypatch.setattr(measure.ForeignCpu, "_read", lambda self: next(readings))
    assert measure.ForeignCpu([]).share() == pytest.approx(0.3)


def test_a_share_that_cannot_be_known_is_refused():
    assert measure.ForeignCpu([2**30]).share() == 1.0 > measure.FOREIGN_LIMIT


def test_a_ratio_is_taken_round_by_round():
    """A machine that slows down by half slows both: their ratio stays."""
    figures = {"a": [4.0, 2.0], "b": [2.0, 1.0], measure.WITNESS: [1.0, 1.0]}
    rows = {row["what"]: row for row in measure.results(figures, ["a", "b"], "x")}
    assert (rows["a / b"]["low"], rows["a / b"]["high"]) == (2.0, 2.0)
    assert (rows["a"]["value"], rows["a"]["low"], rows["a"]["high"]) == (3.0, 2.0, 4.0)


def test_an_interval_is_students():
    """Ten rounds of which half are 1.0 and half 1.21: 1.1 with a reach of 2.262 standard errors."""
    assert [round(measure.student(n), 3) for n in (9, 19, 1000)] == [2.262, 2.093, 1.962]
    found = measure.interval("a / b", [2.0, 2.42] * 5, [2.0] * 10)
    deviation = statistics.stdev(map(math.log, [1.0, 1.21] * 5))
    assert found["value"] == pytest.approx(1.1)
    assert math.log(found["value"] / found["low"]) == pytest.approx(
        2.2622 * deviation / 10**0.5, 1e-3
    )
    assert found["high"] / found["value"] == pytest.approx(found["value"] / found["low"])
