import random

import numpy as np
import pytest
import torch
from torch import nn

from octavo.adapting.classify import (
    Classifier,
    Report,
    classify,
    evaluate_labels,
    label_probabilities,
)
from octavo.errors import DataError
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.batches import shuffled
from octavo.text.examples import Examples, read_examples, split_examples
from octavo.text.tokenizer import Tokenizer
from octavo.training.loss import cross_entropy

LABELS = ["bad", "fair", "good"]
TINY = dict(vocab_size=128, block_size=24, n_layer=2, n_head=2, d_model=32)
TEXTS = ["a", "good and long enough", "bad", "x" * 24, "x" * 40, "so so"]


def make_classifier(seed=0, labels=LABELS, **switches):
    torch.manual_seed(seed)
    return Classifier(GPT(ModelConfig(**(TINY | switches))), labels).eval()


@pytest.fixture
def tokenizer():
    return Tokenizer.char("".join(map(chr, range(32, 127))))


@pytest.fixture
def sentences(tmp_path):
    """Words among random letters: the label is which of three words is among them."""
    draw = random.Random(0)
    lines = ["label,text"]
    for label in sorted(LABELS * 120):  # sorted, as files often are
        before, after = ("".join(draw.choices("hjkmnpqw ", k=draw.randrange(10))) for _ in "ab")
        lines.append(f"{label},{before}{label}{after}")
    path = tmp_path / "words.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_toy_task_is_learned(sentences, tokenizer):
    """The seed's example fed (2, 65) logits to a layer for 256 numbers and could not run."""
    found = read_examples(sentences, "labels", tokenizer, 24)
    train, val = split_examples(found.examples, 0.25)
    batches = Examples(train, 24, seed=1)
    classifier = make_classifier(labels=found.labels).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for step in range(120):
        x, y = map(torch.from_numpy, batches.rows(step * 32, 32))
        loss = cross_entropy(classifier, x, y) / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = evaluate_labels(classifier, *Examples(val, 24, seed=0).all())
    assert report.confusion.sum() == 90
    assert report.accuracy > 0.95
    assert report.macro_f1 > 0.95
    told = classify(classifier, tokenizer, ["a good kmn", "bad", "n fair"])
    assert [prediction.label for prediction in told] == ["good", "bad", "fair"]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_text_gets_the_same_answer_alone_and_in_a_batch(tokenizer, position):
    """Read at position -1 a short text in a batch is judged by its padding."""
    classifier = make_classifier(position=position)
    together = classify(classifier, tokenizer, TEXTS)
    assert len({prediction.probabilities["bad"] for prediction in together}) == 5
    for text, prediction in zip(TEXTS, together, strict=True):
        (alone,) = classify(classifier, tokenizer, [text])
        assert alone.label == prediction.label
        assert list(alone.probabilities) == LABELS
        assert alone.probabilities == pytest.approx(prediction.probabilities, abs=1e-6)
        assert sum(alone.probabilities.values()) == pytest.approx(1)
        assert alone.label == max(alone.probabilities, key=alone.probabilities.get)


def test_many_batches_keep_the_order_of_the_texts():
    rows = [np.arange(1 + i * 7 % 24) % 100 for i in range(150)]
    classifier = make_classifier()
    found = label_probabilities(classifier, rows)
    for i in (0, 1, 63, 64, 149):
        logits = classifier(torch.from_numpy(rows[i])[None])[0, -1]
        np.testing.assert_allclose(found[i], logits.softmax(0).detach().numpy(), atol=1e-6)


def test_a_texts_beginning_is_cut_off_as_in_training(tokenizer):
    classifier = make_classifier()
    long, cut = classify(classifier, tokenizer, ["abc" * 20, ("abc" * 20)[-24:]])
    assert long == cut
    with pytest.raises(DataError, match="text 2 is empty"):
        classify(classifier, tokenizer, ["a", ""])


def test_the_loss_counts_the_last_token_alone(sentences, tokenizer):
    classifier = make_classifier()
    found = read_examples(sentences, "labels", tokenizer, 24).examples[:7]
    x, y = Examples(found, 24, seed=0).all()
    expected = sum(
        nn.functional.cross_entropy(
            classifier(torch.from_numpy(e.x).long()[None])[0, -1:], torch.tensor([e.y[-1]]).long()
        )
        for e in found
    )
    given = cross_entropy(classifier, torch.from_numpy(x), torch.from_numpy(y))
    torch.testing.assert_close(given, expected)


def test_judging_leaves_dropout_as_it_was(tokenizer):
    classifier = make_classifier(dropout=0.5).train()
    first, second = (label_probabilities(classifier, [np.arange(9)]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert classifier.training
    assert classifier.body.drop.training
    classifier.set_dropout(0.25)
    assert classifier.body.drop.p == 0.25


@pytest.mark.parametrize("tie", [True, False])
def test_every_weight_is_trained_and_none_but_the_head_is_new(tie):
    """The language model's head, which answers another question, is gone."""
    torch.manual_seed(0)
    body = GPT(ModelConfig(**TINY, tie_embeddings=tie))
    before = {name: weight.clone() for name, weight in body.state_dict().items()}
    classifier = Classifier(body, LABELS)
    state = classifier.state_dict()
    assert {name for name in state if not name.startswith("body.")} == {"head.weight", "head.bias"}
    for name, weight in state.items():
        if name.startswith("body."):
            assert torch.equal(weight, before[name.removeprefix("body.")])
    x, y = torch.randint(0, 128, (2, 5)), torch.tensor([[-100] * 4 + [1]] * 2)
    cross_entropy(classifier, x, y).backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "a"]])
def test_one_label_is_refused(labels):
    with pytest.raises(DataError, match="no two labels"):
        make_classifier(labels=labels)


def test_the_figures_are_those_computed_by_hand():
    """True a a a a b b b c, predicted a a b c b b a b: d is neither there nor predicted."""
    confusion = np.array([[2, 1, 1, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    report = Report(["a", "b", "c", "d"], confusion)
    assert report.accuracy == 4 / 8
    assert report.support.tolist() == [4, 3, 1, 0]
    assert report.columns["precision"].tolist() == [2 / 3, 2 / 4, 0, 0]
    assert report.columns["recall"].tolist() == [2 / 4, 2 / 3, 0, 0]
    np.testing.assert_allclose(report.columns["f1"], [4 / 7, 4 / 7, 0, 0], atol=1e-15)
    assert report.macro_f1 == pytest.approx((4 / 7 + 4 / 7 + 0) / 3)
    figures = report.to_dict()
    assert figures["confusion"] == confusion.tolist()
    assert figures["labels"]["a"] == {
        "precision": 2 / 3, "recall": 1 / 2, "f1": pytest.approx(4 / 7), "support": 4
    }  # fmt: skip


def test_the_confusion_has_true_labels_in_rows():
    classifier = make_classifier()
    with torch.no_grad():  # whatever it reads, it says "good"
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    x = np.zeros((5, 6), dtype=np.int64)
    y = np.full((5, 6), -100, dtype=np.int64)
    order = shuffled(np.arange(5), 5, seed=0)
    y[np.arange(5), order] = [0, 0, 1, 2, 0]
    report = evaluate_labels(classifier, x, y)
    assert report.confusion.tolist() == [[0, 0, 3], [0, 0, 1], [0, 0, 1]]
    assert report.labels == LABELS
