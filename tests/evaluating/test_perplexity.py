"""Scores are sums divided once, and every token of a long text is judged exactly once."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from octavo.evaluating.perplexity import Score, score_windows, strided_windows
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=17, block_size=12, n_layer=2, n_head=2, d_model=16)).eval()


def test_units_of_one_score():
    score = Score(nats=20.0, tokens=10, bytes=40)
    assert score.loss == 2.0
    assert score.perplexity == pytest.approx(math.e**2)
    assert score.bits_per_byte == pytest.approx(20.0 / math.log(2) / 40)


def test_windows_in_batches_equal_one_by_one(model):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 17, (7, 12))
    y = generator.integers(0, 17, (7, 12))
    y[2, 5:] = -100
    lengths = np.arange(17) % 4 + 1
    score = score_windows(model, x, y, lengths, batch_tokens=30)
    nats = n_bytes = 0.0
    for row in range(7):
        logits = model(torch.from_numpy(x[row : row + 1]))[0]
        for t in range(12):
            if y[row, t] != -100:
                nats -= F.log_softmax(logits[t].double(), -1)[y[row, t]].item()
                n_bytes += lengths[y[row, t]]
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert (score.tokens, score.bytes) == (int((y != -100).sum()), n_bytes)


def test_scoring_leaves_the_model_as_it_was(model):
    model.train()
    score_windows(model, np.zeros((1, 4), dtype=np.int64), np.zeros((1, 4), dtype=np.int64))
    assert model.training
    model.eval()


@given(st.integers(2, 90), st.integers(1, 20), st.data())
def test_every_token_but_the_first_is_a_target_once(length, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    ids = np.arange(1000, 1000 + length)
    x, y = strided_windows(ids, block_size, stride)
    targets = y[y != -100]
    assert sorted(targets) == list(ids[1:])
    rows, columns = np.nonzero(y != -100)
    # The input under each target is the token just before it, preceded by its true context.
    for row, column in zip(rows, columns, strict=True):
        target = y[row, column]
        context = x[row, : column + 1]
        assert list(context) == list(range(target - column - 1, target))
        at = target - 1000
        assert column + 1 >= min(at, block_size - stride + 1 if at >= block_size else at)


def test_a_long_text_is_scored_as_by_hand(model):
    generator = np.random.default_rng(1)
    ids = generator.integers(0, 17, 40)
    x, y = strided_windows(ids, 12, 6)
    score = score_windows(model, x, y)
    nats = 0.0
    for at in range(1, 40):
        end = 12 if at <= 12 else 12 + 6 * math.ceil((at - 12) / 6)
        end = min(end, 39)
        start = max(end - 12, 0)
        logits = model(torch.from_numpy(ids[None, start:at]))[0, -1]
        nats -= F.log_softmax(logits.double(), -1)[ids[at]].item()
    assert score.tokens == 39
    assert score.nats == pytest.approx(nats, rel=1e-5)
