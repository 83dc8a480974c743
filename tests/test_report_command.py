"""`octavo report` as people type it."""

import json

import pytest
from command_kit import complaint, figures, printed

from octavo.commands import report


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of nothing but metrics."""
    monkeypatch.chdir(tmp_path)
    for name, loss in (("a", 2.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        told = [{"event": "start", "step": 0, "parameters": 10}]
        told += [{"event": "train", "step": s, "loss": loss, "tokens": s} for s in range(1, 30)]
        lines = "".join(json.dumps(event) + "\n" for event in told)
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"event": "tr', encoding="utf-8")
    return tmp_path


def test_one_run_is_drawn_anew(runs, capsys):
    assert printed(capsys, "report", "a") == "a/report.html\n"
    assert "Not finished: step 29" in (runs / "a" / "report.html").read_text(encoding="utf-8")
    assert (runs / "a" / "curve.png").exists()


def test_several_runs_are_laid_over_each_other(runs, capsys):
    assert printed(capsys, "report", "a", "b") == "comparison.html\n"
    assert figures(capsys, "report", "b", "a", "--out", "all.html") == {"page": "all.html"}
    assert "a · b" in (runs / "comparison.html").read_text(encoding="utf-8")
    assert "b · a" in (runs / "all.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere"], 2, "cannot read nowhere"),
        (["a", "nowhere"], 2, "cannot read"),
        (["a", "a"], 2, "one and the same"),
        (["a", "--out", "x.html"], 2, "lies in the run"),
        ([], 2, "no run is named"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(runs, capsys, words, code, says):
    found, said = complaint(capsys, "report", *words)
    assert found == code
    assert says in said


def test_its_help_page_shows_how(capsys):
    assert report.PAGE.splitlines()[0] in printed(capsys, "report", "--help")
