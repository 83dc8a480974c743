"""Several runs on one page: their curves laid over each other, and where their settings differ."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from octavo.reporting.charts import comparison_charts
from octavo.reporting.curves import Event
from octavo.reporting.page import document, flat, headline, last, plain, section

Runs = Mapping[str, Sequence[Event]]
"""The events of each run, by its name on the page."""


def render_comparison(runs: Runs) -> str:
    """The page, as HTML; ``runs`` are at least two, each with at least one event."""
    charts = "\n".join(comparison_charts(runs))
    parts = (
        f"<header>\n<h1>{escape(' · '.join(runs))}</h1>\n</header>",
        section("Figures", _figures(runs)),
        section("Curves", f'<div class="curves">\n{charts}\n</div>' if charts else ""),
        section("Settings that differ", _differing(runs, "settings")),
        section("Text that differs", _differing(runs, "data")),
        section("Environment that differs", _differing(runs, "environment")),
    )
    return document(f"{len(runs)} runs", parts, "Drawn by octavo from metrics.jsonl alone.")


def names_of(runs: Sequence[Path]) -> list[str]:
    """A name for each run: its directory's, with as much before it as tells them apart.

    >>> names_of([Path("/a/one"), Path("/a/two")])
    ['one', 'two']
    >>> names_of([Path("/a/x/one"), Path("/b/x/one")])
    ['a/x/one', 'b/x/one']
    """
    longest = max(len(path.parts) for path in runs)
    for length in range(1, longest + 1):
        names = [os.path.join(*path.parts[-length:]) for path in runs]
        if len(set(names)) == len(set(runs)):
            break
    return names


def _figures(runs: Runs) -> str:
    """The headline's figures, one run a row."""
    rows = {}
    for name, events in runs.items():
        start = last(events, "start")
        figures = {label: value for label, value, _ in headline(events, start)}
        parameters = start.get("parameters")
        known = {"Parameters": f"{parameters:,}"} if parameters is not None else {}
        rows[name] = known | figures | {"End": last(events, "end").get("reason", "not yet")}
    return _grid(rows, list(dict.fromkeys(key for row in rows.values() for key in row)), "numbers")


def _differing(runs: Runs, section_name: str) -> str:
    """What the runs' ``start`` says otherwise, one setting a row and one run a column."""
    told = {
        name: flat(last(events, "start").get(section_name, {})) for name, events in runs.items()
    }
    keys = dict.fromkeys(key for values in told.values() for key in values)
    rows = {}
    for key in keys:
        shown = {
            name: plain(values[key]) if key in values else "–" for name, values in told.items()
        }
        if len(set(shown.values())) > 1:
            rows[key] = shown
    return _grid(rows, list(told), "") if rows else ""


def _grid(rows: Mapping[str, Mapping[str, str]], columns: Sequence[str], kind: str) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ("", *columns))
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(row.get(column, '–'))}</td>" for column in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
