"""A run's page: what a model learned, wrote and was told, as one HTML file.

It needs no network, no script and no other file, follows the reader's dark or light, and is the
same for the same events, byte for byte.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np

from octavo.config import Config, ModelConfig
from octavo.errors import ConfigError
from octavo.reporting.charts import run_charts
from octavo.reporting.series import Event, best_validation, last, series

MOST_SAMPLES, MOST_ROWS = 20, 100  # on a page; of a long run an even spread is shown
RELOAD = 20  # seconds until the page of a run that goes on loads itself again
NOTHING = "–"

T = TypeVar("T")


def render(events: Sequence[Event], name: str, alive: bool = False) -> str:
    """The whole page, as HTML, of a run called ``name``; ``events`` are at least one."""
    start = last(events, "start")
    parts = (
        _header(events, name, alive),
        tiles(headline(events)),
        curves(run_charts(events), folded("In numbers", _numbers(events))),
        _spikes(events),
        _samples(events),
        _settings(start.get("settings", {})),
        section("Text", _facts(start.get("data", {}))),
        section("Environment", _facts(start.get("environment", {}))),
    )
    return document(name, parts, alive)


def document(title: str, parts: Iterable[str], alive: bool = False) -> str:
    """A whole HTML file; the page of a run that is ``alive`` loads itself again."""
    css = files("octavo.reporting").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(filter(None, parts))
    reload = f'<meta http-equiv="refresh" content="{RELOAD}">\n' if alive else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
{reload}<title>{escape(title)} · octavo</title>
<style>
{css}</style>
</head>
<body>
<main>
{body}
<footer>Drawn by octavo from metrics.jsonl alone.</footer>
</main>
</body>
</html>
"""


def _header(events: Sequence[Event], name: str, alive: bool) -> str:
    """What was trained on what, how far it came, and what befell it."""
    start = last(events, "start")
    model, text = start.get("settings", {}).get("model"), start.get("data", {}).get("name")
    lead = "A GPT"
    if "parameters" in start:
        lead += f" of {start['parameters']:,} parameters"
    if model:
        lead += (
            f" ({model['n_layer']} layers of width {model['d_model']}, {model['n_head']} heads, "
            f"vocabulary {model['vocab_size']:,})"
        )
    lead += f", trained on {text}." if text else "."
    notes = []
    resumed = [e["step"] for e in events if e["event"] == "start" and "resumed_from" in e]
    if resumed:
        notes.append(f"Interrupted and resumed from step {_listed(resumed)}.")
    skipped = [e for e in events if e["event"] == "skip"]
    if skipped:
        steps, reason = _listed([e["step"] for e in skipped]), skipped[-1].get("reason", "")
        notes.append(f"Skipped, for numbers were not finite: step {steps} ({reason}).")
    for event in (event for event in events if event["event"] == "rewind"):
        at, to = event.get("spiked_at", event["step"]), event["step"]
        notes.append(f"Went back from a spike at step {at:,} to step {to:,}, on to other rows.")
    if alive:
        notes.append(f"Training goes on. This page loads itself again every {RELOAD} seconds.")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f"<header>\n<h1>{escape(name)}</h1>\n<p>{escape(lead)} {_outcome(events)}</p>\n"
        + (f'<ul class="notes soft">{items}</ul>\n' if items else "")
        + "</header>"
    )


def _outcome(events: Sequence[Event]) -> str:
    step = f"{events[-1]['step']:,}"
    match last(events, "end").get("reason"):
        case "finished":
            return f"Finished after {step} steps."
        case "early stop":
            return f"Stopped early at step {step}: validation had ceased to improve."
    return f"Not finished: step {step} {_planned(events)}".rstrip() + "."


def _planned(events: Sequence[Event]) -> str:
    steps = last(events, "start").get("settings", {}).get("train", {}).get("max_steps")
    return f"of {steps:,}" if steps else ""


def headline(events: Sequence[Event]) -> list[tuple[str, str, str]]:
    """The figures one asks for first: name, value, note."""
    best, latest = best_validation(events), events[-1]
    found = []
    if best is not None:
        at = f"at step {best['step']:,}"
        found.append(("Validation loss", number(best["val_loss"], ".3f"), "nats a token, best"))
        found.append(("Perplexity", number(best.get("val_ppl"), ".2f"), at))
        found.append(("Bits a byte", number(best.get("val_bpb"), ".3f"), at))
    found.append(("Steps", f"{latest['step']:,}", _planned(events)))
    found.append(("Time", duration(latest.get("seconds")), f"{large(latest.get('tokens'))} tokens"))
    if speed := _typical(events, "tokens_per_s"):
        found.append(("Speed", f"{speed:,.0f}", "tokens a second"))
    if mfu := _typical(events, "mfu"):
        found.append(("MFU", f"{mfu:.0%}", "of the device's peak"))
    _, memory = series(events, "train", "memory_bytes")
    if np.isfinite(memory).any():
        found.append(("Memory", f"{np.nanmax(memory) / 1e9:.2f} GB", "at most"))
    return found


def _typical(events: Sequence[Event], key: str) -> float | None:
    """The median of what was logged."""
    _, values = series(events, "train", key)
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Figures side by side."""
    cells = "\n".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in figures
    )
    return f'<dl class="figures">\n{cells}\n</dl>'


def curves(charts: Sequence[str], more: str = "") -> str:
    """Charts side by side, and what stands below them."""
    drawn = "\n".join(charts)
    return section("Curves", f'<div class="curves">\n{drawn}\n</div>\n{more}' if drawn else "")


COLUMNS = (
    ("loss", "train loss", ".4f"),
    ("val_loss", "validation loss", ".4f"),
    ("val_ppl", "perplexity", ".2f"),
    ("val_bpb", "bits a byte", ".4f"),
    ("lr", "learning rate", ".2e"),
    ("grad_norm", "gradient norm", ".3f"),
    ("tokens_per_s", "tokens/s", ",.0f"),
)


def _numbers(events: Sequence[Event]) -> str:
    """A table with a row a validation, or a logged step where none was validated."""
    merged: dict[int, Event] = {}
    for event in events:
        if event["event"] in ("train", "eval"):
            merged.setdefault(event["step"], {}).update(event)
    rows = [row for row in merged.values() if "val_loss" in row] or list(merged.values())
    best = best_validation(events)
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    cells = [
        (f"{row['step']:,}", *(number(row.get(key), spec) for key, _, spec in columns))
        for row in spread(rows, MOST_ROWS)
    ]
    head = ("step", *(label for _, label, _ in columns))
    return table(cells, head, "numbers", f"{best['step']:,}" if best else "")


def _spikes(events: Sequence[Event]) -> str:
    """Where loss or gradient leapt, and over which text."""
    spikes = [event for event in events if event["event"] == "spike"]
    blocks = []
    for event in spread(spikes, MOST_SAMPLES):
        facts = [f"began in {event['began']}"] if event.get("began") else []
        if event.get("row") is not None:
            facts.append(f"its worst row is {event['row']:,}: {event.get('where', '')}")
        facts += [f"everything is in {event['report']}"] if event.get("report") else []
        text = f'<pre dir="auto">{escape(str(event["text"]))}</pre>' if event.get("text") else ""
        blocks.append(
            f'<div class="card"><p><b>step {event["step"]:,}</b> '
            f"{escape(str(event.get('reason', '')))}</p>"
            f'<p class="soft">{escape("; ".join(facts))}</p>{text}</div>'
        )
    if len(blocks) < len(spikes):
        blocks.append(f'<p class="soft">{len(blocks)} of {len(spikes)} spikes.</p>')
    return section("Spikes", "\n".join(blocks))


def _samples(events: Sequence[Event]) -> str:
    """What the model wrote as it learned, oldest first; only the newest lies open."""
    samples = [event for event in events if event["event"] == "sample"]
    shown = spread(samples, MOST_SAMPLES)
    blocks = []
    for event in shown:
        prompt, text = str(event.get("prompt", "")), str(event.get("text", ""))
        line = " ".join((prompt + text)[:400].split())[:160]
        blocks.append(
            f'<details class="sample"{" open" if event is shown[-1] else ""}>'
            f"<summary>step {event['step']:,}"
            f'<span class="line soft">{escape(line)}</span></summary>'
            f'<pre dir="auto"><b>{escape(prompt)}</b>{escape(text)}</pre></details>'
        )
    if len(shown) < len(samples):
        blocks.append(f'<p class="soft">{len(shown)} of {len(samples)} samples.</p>')
    return section("Samples", "\n".join(blocks))


def _settings(settings: Mapping[str, Any]) -> str:
    """What differs from the defaults, then everything, folded away."""
    values, defaults = flat(settings), flat(_defaults(settings))
    changed = [
        (key, plain(value), plain(defaults.get(key, NOTHING)))
        for key, value in values.items()
        if value != defaults.get(key)
    ]
    everything = table([(key, plain(value)) for key, value in values.items()])
    return section(
        "Settings that differ from the defaults",
        table(changed, ("setting", "here", "default"), "settings")
        + folded(f"All {len(values)} settings", everything),
    )


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every setting; the derived ones as they follow from this model's others."""
    defaults = dataclasses.asdict(Config())
    model = settings.get("model", {})
    given = {name: model[name] for name in ("d_model", "n_head", "mlp", "bias") if name in model}
    with contextlib.suppress(ConfigError):  # an unusual head_dim: then nothing follows
        derived = ModelConfig(**given)
        for name in ("n_kv_head", "head_dim", "d_ff", "norm_bias"):
            defaults["model"][name] = getattr(derived, name)
    return json.loads(json.dumps(defaults))  # tuples become lists, as they do in the metrics


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.name``."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        result |= inner or {f"{prefix}{name}": value}
    return result


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of them, evenly spread, the first and the last among them."""
    index = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int))
    return [items[i] for i in index]


def section(title: str, body: str) -> str:
    """A part of the page under its heading; nothing where it is empty."""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def folded(title: str, body: str) -> str:
    """A part that opens with a click."""
    return f"<details><summary>{title}</summary>\n{body}\n</details>" if body else ""


def _facts(values: Mapping[str, Any]) -> str:
    """Names and values for people: spaces in names, commas in numbers."""
    return table(
        [
            (name.replace("_", " "), f"{value:,}" if type(value) is int else plain(value))
            for name, value in values.items()
        ]
    )


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str] = (), kind: str = "", best: str = ""
) -> str:
    """Rows of cells, the first of each its name; the row named ``best`` is marked."""
    if not rows:
        return ""
    above = "".join(f'<th scope="col">{escape(label)}</th>' for label in head)
    lines = [f"<thead><tr>{above}</tr></thead>\n<tbody>" if head else "<tbody>"]
    for name, *cells in rows:
        mark = ' class="best"' if name == best else ""
        after = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{after}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table class="{kind}">\n{body}\n</tbody>\n</table></div>'


def plain(value: Any) -> str:
    """A setting's value as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number(value: Any, spec: str) -> str:
    """A number by its format; a dash for what is none."""
    finite = isinstance(value, int | float) and math.isfinite(value)
    return format(value, spec) if finite else NOTHING


def large(count: Any) -> str:
    """1,234,567 as 1.23 M."""
    if not isinstance(count, int):
        return NOTHING
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _listed(steps: Sequence[int]) -> str:
    """The first few in words: 1, 2 and 3; or 1, 2, 3 and 17 more."""
    shown, more = [f"{step:,}" for step in steps[:5]], len(steps) - 5
    if more > 0:
        return f"{', '.join(shown)} and {more:,} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
