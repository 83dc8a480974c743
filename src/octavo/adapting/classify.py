"""A GPT that says what kind of text it reads: a linear head on the state after the last token.

That state alone has seen the whole text. Rows are padded on the right, where nothing that counts
looks, so a text gets the same answer alone and in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from octavo.errors import DataError
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

ROWS = 64  # texts read side by side


class Classifier(nn.Module):
    """A GPT's body under a head with one logit for each of ``labels``.

    It has the parts of a GPT that a loss uses, so `training.loss.cross_entropy` trains it on
    targets that are -100 everywhere but at each row's last token.
    """

    def __init__(self, body: GPT, labels: Sequence[str]) -> None:
        """Take over ``body``, whose own head is dropped, and draw the new one's weights."""
        super().__init__()
        if len(set(labels)) < 2:
            raise DataError(f"there are no two labels to tell apart in {list(labels)}")
        self.labels, self.config, self.body = list(labels), body.config, body
        body.set_submodule("lm_head", nn.Identity())
        like = body.tok_emb.weight
        self.head = nn.Linear(
            self.config.d_model, len(self.labels), device=like.device, dtype=like.dtype
        )
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def lm_head(self) -> nn.Linear:
        """The head, under the name that a GPT's has."""
        return self.head

    def forward(self, idx: Tensor, **options: Any) -> Tensor:
        """Token ids (B, T) to logits (B, T, labels); those at a text's last token are meant."""
        return self.head(self.hidden(idx, **options))

    def hidden(self, idx: Tensor, **options: Any) -> Tensor:
        """Token ids (B, T) to the body's final states (B, T, D), as `GPT.hidden`."""
        return self.body.hidden(idx, **options)

    def set_dropout(self, p: float) -> None:
        """Change every dropout rate, for annealing."""
        self.body.set_dropout(p)


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of a text, and the probability of every label."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True, eq=False)
class Report:
    """How often which label was taken for which; the figures are scikit-learn's.

    A figure that would divide by zero, such as the precision of a label never predicted, is 0.
    """

    labels: list[str]
    confusion: np.ndarray
    """Counts (n, n) of texts: rows are true labels, columns predicted ones."""

    @property
    def accuracy(self) -> float:
        """The share of texts whose label was found."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def support(self) -> np.ndarray:
        """Texts of each label (n,)."""
        return self.confusion.sum(1)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Of each label (n,): precision, recall, their harmonic mean f1, and support."""
        right, predicted = self.confusion.diagonal(), self.confusion.sum(0)
        return {
            "precision": _share(right, predicted),
            "recall": _share(right, self.support),
            "f1": _share(2 * right, predicted + self.support),
            "support": self.support,
        }

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the labels that occur, in the texts or among the predictions."""
        occurs = self.confusion.sum(0) + self.support > 0
        return float(self.columns["f1"][occurs].mean())

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        columns = self.columns
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        each = {
            label: dict(zip(columns, row, strict=True))
            for label, row in zip(self.labels, rows, strict=True)
        }
        figures = {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "labels": each}
        return figures | {"confusion": self.confusion.tolist()}


def classify(
    classifier: Classifier, tokenizer: Tokenizer, texts: Sequence[str]
) -> list[Prediction]:
    """What kind of text each of ``texts`` is; of a long one the last block_size tokens are read.

    Raises `DataError` for an empty text.
    """
    rows = [ids[-classifier.config.block_size :] for ids in map(tokenizer.encode_array, texts)]
    for number, ids in enumerate(rows, 1):
        if not len(ids):
            raise DataError(f"text {number} is empty", fix="leave it out")
    return [
        Prediction(
            classifier.labels[row.argmax()],
            dict(zip(classifier.labels, row.tolist(), strict=True)),
        )
        for row in label_probabilities(classifier, rows)
    ]


def evaluate_labels(classifier: Classifier, x: np.ndarray, y: np.ndarray) -> Report:
    """Compare what is predicted for ``x`` (N, T) with ``y`` (N, T), as `Examples.all` gives both.

    A row's label is its one target that is not -100, at the last of its tokens.
    """
    row, last = (y != -100).nonzero()
    assert row.tolist() == list(range(len(x))), "each row has one label"
    texts = [ids[: end + 1] for ids, end in zip(x, last, strict=True)]
    predicted = label_probabilities(classifier, texts).argmax(1)
    confusion = np.zeros((len(classifier.labels),) * 2, dtype=np.int64)
    np.add.at(confusion, (y[row, last], predicted), 1)
    return Report(classifier.labels, confusion)


@torch.inference_mode()
def label_probabilities(classifier: Classifier, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The probability of each label (N, labels) for N rows of ids, whatever their lengths."""
    device = classifier.head.weight.device
    was_training = classifier.training
    classifier.eval()
    found = np.empty((len(rows), len(classifier.labels)))
    by_length = np.argsort([len(row) for row in rows], kind="stable")  # less to pad
    for first in range(0, len(rows), ROWS):
        chosen = by_length[first : first + ROWS]
        ids = [torch.from_numpy(rows[i].astype(np.int64)) for i in chosen]
        last = torch.tensor([len(row) - 1 for row in ids], device=device)
        states = classifier.hidden(pad_sequence(ids, batch_first=True).to(device))
        logits = classifier.head(states[torch.arange(len(ids), device=device), last])
        found[chosen] = F.softmax(logits.cpu().double(), dim=-1).numpy()
    classifier.train(was_training)
    return found


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
