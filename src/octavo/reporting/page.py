"""A run's page: what a model learned, wrote and was told, as one HTML file.

It needs no network, no script and no other file, follows the reader's dark or light, and is the
same for the same events, byte for byte. Without matplotlib it has a table in place of curves.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np

from octavo.config import Config, ModelConfig
from octavo.errors import ConfigError, MissingExtraError
from octavo.reporting.curves import Event, best_validation, series, svg_curves

MOST_SAMPLES, MOST_ROWS = 20, 100  # on a page; of a long run an even spread is shown
NOTHING = "–"

T = TypeVar("T")


def render(events: Sequence[Event], name: str) -> str:
    """The whole page, as HTML, of a run called ``name``; ``events`` are at least one."""
    start = _last(events, "start")
    parts = (
        _header(events, start, name),
        _headline(events, start),
        _curves(events),
        _samples(events),
        _settings(start.get("settings", {})),
        _section("Text", _facts(start.get("data", {}))),
        _section("Environment", _facts(start.get("environment", {}))),
    )
    css = files("octavo.reporting").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(name)} · octavo</title>
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


def _header(events: Sequence[Event], start: Event, name: str) -> str:
    """What was trained on what, how far it came, and what befell it."""
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
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f"<header>\n<h1>{escape(name)}</h1>\n<p>{escape(lead)} {_outcome(events, start)}</p>\n"
        + (f'<ul class="notes soft">{items}</ul>\n' if items else "")
        + "</header>"
    )


def _outcome(events: Sequence[Event], start: Event) -> str:
    step, end = events[-1]["step"], _last(events, "end")
    planned = start.get("settings", {}).get("train", {}).get("max_steps")
    match end.get("reason"):
        case "finished":
            return f"Finished after {step:,} steps."
        case "early stop":
            return f"Stopped early at step {step:,}: validation had ceased to improve."
    return f"Not finished: step {step:,}" + (f" of {planned:,}." if planned else ".")


def _headline(events: Sequence[Event], start: Event) -> str:
    """The figures one asks for first."""
    best, last = best_validation(events), events[-1]
    tiles = []
    if best is not None:
        at = f"at step {best['step']:,}"
        tiles.append(("Validation loss", _number(best["val_loss"], ".3f"), "nats a token, best"))
        tiles.append(("Perplexity", _number(best.get("val_ppl"), ".2f"), at))
        tiles.append(("Bits a byte", _number(best.get("val_bpb"), ".3f"), at))
    planned = start.get("settings", {}).get("train", {}).get("max_steps")
    tiles.append(("Steps", f"{last['step']:,}", f"of {planned:,}" if planned else ""))
    tiles.append(("Time", _duration(last.get("seconds")), f"{_large(last.get('tokens'))} tokens"))
    _, speeds = series(events, "train", "tokens_per_s")
    if np.isfinite(speeds).any():
        tiles.append(("Speed", f"{np.nanmedian(speeds):,.0f}", "tokens a second"))
    cells = "\n".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in tiles
    )
    return f'<dl class="figures">\n{cells}\n</dl>'


def _curves(events: Sequence[Event]) -> str:
    """The curves, and the same in numbers; without matplotlib the numbers only."""
    table = _numbers(events)
    if not table:
        return ""
    try:
        drawn = svg_curves(events)
    except MissingExtraError as missing:
        note = f"<p>{escape(missing.what)}: <code>{escape(missing.fix)}</code></p>"
        return _section("Curves", f"{note}\n{table}")
    figures = "\n".join(
        f"<figure><figcaption>{escape(panel.caption)}</figcaption>{svg}</figure>"
        for panel, svg in drawn.items()
    )
    details = f"<details><summary>In numbers</summary>\n{table}\n</details>"
    return _section("Curves", f'<div class="curves">\n{figures}\n</div>\n{details}')


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
    if not rows:
        return ""
    best = best_validation(events) or {"step": None}
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    head = "".join(f'<th scope="col">{label}</th>' for label in ("step", *(c[1] for c in columns)))
    lines = []
    for row in _spread(rows, MOST_ROWS):
        cells = "".join(f"<td>{_number(row.get(key), spec)}</td>" for key, _, spec in columns)
        mark = ' class="best"' if row["step"] == best["step"] else ""
        lines.append(f"<tr{mark}><td>{row['step']:,}</td>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="numbers">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _samples(events: Sequence[Event]) -> str:
    """What the model wrote as it learned, oldest first; only the newest lies open."""
    samples = [event for event in events if event["event"] == "sample"]
    if not samples:
        return ""
    shown = _spread(samples, MOST_SAMPLES)
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
    return _section("Samples", "\n".join(blocks))


def _settings(settings: Mapping[str, Any]) -> str:
    """What differs from the defaults, then everything, folded away."""
    if not settings:
        return ""
    values, defaults = flat(settings), flat(_defaults(settings))
    changed = [key for key in values if values[key] != defaults.get(key)]
    rows = "\n".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th><td>{escape(_plain(values[key]))}</td>'
        f'<td class="soft">{escape(_plain(defaults.get(key, NOTHING)))}</td></tr>'
        for key in changed
    )
    head = '<th scope="col">setting</th><th scope="col">here</th><th scope="col">default</th>'
    return _section(
        "Settings that differ from the defaults",
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        f"</table></div>\n<details><summary>All {len(values)} settings</summary>\n"
        f"{_table(values)}\n</details>",
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


def _last(events: Sequence[Event], kind: str) -> Event:
    return next((event for event in reversed(events) if event["event"] == kind), {})


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of them, evenly spread, the first and the last among them."""
    index = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int))
    return [items[i] for i in index]


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def _facts(values: Mapping[str, Any]) -> str:
    """A table of names and values, for people: spaces in names, commas in numbers."""
    return _table(
        {
            name.replace("_", " "): f"{value:,}" if type(value) is int else value
            for name, value in values.items()
        }
    )


def _table(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any, spec: str) -> str:
    finite = isinstance(value, int | float) and math.isfinite(value)
    return format(value, spec) if finite else NOTHING


def _large(count: Any) -> str:
    """1,234,567 as 1.23 M."""
    if not isinstance(count, int):
        return NOTHING
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _listed(steps: Sequence[int]) -> str:
    """The first few in words: 1, 2 and 3; or 1, 2, 3 and 17 more."""
    shown, more = [f"{step:,}" for step in steps[:5]], len(steps) - 5
    if more > 0:
        return f"{', '.join(shown)} and {more:,} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
