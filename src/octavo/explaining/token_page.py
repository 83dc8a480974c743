"""A text as a model saw it, on one HTML page that needs no network and no other file.

It stays under 5 MB: attention is kept of the first tokens only, and a text of many thousands of
tokens is cut; the page says both. Its script draws what the page carries as JSON.
"""

import json
from html import escape
from importlib.resources import files

import numpy as np

from octavo.explaining.explained import Explained
from octavo.explaining.figures import figures, token_spans
from octavo.explaining.spans import SHORTEST, Span

MOST_SPANS = 40  # listed; the text shows all
MOST_SHOWN = 600  # bytes of a span in the list
AROUND = 60  # bytes of the source on either side of it


def render(page: Explained) -> str:
    """The whole page."""
    assets = files("octavo.explaining")
    css, script, html = (
        assets.joinpath(f"token_page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js", "html")
    )
    parts = {
        "NAME": escape(page.name),
        "CSS": css,
        "LEAD": escape(_lead(page)),
        "TILES": _tiles(page),
        "NOTES": "".join(f"<li>{escape(note)}</li>" for note in notes(page)),
        "VERBATIM": _verbatim(page),
        "DATA": json.dumps(figures(page)).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    for name, part in parts.items():
        html = html.replace(f"<!--{name}-->", part)
    return html


def notes(page: Explained) -> list[str]:
    """What the page leaves out, or shows otherwise than one might think."""
    reading, found = page.reading, []
    if len(reading.windows) > 1:
        found.append(
            f"The text is longer than the model's context of {page.lm.config.block_size:,} tokens. "
            f"It was read in {len(reading.windows):,} windows, as when the model writes: whenever "
            "the context is full, its older half is forgotten."
        )
    if page.left_out:
        found.append(f"Left out: the last {page.left_out:,} tokens, for want of room on a page.")
    if len(reading.attention) < len(reading.ids):
        found.append(
            f"Attention is shown of the first {len(reading.attention):,} tokens: all of it would "
            "make the page too large."
        )
    if page.lm.weights:
        found.append(f"The weights are those packed to {page.lm.weights}.")
    return found + page.source.remarks


def _lead(page: Explained) -> str:
    config = page.lm.config
    return (
        f"A GPT of {config.n_layer} layers with {config.n_head} heads, width {config.d_model}, "
        f"vocabulary {config.vocab_size:,}, context {config.block_size:,}."
    )


def _tiles(page: Explained) -> str:
    """The figures one asks for first."""
    reading = page.reading
    by_model = f"{page.written:,} of them written by the model" if page.written else ""
    tiles = [("Tokens", f"{len(reading.ids):,}", by_model)]
    if len(reading.ids) > 1:
        perplexity = f"bits a token; perplexity {2 ** min(reading.bits, 999):,.2f}"
        tiles.append(("Surprise", f"{reading.bits:.2f}", perplexity))
        right = float(np.mean(reading.rank[:-1] == 1))
        tiles.append(("First guess right", f"{right:.0%}", "of the tokens"))
    if page.source.documents:
        share = f"bytes; of the text {page.verbatim:.0%} is verbatim"
        tiles.append(("Longest span verbatim", f"{page.longest:,}", share))
    return "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{escape(note)}</small></dd></div>"
        for label, value, note in tiles
    )


def _verbatim(page: Explained) -> str:
    """The spans, longest first, each where it stands in the training text."""
    source = page.source
    if not source.documents:
        return '<p class="soft">Nothing was looked up; see above.</p>'
    looked = f"{sum(map(len, source.documents)):,} bytes of {source.name}"
    if not page.spans:
        return f"<p>No {SHORTEST} bytes in a row of this text stand in the {escape(looked)}.</p>"
    data = source.data
    pairs = zip(page.spans, token_spans(page), strict=True)
    ordered = sorted(pairs, key=lambda pair: pair[0].start - pair[0].end)
    items = [
        f'<li><div class="token">{_in_context(span, data)}</div>'
        f'<button type="button" data-token="{tokens[0]}">tokens {tokens[0] + 1:,} to '
        f'{tokens[1]:,}</button> <span class="soft">{span.end - span.start:,} bytes, '
        f"{escape(source.where(span.place))}</span></li>"
        for span, tokens in ordered[:MOST_SPANS]
    ]
    more = len(ordered) - MOST_SPANS
    return (
        f"<p>Spans of at least {SHORTEST} bytes that also stand in the {escape(looked)}, longest "
        f'first, as they stand there.</p>\n<ol class="spans">{"".join(items)}</ol>'
        + (f'<p class="soft">And {more:,} shorter ones, underlined above.</p>' if more > 0 else "")
    )


def _in_context(span: Span, data: bytes) -> str:
    """A span, marked, with what stands around it in the source."""
    end = span.place + span.end - span.start
    shown = data[span.place : end]
    if len(shown) > MOST_SHOWN:
        shown = shown[: MOST_SHOWN // 2] + " … ".encode() + shown[-MOST_SHOWN // 2 :]
    before, after = data[max(span.place - AROUND, 0) : span.place], data[end : end + AROUND]
    return f"…{_shown(before)}<mark>{_shown(shown)}</mark>{_shown(after)}…"


def _shown(data: bytes) -> str:
    """Bytes cut anywhere, as one line of HTML."""
    return escape(data.decode("utf-8", "ignore").replace("\n", "↵").replace("\0", ""))
