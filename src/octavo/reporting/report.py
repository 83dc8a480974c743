"""A run's report: metrics.jsonl read back, and report.html and curve.png drawn from it alone."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from octavo.disk import write_atomic
from octavo.errors import ConfigError, DataError, MissingExtraError
from octavo.reporting.comparison import names_of, render_comparison
from octavo.reporting.curves import draw_curves
from octavo.reporting.page import render
from octavo.reporting.series import Event


def draw_run(run: Path | str) -> Path:
    """Write a run's report.html and, where matplotlib is installed, its curve.png."""
    page = write_report(run)
    with contextlib.suppress(MissingExtraError):  # a picture more
        draw_curves(read_metrics(run), _metrics_file(run).with_name("curve.png"))
    return page


def write_report(run: Path | str, alive: bool = False) -> Path:
    """Write report.html beside the metrics of ``run``, a run directory or its metrics.jsonl.

    The page of a run that is ``alive`` loads itself again now and then.

    Raises `ConfigError` where there are no metrics, `DataError` where they cannot be read or hold
    nothing yet, `ResourceError` when the disk refuses.
    """
    metrics = _metrics_file(run)
    page = metrics.with_name("report.html")
    html = render(_some_metrics(metrics), metrics.resolve().parent.name, alive)
    write_atomic(page, html.encode("utf-8", errors="replace"))  # a sample may hold half a pair
    return page


def write_comparison(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write a page that lays ``runs``, at least two, over each other; raises as `write_report`."""
    files = list(dict.fromkeys(_metrics_file(run).resolve() for run in runs))
    if len(files) < 2:
        raise ConfigError("the runs are one and the same", f"in {files[0].parent}", "name another")
    names = names_of([path.parent for path in files])
    html = render_comparison(dict(zip(names, map(_some_metrics, files), strict=True)))
    write_atomic(Path(out), html.encode("utf-8", errors="replace"))
    return Path(out)


def _some_metrics(path: Path) -> list[Event]:
    events = read_metrics(path)
    if not events:
        raise DataError("nothing happened in this run yet", f"in {path}", "train it first")
    return events


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
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            fix="give a run trained here: an imported one has no curves",
        ) from None
    events, torn = list[Event](), 0
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
    """Without what a later ``start`` or ``rewind`` took back, or was written again after it.

    The spikes that a run went back from are told of all the same.
    """
    session, rows = 0, []
    for event in events:
        if event["event"] in ("start", "rewind"):
            session += 1
            stays = ("spike", "rewind") if event["event"] == "rewind" else ()
            rows = [
                (n, e)
                for n, e in rows
                if (e["step"] <= event["step"] and e["event"] != "end") or e["event"] in stays
            ]
        rows.append((session, event))
    newest = {_identity(e): n for n, e in rows}
    return [e for n, e in rows if newest[_identity(e)] == n]


def _identity(event: Event) -> tuple[Any, ...]:
    """What an event that is written again replaces: each spike at a step is another."""
    return event["event"], event["step"], event.get("report"), event.get("skipped_rows")


def _metrics_file(run: Path | str) -> Path:
    path = Path(run)
    return path / "metrics.jsonl" if path.is_dir() else path
