"""Several runs on one page: who is who, and what differs."""

import json
from pathlib import Path

import pytest
from test_page import Page, run, start

from octavo.config import OptimConfig
from octavo.errors import ConfigError, DataError
from octavo.reporting.comparison import names_of, render_comparison
from octavo.reporting.report import write_comparison


def two() -> dict[str, list[dict]]:
    other = run(500)
    other[0] = start(optim=OptimConfig(lr=3e-4))
    other[0]["environment"]["torch"] = "<2.14>"
    return {"plain": run(), "<slow>": other}


def test_figures_and_differences_stand_side_by_side():
    html = render_comparison(two())
    page = Page(html)
    assert page.text["h1"] == ["plain · <slow>"]
    assert page.text["h2"] == [
        "Figures", "Curves", "Settings that differ", "Environment that differs"
    ]  # fmt: skip
    settings = html[html.index("Settings that differ") : html.index("Environment that")]
    assert "optim.lr" in settings
    assert "<td>0.001</td><td>0.0003</td>" in settings
    assert "optim.weight_decay" not in settings
    assert "&lt;2.14&gt;" in html
    assert not {"script", "img", "link"} & set(page.tags())
    assert "2.000" in page.text["td"], "the best validation loss"


def test_names_are_as_short_as_tells_them_apart():
    assert names_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert names_of([Path("/a/x/one"), Path("/b/x/one")]) == ["a/x/one", "b/x/one"]


def write(home: Path, events: list[dict], torn: str = "") -> Path:
    home.mkdir(parents=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (home / "metrics.jsonl").write_text(lines + torn, encoding="utf-8")
    return home


def test_a_comparison_is_written_of_runs_and_metrics_files_with_torn_ends_too(tmp_path: Path):
    runs = two()
    one = write(tmp_path / "a" / "run", runs["plain"], torn='{"event": "tra')
    other = write(tmp_path / "b" / "run", runs["<slow>"])
    page = write_comparison([one, other / "metrics.jsonl"], tmp_path / "both.html")
    assert Page(page.read_text(encoding="utf-8")).text["h1"] == ["a/run · b/run"]
    with pytest.raises(ConfigError, match="one and the same"):
        write_comparison([one, one / "metrics.jsonl"], page)
    with pytest.raises(DataError, match="nothing happened"):
        write_comparison([one, write(tmp_path / "empty", [])], page)
