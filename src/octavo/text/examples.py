"""From records to training examples: prompts with completions, conversations, texts with labels.

All become rows of ids ``x`` and targets ``y``, -100 wherever there is nothing to learn, so that one
loss serves them all: the next id in completions and assistants' turns, the label after a text's
last token. A row is one example, padded on the right, where no earlier position sees it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from octavo.errors import DataError
from octavo.text.batches import shuffled
from octavo.text.chat import ChatTemplate, encode_chat, encode_pieces
from octavo.text.files import Record, counted, read_records
from octavo.text.tokenizer import Tokenizer

Kind = Literal["completion", "chat", "labels"]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "labels": ("text", "label"),
}
"""The fields of a record that are read, unless others are named."""
SETTING = "data.fields"
IGNORE = -100  # a target that does not count


@dataclass(frozen=True, eq=False)
class Example:
    """Ids and targets, each (t,) int32; a target is an id or a label's index, or `IGNORE`."""

    x: np.ndarray
    y: np.ndarray

    def cut(self, block_size: int) -> "Example":
        """The last ``block_size`` positions: what is learned stands at the end."""
        return Example(self.x[-block_size:], self.y[-block_size:])

    @property
    def learned(self) -> int:
        """How many targets count."""
        return int((self.y != IGNORE).sum())


@dataclass(frozen=True)
class ExampleSet:
    """What was read, in file order; ``description`` is a line that says so."""

    name: str
    examples: list[Example]
    description: str
    sha256: str
    """Of the files' bytes, joined."""
    labels: list[str] = field(default_factory=list)
    """Sorted; a target of the kind "labels" is an index into them."""

    @property
    def longest(self) -> int:
        """Positions in the longest example: `Examples` so narrow hold no needless padding."""
        return max(len(example.x) for example in self.examples)


class Examples:
    """Rows of one example each, in an endless keyed order, as `text.batches.Batches` gives windows.

    Each of the ``windows`` examples is seen once an epoch, in a new order every time. Rows are as
    wide as ``block_size``, which no example may exceed. Raises `DataError` for no examples.
    """

    def __init__(self, examples: Sequence[Example], block_size: int, seed: int) -> None:
        self.examples, self.block_size, self.seed = examples, block_size, seed
        self.windows = len(examples)
        if not examples:
            raise DataError("there are no examples", fix="give more, or a smaller val_fraction")
        assert max(len(example.x) for example in examples) <= block_size

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``first`` to ``first + count``: inputs and targets, int64, each (count, T)."""
        order = shuffled(first + np.arange(count), self.windows, self.seed)
        return _padded([self.examples[index] for index in order], self.block_size)

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Every example once, in file order, as `rows`."""
        return _padded(self.examples, self.block_size)


def read_examples(
    source: str | list[str],
    kind: Kind,
    tokenizer: Tokenizer,
    block_size: int,
    fields: Sequence[str] | None = None,
    template: ChatTemplate | None = None,
    labels: Sequence[str] | None = None,
) -> ExampleSet:
    """Read the examples in .jsonl and .csv files, in folders and globs of them, or a list of these.

    ``fields`` renames `FIELDS`. ``template`` writes conversations, ours where None. ``labels`` are
    those a model knows; None learns them from the records. What is longer than ``block_size`` loses
    its beginning, which the description counts. Raises `DataError`, naming file and line, for a
    missing field, nothing to learn or an unknown label, and where all records have one label.
    """
    names = FIELDS[kind] if fields is None else tuple(fields)
    if len(names) != len(FIELDS[kind]):
        raise DataError(
            f"{SETTING} names {counted(len(names), 'field')}",
            f"examples of the kind {kind} have {' and '.join(FIELDS[kind])}",
            "name one field for each",
        )
    name = source if isinstance(source, str) else ", ".join(source)
    found, read, sha256 = read_records(source)
    if not found:
        raise DataError("there are no records", f"in {name}", "give examples to learn from")
    known: list[str] = []
    match kind:
        case "completion":
            whole = [_completion(record, tokenizer, *names) for record in found]
        case "chat":
            template = template or ChatTemplate.default(tokenizer)
            whole = [_conversation(record, tokenizer, template, *names) for record in found]
        case "labels":
            given = [_label(record, names[1]) for record in found]
            known = sorted(set(given)) if labels is None else list(labels)
            if len(known) < 2:
                what = f"every record has the label {known[0]!r}"
                raise DataError(what, f"in {name}", "give examples of two labels or more")
            pairs = zip(found, given, strict=True)
            whole = [_labelled(r, tokenizer, names[0], label, known) for r, label in pairs]
    examples = [example.cut(block_size) for example in whole]
    description = f"{read}, {_amount(examples, known)}, from {name}"
    description += _losses(whole, examples, block_size)
    if kind == "completion" and tokenizer.eot_id is None:
        description += "; the tokenizer has no end-of-text token, so no end is learned"
    return ExampleSet(name, examples, description, sha256, known)


def split_examples(
    examples: Sequence[Example], val_fraction: float
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, each in file order.

    Which ones is drawn, as files are often sorted by what they teach; the draw depends on nothing
    but their number, so that runs of any seed are validated alike.
    """
    drawn = shuffled(np.arange(len(examples)), len(examples), seed=0)
    n_train = int(len(examples) * (1 - val_fraction))
    train, val = np.sort(drawn[:n_train]), np.sort(drawn[n_train:])
    return [examples[i] for i in train], [examples[i] for i in val]


def _completion(record: Record, tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """The completion is learned, and the end-of-text token after it.

    Without a prompt it begins a new text: after the end-of-text token, where there is one.
    """
    before, text = record.text(prompt, SETTING), record.text(completion, SETTING)
    if not text:
        raise record.error(f"has an empty {completion!r}")
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    start = [] if before else end
    with _at(record):
        ids, learned = encode_pieces(tokenizer, [(before, False), (text, True)])
    learned = [False] * len(start) + learned + [True] * len(end)
    return _next_ids([*start, *ids, *end], learned, record)


def _conversation(
    record: Record, tokenizer: Tokenizer, template: ChatTemplate, messages: str
) -> Example:
    """The assistant's turns are learned; what is said after the last of them is left out."""
    with _at(record):
        ids, learned = encode_chat(tokenizer, template, record.get(messages, SETTING))
    if not any(learned):
        roles = sorted({message["role"] for message in record.values[messages]})
        raise record.error(f"has no words of an assistant, only of {', '.join(roles)}")
    length = len(learned) - learned[::-1].index(True)
    return _next_ids(ids[:length], learned[:length], record)


def _next_ids(ids: list[int], learned: list[bool], record: Record) -> Example:
    """Each id's target is the next one, where that is to be learned."""
    targets = np.where(learned, np.array(ids, dtype=np.int32), np.int32(IGNORE))
    example = Example(np.array(ids[:-1], dtype=np.int32), targets[1:])
    if not example.learned:
        raise record.error("is a single token, which nothing comes before")
    return example


def _label(record: Record, field: str) -> str:
    """A label is a text or a whole number, written as text."""
    value = record.get(field, SETTING)
    label = str(value) if isinstance(value, int) else record.text(field, SETTING)
    if not label:
        raise record.error("has an empty label")
    return label


def _labelled(
    record: Record, tokenizer: Tokenizer, field: str, label: str, labels: list[str]
) -> Example:
    """The label is the target at the text's last token."""
    if label not in labels:
        raise record.error(
            f"has the label {label!r}, which the model does not know",
            f"it knows {', '.join(map(repr, labels))}",
        )
    text = record.text(field, SETTING)
    if not text:
        raise record.error(f"has an empty {field!r}")
    with _at(record):
        x = tokenizer.encode_array(text).astype(np.int32)
    y = np.full(len(x), IGNORE, dtype=np.int32)
    y[-1] = labels.index(label)
    return Example(x, y)


@contextmanager
def _at(record: Record) -> Iterator[None]:
    """Add file and line to what goes wrong with a record's text."""
    try:
        yield
    except DataError as error:
        detail = ", ".join(part for part in (error.what, error.where) if part)
        raise DataError(f"line {record.line}: {detail}", f"in {record.path}", error.fix) from None


def _amount(examples: list[Example], labels: list[str]) -> str:
    tokens, learned = (sum(map(f, examples)) for f in (lambda e: len(e.x), lambda e: e.learned))
    amount = f"{counted(len(examples), 'example')}, {counted(tokens, 'token')}"
    if not labels:
        return f"{amount}, {learned:,} to learn"
    shown = ", ".join(labels[:10]) + ", …" * (len(labels) > 10)
    return f"{amount}, {counted(len(labels), 'label')} ({shown})"


def _losses(whole: list[Example], examples: list[Example], block_size: int) -> str:
    """What the context was too short for."""
    pairs = list(zip(whole, examples, strict=True))
    cut = sum(len(before.x) > len(after.x) for before, after in pairs)
    deep = sum(before.learned > after.learned for before, after in pairs)
    line = f"; {cut:,} cut on the left to {block_size} tokens" if cut else ""
    return line + (f", {deep:,} of them into what is to be learned" if deep else "")


def _padded(examples: Sequence[Example], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, padded with 0, and targets, with `IGNORE`: int64, each (count, width)."""
    x = np.zeros((len(examples), width), dtype=np.int64)
    y = np.full((len(examples), width), IGNORE, dtype=np.int64)
    for row, example in enumerate(examples):
        x[row, : len(example.x)] = example.x
        y[row, : len(example.y)] = example.y
    return x, y
