"""A run's report: metrics.jsonl read back, and report.html and curve.png drawn from it alone."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from octavo.disk import write_atomic
from octavo.errors import ConfigError, DataError, MissingExtraError
from octavo.reporting.curves import Event, draw_curves
from octavo.reporting.page import render


def draw_run(run: Path | str) -> None:
    """Write a run's report.html and, where matplotlib is installed, its curve.png."""
    write_report(run)
    with contextlib.suppress(MissingExtraError):  # the report says how to install it
        draw_curves(read_metrics(run), _metrics_file(run).with_name("curve.png"))


def write_report(run: Path | str) -> Path:
    """Write report.html beside the metrics of ``run``, a run directory or its metrics.jsonl.

    Raises `ConfigError` where there are no metrics, `DataError` where they cannot be read or hold
    nothing yet, `ResourceError` when the disk refuses.
    """
    metrics = _metrics_file(run)
    events = read_metrics(metrics)
    if not events:
        raise DataError("nothing happened in this run yet", f"in {metrics}", "train it first")
    page = metrics.with_name("report.html")
    html = render(events, metrics.resolve().parent.name)
    write_atomic(page, html.encode("utf-8", errors="replace"))  # a sample may hold half a pair
    return page


def read_metrics(run: Path | str) -> list[Event]:
    """The events of a run directory or metrics.jsonl that still hold, in order.

    A line that a killed process left torn is passed over: the last one, or one before a ``start``.
    A resumed run takes back what came after the step it resumed from, and replaces at that step
    what it writes again. Raises `ConfigError` where there is no such file and `DataError`, naming
    the line, for anything else that is no event.
    """
    path = _metrics_file(run)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", fix="give a run") from None
    events: list[Event] = []
    torn = 0
    for number, line in enumerate(lines, 1):
        if not line.strip(b"\0 \r"):  # zeros are what a power cut leaves
            continue
        event = _parse(line, number, path)
        if event is None:
            torn = number
            continue
        if torn and event["event"] != "start":
            raise _broken(torn, path)
        torn = 0
        events.append(event)
    return _still_valid(events)


def _parse(line: bytes, number: int, path: Path) -> Event | None:
    """The event on a line; None where it is no more than the beginning of one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        if line.startswith(b"{"):
            return None
        raise _broken(number, path) from None
    known = isinstance(event, dict) and isinstance(event.get("event"), str)
    if not known or not isinstance(event.get("step"), int):
        raise _broken(number, path)
    return event


def _broken(number: int, path: Path) -> DataError:
    return DataError(f"line {number} is no event", f"in {path}", "remove the line and try again")


def _still_valid(events: Iterable[Event]) -> list[Event]:
    """Without what a later ``start`` took back, or a later session wrote again."""
    session, rows = 0, []
    for event in events:
        if event["event"] == "start":
            session += 1
            rows = [(n, e) for n, e in rows if e["step"] <= event["step"] and e["event"] != "end"]
        rows.append((session, event))
    newest = {(e["event"], e["step"]): n for n, e in rows}
    return [e for n, e in rows if newest[e["event"], e["step"]] == n]


def _metrics_file(run: Path | str) -> Path:
    path = Path(run)
    return path / "metrics.jsonl" if path.is_dir() else path
