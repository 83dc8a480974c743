"""HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest?

Two protocols, because their figures differ by points and a score without its protocol is no score:

- ``completion``, as build-nanogpt and the seed projects: the context as it is, each ending encoded
  on its own after a space; ``acc_norm`` picks by the mean log-probability of an ending's tokens.
  GPT-2 124M reaches 0.2955 there.
- ``harness``, as lm-evaluation-harness's task, item by item: the activity's label in front, the
  second sentence capitalised, WikiHow's brackets cleaned away; ``acc_norm`` divides by an ending's
  characters.

In both ``acc`` picks by the sum. Chance is 0.25.
"""

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from octavo.errors import DataError
from octavo.evaluating.continuations import (
    Request,
    Watch,
    continuation_likelihoods,
    refuse_classifier,
)
from octavo.model.gpt import GPT
from octavo.text.download import fetch
from octavo.text.files import Record, counted, read_bytes, records
from octavo.text.tokenizer import Tokenizer

ProtocolName = Literal["completion", "harness"]
DOWNLOAD = "download"  # instead of a file: the official validation set
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
OTHERWISE = "get that file where there is a network, and name it: --hellaswag FILE"
ENDINGS, CHANCE = 4, 0.25


@dataclass(frozen=True)
class Item:
    """One question; ``ctx_a`` and ``ctx_b`` are ``ctx`` in two parts, where the file has them."""

    activity_label: str
    ctx: str
    endings: tuple[str, ...]
    label: int
    """Which ending is the true one, 0 to 3."""
    ctx_a: str | None = None
    ctx_b: str | None = None


def read_items(source: Path | str = DOWNLOAD, limit: int = 0) -> list[Item]:
    """The items of a HellaSwag .jsonl file, also gzipped, or of the official one: "download".

    ``limit`` takes so many from the first; 0: all. Raises `DataError` with file and line for one
    that is broken and `ResourceError` where the download cannot be had.
    """
    path, official = Path(source), str(source) == DOWNLOAD
    data = fetch("hellaswag_val.jsonl", URL, SHA256, OTHERWISE) if official else _read(path)
    items = [_item(record) for record in records(data, path)]
    if not items:
        raise DataError("there is no item", f"in {path}", "name a HellaSwag .jsonl file")
    return items[: limit or None]


class HellaSwag:
    """Items in the tokens of one tokenizer, to be put to a model as often as wanted."""

    def __init__(
        self, items: Sequence[Item], tokenizer: Tokenizer, protocol: ProtocolName = "completion"
    ) -> None:
        """Encode the items; raises `DataError` for a text that the tokenizer cannot take."""
        self.items, self.protocol = items, protocol
        render = {"completion": _completion, "harness": _harness}[protocol]
        self.requests: list[Request] = []
        self.characters = np.zeros((len(items), ENDINGS))
        for number, item in enumerate(items):
            try:
                requests, endings = render(item, tokenizer)
            except DataError as error:
                where = f"in HellaSwag's item {number + 1}"
                raise DataError(error.what, where, error.fix) from None
            self.requests += requests
            self.characters[number] = [len(ending) for ending in endings]

    def score(self, model: GPT, watch: Watch | None = None) -> "HellaSwagScore":
        """Put every item to ``model``; ``watch`` counts endings."""
        refuse_classifier(model)
        found = continuation_likelihoods(model, self.requests, watch)
        tokens = np.array([len(ending) for _, ending in self.requests]).reshape(-1, ENDINGS)
        block_size = model.config.block_size
        whole = sum(None in (item.ctx_a, item.ctx_b) for item in self.items)
        plain = self.protocol == "completion"
        return HellaSwagScore(
            protocol=self.protocol,
            labels=np.array([item.label for item in self.items]),
            logprobs=found.logprobs.reshape(-1, ENDINGS),
            lengths=np.minimum(tokens, block_size) if plain else self.characters,
            cut_endings=int((tokens > block_size).sum()),
            whole_contexts=0 if plain else whole,
        )


@dataclass(frozen=True)
class HellaSwagScore:
    """How many items a model gets right, by which protocol, and what it chose for each."""

    protocol: ProtocolName
    labels: np.ndarray
    """(N,) the true endings."""
    logprobs: np.ndarray
    """(N, 4) the summed log-probability of each ending, in nats."""
    lengths: np.ndarray
    """(N, 4) what ``acc_norm`` divides these by: an ending's tokens or characters."""
    cut_endings: int
    """Endings longer than the context, of which only the last block_size tokens were scored."""
    whole_contexts: int
    """Items whose file does not part ``ctx`` into ctx_a and ctx_b, so that nothing is capitalised;
    0 where the protocol does not ask for it."""

    @property
    def n(self) -> int:
        """Items."""
        return len(self.labels)

    @cached_property
    def choices_acc(self) -> np.ndarray:
        """(N,) the endings with the highest sum."""
        return self.logprobs.argmax(1)

    @cached_property
    def choices(self) -> np.ndarray:
        """(N,) the endings with the highest sum over length; one without a length never wins."""
        with np.errstate(divide="ignore"):  # as numpy does for lm_eval: minus infinity
            return (self.logprobs / self.lengths).argmax(1)

    @property
    def acc(self) -> float:
        """The share of items right by `choices_acc`."""
        return float((self.choices_acc == self.labels).mean())

    @property
    def acc_norm(self) -> float:
        """The share of items right by `choices`: the figure that is usually quoted."""
        return float((self.choices == self.labels).mean())

    @property
    def acc_stderr(self) -> float:
        """Standard error of ``acc``."""
        return self._stderr(self.acc)

    @property
    def stderr(self) -> float:
        """Standard error of ``acc_norm``."""
        return self._stderr(self.acc_norm)

    @property
    def z(self) -> float:
        """How many standard errors ``acc_norm`` lies above guessing."""
        return (self.acc_norm - CHANCE) / math.sqrt(CHANCE * (1 - CHANCE) / self.n)

    @property
    def remarks(self) -> list[str]:
        """What must be known to compare this score with another."""
        said = []
        if self.whole_contexts:
            items = counted(self.whole_contexts, "item")
            said.append(f"{items} without ctx_a and ctx_b: ctx taken whole, not capitalised")
        if self.cut_endings:
            endings = counted(self.cut_endings, "ending")
            said.append(f"{endings} longer than the model's context, cut on the left")
        return said

    def line(self) -> str:
        """All in one line, for people."""
        return (
            f"HellaSwag acc_norm {self.acc_norm:.4f} ± {self.stderr:.4f} (chance {CHANCE}, "
            f"{self.z:+.1f} standard errors from it), acc {self.acc:.4f} ± {self.acc_stderr:.4f} "
            f"({self.protocol}, {counted(self.n, 'item')})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For programs; ``stderr`` and ``choices`` are those of ``acc_norm``."""
        return {
            "protocol": self.protocol,
            "n": self.n,
            "acc": self.acc,
            "acc_stderr": self.acc_stderr if self.n > 1 else None,
            "acc_norm": self.acc_norm,
            "stderr": self.stderr if self.n > 1 else None,
            "z": self.z,
            "cut_endings": self.cut_endings,
            "whole_contexts": self.whole_contexts,
            "choices": self.choices.tolist(),
            "choices_acc": self.choices_acc.tolist(),
            "labels": self.labels.tolist(),
        }

    def _stderr(self, share: float) -> float:
        """Of a mean of so many zeros and ones; one item alone says nothing of its error."""
        return math.sqrt(share * (1 - share) / (self.n - 1)) if self.n > 1 else math.nan


def clean(text: str) -> str:
    """Without the marks that WikiHow's pages left, exactly as lm-evaluation-harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _completion(item: Item, tokenizer: Tokenizer) -> tuple[list[Request], Sequence[str]]:
    context = tokenizer.encode(item.ctx)
    return [(context, tokenizer.encode(" " + ending)) for ending in item.endings], item.endings


def _harness(item: Item, tokenizer: Tokenizer) -> tuple[list[Request], Sequence[str]]:
    """Both are encoded together and then parted, so that no token is one that training never saw.

    Blanks at the end of the context belong to the ending.
    """
    ctx = item.ctx
    if item.ctx_a is not None and item.ctx_b is not None:
        ctx = item.ctx_a + " " + item.ctx_b.capitalize()
    text = clean(f"{item.activity_label}: {ctx}")
    endings = [clean(ending) for ending in item.endings]
    context = tokenizer.encode(text.rstrip())
    wholes = [tokenizer.encode(f"{text} {ending}") for ending in endings]
    requests: list[Request] = [(context, whole[len(context) :]) for whole in wholes]
    if not context or not all(ending for _, ending in requests):
        raise DataError("nothing is left of its context or an ending", fix="remove the item")
    return requests, endings


def _read(path: Path) -> bytes:
    """A file's bytes, unpacked if they are gzipped."""
    data = read_bytes(path)
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot unpack {path}: {error}", fix="get the file again") from None


def _item(record: Record) -> Item:
    """The item of one line, in the official file's schema."""
    values = record.values
    endings, label = values.get("endings"), values.get("label")
    if not (isinstance(endings, list) and len(endings) == ENDINGS and all(map(_is_text, endings))):
        raise record.error(f"has not {ENDINGS} endings")
    if str(label) not in ("0", "1", "2", "3"):
        raise record.error(f"has the label {label!r:.40}, not 0 to 3")
    if not _is_text(values.get("ctx")):
        raise record.error("has no context under 'ctx'")
    parts = (values.get(name) for name in ("ctx_a", "ctx_b"))
    ctx_a, ctx_b = (part if isinstance(part, str) else None for part in parts)
    activity = str(values.get("activity_label", ""))
    return Item(activity, values["ctx"], tuple(endings), int(str(label)), ctx_a, ctx_b)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
