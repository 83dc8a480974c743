"""A text as a model saw it, on one HTML page that needs no network and no other file.

It stays under 5 MB: attention is kept of the first tokens only, and a text of many thousands of
tokens is cut; the page says both. Its script draws what the page carries as JSON.
"""

import base64
import json
from bisect import bisect
from html import escape
from importlib.resources import files
from itertools import accumulate
from typing import Any

import numpy as np

from octavo.explaining.explained import Explained
from octavo.explaining.reading import vocab_size
from octavo.explaining.spans import SHORTEST, Span
from octavo.generating.recording import token_text
from octavo.reporting.page import tiles

MOST_SPANS = 40  # listed; the text shows all
MOST_SHOWN = 600  # bytes of a span in the list
AROUND = 60  # bytes of the source on either side of it
IDS_AND_RANKS = ("ids", "rank", "top_ids", "lens_ids")  # of a `Reading`
SHARES = ("probability", "entropy", "top_probability", "lens_best", "lens_probability")


def render(page: Explained) -> str:
    """The whole page."""
    looks = files("octavo.reporting").joinpath("page.css").read_text(encoding="utf-8")
    css, script, html = (
        files("octavo.explaining").joinpath(f"token_page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js", "html")
    )
    parts = {
        "NAME": escape(page.name),
        "CSS": looks + css,
        "LEAD": escape(_lead(page)),
        "TILES": tiles(_headline(page)),
        "NOTES": "".join(f"<li>{escape(note)}</li>" for note in notes(page)),
        "VERBATIM": _verbatim(page),
        "DATA": json.dumps(_data(page)).replace("<", "\\u003c"),
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


def _headline(page: Explained) -> list[tuple[str, str, str]]:
    """The figures one asks for first: name, value, note."""
    reading = page.reading
    by_model = f"{page.written:,} of them written by the model" if page.written else ""
    found = [("Tokens", f"{len(reading.ids):,}", by_model)]
    if len(reading.ids) > 1:
        perplexity = f"bits a token; perplexity {2 ** min(reading.bits, 999):,.2f}"
        found.append(("Surprise", f"{reading.bits:.2f}", perplexity))
        right = float(np.mean(reading.rank[:-1] == 1))
        found.append(("First guess right", f"{right:.0%}", "of the tokens"))
    if page.source.documents:
        share = f"bytes; of the text {page.verbatim:.0%} is verbatim"
        found.append(("Longest span verbatim", f"{page.longest:,}", share))
    return found


def _verbatim(page: Explained) -> str:
    """The spans, longest first, each where it stands in the training text."""
    source = page.source
    if not source.documents:
        return '<p class="soft">Nothing was looked up; see above.</p>'
    looked = f"{sum(map(len, source.documents)):,} bytes of {source.name}"
    if not page.spans:
        return f"<p>No {SHORTEST} bytes in a row of this text stand in the {escape(looked)}.</p>"
    data = source.data
    pairs = zip(page.spans, _token_spans(page), strict=True)
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


def _data(page: Explained) -> dict[str, Any]:
    """What the script draws: numbers, and arrays in base64 of little-endian bytes.

    Row t of an array is what was expected after token t, as in `Reading`. ``attention`` holds, for
    each of the first tokens, layers x heads x keys bytes, 255 times the weight's square root; the
    keys begin with the token's window and end with itself. ``spans`` are tokens, from and to.
    """
    reading, lm = page.reading, page.lm
    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    shown = np.unique(np.concatenate([reading.ids, reading.top_ids.flat, reading.lens_ids.flat]))
    return {
        "layers": lm.config.n_layer,
        "heads": lm.config.n_head,
        "vocab": vocab_size(lm),
        "written": page.written,
        "complete": page.left_out == 0,
        "windows": reading.windows,
        "texts": {int(token): token_text(tokenizer, int(token)) for token in shown},
        "attended": len(reading.attention),
        "attention": _packed(_as_bytes(reading.attention), "u1"),
        "spans": _token_spans(page),
        **{name: _packed(getattr(reading, name), "<i4") for name in IDS_AND_RANKS},
        **{name: _packed(getattr(reading, name), "<f4") for name in SHARES},
    }


def _token_spans(page: Explained) -> list[tuple[int, int]]:
    """The tokens of each span, from and to, those included that only touch it."""
    ends = list(accumulate(map(len, page.pieces)))
    return [(bisect(ends, span.start), bisect(ends, span.end - 1) + 1) for span in page.spans]


def _packed(array: np.ndarray, dtype: str) -> str:
    """An array's bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode("ascii")


def _as_bytes(attention: list[np.ndarray]) -> np.ndarray:
    """Square roots keep small weights apart, which most are."""
    rows = [np.rint(255 * np.sqrt(row)).astype(np.uint8).ravel() for row in attention]
    return np.concatenate([*rows, np.empty(0, np.uint8)])
