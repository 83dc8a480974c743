"""All that a page says about one text: what the model expected, and where the text has been before.

How much of it fits a page is decided here, before anything is computed for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from octavo.explaining.reading import ALTERNATIVES, Reading, check_ids, read, vocab_size
from octavo.explaining.spans import Span, find_spans
from octavo.explaining.training_text import TrainingText, training_text
from octavo.language_model import LanguageModel

MOST_WEIGHTS = 2_000_000  # attention weights on a page, a byte each; base64 makes four of three
MOST_FIGURES = 1_100_000  # bytes of all other figures


@dataclass(frozen=True, eq=False)
class Explained:
    """A text as ``lm`` saw it; ``name`` is what its page calls the model."""

    lm: LanguageModel
    name: str
    reading: Reading
    written: int
    """How many tokens at the end the model wrote itself."""
    left_out: int
    """Tokens after those of the reading, for which a page has no room."""
    spans: list[Span]
    """Pieces of the text, in bytes, that stand in ``source``."""
    source: TrainingText

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each token says; nothing where ids stand for no text."""
        if not self.lm.has_tokenizer:
            return [b""] * len(self.reading.ids)
        return [self.lm.tokenizer.token_bytes(int(token)) for token in self.reading.ids]

    @property
    def longest(self) -> int:
        """Bytes of the longest piece that stands word for word in the source."""
        return max((span.end - span.start for span in self.spans), default=0)

    @property
    def verbatim(self) -> float:
        """The share of the text, in bytes, that is part of such a piece."""
        covered = {byte for span in self.spans for byte in range(span.start, span.end)}
        return len(covered) / max(sum(map(len, self.pieces)), 1)


def explain(
    lm: LanguageModel, ids: Sequence[int], written: int = 0, corpus: str | None = None
) -> Explained:
    """Read ``ids``, of which ``lm`` wrote the last ``written``, and look them up.

    ``corpus`` is the text to look them up in; None is the one the run learned from. Raises
    `ConfigError` as `read` does and `DataError` for a ``corpus`` that cannot be read.
    """
    check_ids(ids, vocab_size(lm))
    shown = ids[: most_tokens(lm.config.n_layer)]
    reading = read(lm, shown, MOST_WEIGHTS)
    if lm.has_tokenizer:
        source = training_text(lm.run, corpus)
        spans = find_spans(lm.tokenizer.decode_bytes(shown), source.data)
    else:
        no_text = "This model takes ids: there is no text to look up."
        source, spans = TrainingText("", remarks=[no_text]), []
    left_out = len(ids) - len(shown)
    name = lm.home.resolve().name if lm.home else "a model"
    return Explained(lm, name, reading, max(written - left_out, 0), left_out, spans, source)


def most_tokens(layers: int) -> int:
    """How many tokens fit a page: with a deeper model each has more figures."""
    return MOST_FIGURES // (4 * (4 + 2 * ALTERNATIVES + 3 * (layers + 1)))
