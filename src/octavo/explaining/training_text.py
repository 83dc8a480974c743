"""The text a run learned from, found again and compared with what it was, to look things up in."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.checkpoint import Run
from octavo.errors import DataError, OctavoError
from octavo.manifest import read_json
from octavo.text.corpus import read_corpus
from octavo.text.files import read_records
from octavo.text.shards import Dataset
from octavo.text.token_files import watched
from octavo.training.source import PIPED
from octavo.training.task import DATA

MOST = 1 << 29  # bytes that are searched: half a gigabyte
BETWEEN = b"\n\n"  # two documents
IDS = 1 << 20  # decoded at a time


@dataclass(frozen=True)
class TrainingText:
    """Documents to search, none where there is nothing to search, and what to know about them."""

    name: str
    documents: list[bytes] = field(default_factory=list, repr=False)
    remarks: list[str] = field(default_factory=list)
    """Sentences: the text is gone, or has changed since, or only a part of it is searched."""
    val_fraction: float = 0.0
    """About the last part of it that was kept for validation."""

    @property
    def data(self) -> bytes:
        """The documents, one blank line between two."""
        return BETWEEN.join(self.documents)

    def where(self, place: int) -> str:
        """A byte's place in words: line, document, offset."""
        lengths = (len(document) + len(BETWEEN) for document in self.documents)
        starts = [0, *itertools.accumulate(lengths)]
        number = bisect.bisect_right(starts, place) - 1
        offset = place - starts[number]
        line = self.documents[number].count(b"\n", 0, offset) + 1
        words = f"line {line:,}, byte {offset:,}"
        if len(self.documents) > 1:
            words += f" of document {number + 1:,} of {len(self.documents):,}"
        if place >= (starts[-1] - len(BETWEEN)) * (1 - self.val_fraction):
            words += f", in about the last {self.val_fraction:.0%}, which was kept for validation"
        return words


def training_text(run: Run | None, corpus: str | None = None) -> TrainingText:
    """The text that ``corpus`` names, else the one that ``run`` learned from.

    Where the run's is gone or has changed, by the SHA-256 of data.json, a remark says so. Raises
    `DataError` for a ``corpus`` that cannot be read.
    """
    if corpus is not None:
        return _within_reason(corpus, [text.encode() for text in read_corpus(corpus).documents])
    data = run.config.data if run else None
    if run is None or data is None or data.source is None:
        unknown = "This model came from elsewhere, and nothing says what it learned from"
        return TrainingText("", remarks=[f"{unknown}: --corpus FILE names a text to look in."])
    name = data.source if isinstance(data.source, str) else ", ".join(data.source)
    try:
        documents, sha256, has_val = _documents(run)
        then = read_json(run.path / DATA).get("sha256")
    except OctavoError as error:
        gone = f"The text it learned from, {name}, cannot be read any more: {error.what}."
        return TrainingText(name, remarks=[gone])
    remarks = []
    if sha256 != then:
        remarks.append(
            f"The text it learned from, {name}, has changed since: its SHA-256 is {sha256}, it was "
            f"{then}. What is found below stands in the text as it is now."
        )
    return _within_reason(name, documents, remarks, 0.0 if has_val else data.val_fraction)


def _within_reason(
    name: str, documents: list[bytes], remarks: Sequence[str] = (), val_fraction: float = 0.0
) -> TrainingText:
    """As much of the documents as can be searched in a moment."""
    *starts, total = 0, *itertools.accumulate(map(len, documents))
    if total <= MOST:
        return TrainingText(name, documents, [*remarks], val_fraction)
    parts = zip(documents, starts, strict=True)
    kept = [document[: MOST - start] for document, start in parts if start < MOST]
    said = f"Of the {total / 1e6:,.0f} MB of {name} the first {MOST / 1e6:,.0f} MB were searched."
    return TrainingText(name, kept, [*remarks, said])


def _documents(run: Run) -> tuple[list[bytes], str, bool]:
    """A run's text, its SHA-256 as data.json has it, and whether its validation text is another."""
    data = run.config.data
    assert data.source is not None
    apart = data.val_source is not None
    if data.kind != "text":
        records, _, sha256 = read_records(data.source)
        texts = [text for record in records for text in _texts_in(record.values)]
        encoded = [text.encode("utf-8", "replace") for text in texts]
        return encoded, sha256, True  # examples are validated on here and there
    dataset = Dataset.find(data.source)
    if dataset is not None:
        has_val = apart or any(shard["split"] == "val" for shard in dataset.shards)
        return [_decoded(dataset, run)], dataset.sha256, has_val
    piped = run.path / PIPED
    corpus = read_corpus(str(piped) if data.source == "-" else data.source, data.field)
    return [document.encode() for document in corpus.documents], corpus.sha256, apart


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def _decoded(dataset: Dataset, run: Run) -> bytes:
    """What the tokens of a dataset to learn from say, up to what is searched."""
    if run.tokenizer is None:
        raise DataError("it holds ids, and there is no tokenizer")
    tokens, parts, size = dataset.tokens("train"), list[bytes](), 0
    starts = range(0, len(tokens), IDS)
    for start in watched(starts, len(starts), "decoding the training text"):
        parts.append(run.tokenizer.decode_bytes(tokens[start : start + IDS].__array__().tolist()))
        size += len(parts[-1])
        if size > MOST:
            break
    return b"".join(parts)
