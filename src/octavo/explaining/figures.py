"""The figures that a page carries as JSON, for its script to draw and for anybody to check."""

import base64
from itertools import accumulate
from typing import Any

import numpy as np

from octavo.explaining.explained import Explained
from octavo.explaining.reading import vocab_size
from octavo.generating.recording import token_text


def figures(page: Explained) -> dict[str, Any]:
    """Numbers, and arrays in base64 of little-endian bytes.

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
        "windows": [[window.start, window.first, window.end] for window in reading.windows],
        "texts": {int(token): token_text(tokenizer, int(token)) for token in shown},
        "ids": packed(reading.ids, "<i4"),
        "rank": packed(reading.rank, "<i4"),
        "probability": packed(reading.probability, "<f4"),
        "entropy": packed(reading.entropy, "<f4"),
        "top_ids": packed(reading.top_ids, "<i4"),
        "top_probability": packed(reading.top_probability, "<f4"),
        "lens_ids": packed(reading.lens_ids, "<i4"),
        "lens_best": packed(reading.lens_best, "<f4"),
        "lens_probability": packed(reading.lens_probability, "<f4"),
        "attended": len(reading.attention),
        "attention": packed(_as_bytes(reading.attention), "u1"),
        "spans": token_spans(page),
    }


def token_spans(page: Explained) -> list[tuple[int, int]]:
    """The tokens of each span, from and to, those included that only touch it."""
    ends = list(accumulate(map(len, page.pieces)))
    places = [
        np.searchsorted(ends, (span.start, span.end - 1), side="right") for span in page.spans
    ]
    return [(int(first), int(last) + 1) for first, last in places]


def packed(array: np.ndarray, dtype: str) -> str:
    """An array's bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode("ascii")


def _as_bytes(attention: list[np.ndarray]) -> np.ndarray:
    """Square roots keep small weights apart, which most are."""
    rows = [np.rint(255 * np.sqrt(row)).astype(np.uint8).ravel() for row in attention]
    return np.concatenate([*rows, np.empty(0, np.uint8)])
