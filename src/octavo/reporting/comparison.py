"""Several runs on one page: their curves laid over each other, and where their settings differ."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from octavo.reporting.charts import comparison_charts
from octavo.reporting.page import NOTHING, curves, document, flat, headline, plain, section, table
from octavo.reporting.series import Event, last

Runs = Mapping[str, Sequence[Event]]
"""The events of each run, by its name on the page."""


def render_comparison(runs: Runs) -> str:
    """The page, as HTML; ``runs`` are at least two, each with at least one event."""
    parts = (
        f"<header>\n<h1>{escape(' · '.join(runs))}</h1>\n</header>",
        section("Figures", _figures(runs)),
        curves(comparison_charts(runs)),
        section("Settings that differ", _differing(runs, "settings")),
        section("Text that differs", _differing(runs, "data")),
        section("Environment that differs", _differing(runs, "environment")),
    )
    return document(f"{len(runs)} runs", parts)


def names_of(runs: Sequence[Path]) -> list[str]:
    """A name for each run: its directory's, with as much before it as tells them apart."""
    for length in range(1, max(len(path.parts) for path in runs) + 1):
        names = [os.path.join(*path.parts[-length:]) for path in runs]
        if len(set(names)) == len(set(runs)):
            break
    return names


def _figures(runs: Runs) -> str:
    """The headline's figures, one run a row."""
    told = {}
    for name, events in runs.items():
        parameters = last(events, "start").get("parameters")
        known = {"Parameters": f"{parameters:,}"} if parameters is not None else {}
        known |= {label: value for label, value, _ in headline(events)}
        told[name] = known | {"End": last(events, "end").get("reason", "not yet")}
    columns = list(dict.fromkeys(key for known in told.values() for key in known))
    rows = [(name, *(known.get(key, NOTHING) for key in columns)) for name, known in told.items()]
    return table(rows, ("", *columns), "numbers")


def _differing(runs: Runs, part: str) -> str:
    """What the runs' ``start`` says otherwise, one setting a row and one run a column."""
    told = [flat(last(events, "start").get(part, {})) for events in runs.values()]
    rows = []
    for key in dict.fromkeys(key for values in told for key in values):
        cells = [plain(values[key]) if key in values else NOTHING for values in told]
        if len(set(cells)) > 1:
            rows.append((key, *cells))
    return table(rows, ("", *runs))
