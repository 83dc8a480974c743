"""Contexts computed once and packed beside their continuations score as each would alone."""

import numpy as np
import pytest
import torch
from model_kit import random_model

from octavo.evaluating import continuations
from octavo.evaluating.continuations import continuation_likelihoods, cut
from octavo.model_config import ModelConfig

SHAPE = dict(vocab_size=23, block_size=16, n_layer=2, n_head=4, d_model=16, d_ff=24)
KINDS = {
    "rope": {},
    "learned": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
    "both": {"position": "both", "norm_position": "sandwich", "qk_norm": True},
    "none": {"position": "none", "norm_position": "post"},
    "grouped": {"n_kv_head": 2, "tie_embeddings": False},
    "one key": {"n_kv_head": 1},
}


def make_model(**switches):
    return random_model(ModelConfig(**(SHAPE | switches)), noise=0.2)


def questions(seed=0):
    """Contexts of every length up to far beyond block_size, each with four continuations."""
    generator = np.random.default_rng(seed)
    for length in [*range(1, 20), 40]:
        context = generator.integers(0, 23, length).tolist()
        for size in (1, *generator.integers(1, 14, 2), 16):
            yield context, generator.integers(0, 23, int(size)).tolist()


def alone(model, context, continuation):
    """One continuation by itself, the way one would write it down first."""
    ids = [*context, *continuation][-model.config.block_size - 1 :]
    scored = min(len(continuation), model.config.block_size)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)[-scored:]
    targets = torch.tensor(ids[-scored:])
    return (
        logprobs.gather(1, targets[:, None]).sum().item(),
        bool((logprobs.argmax(-1) == targets).all()),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [20, 200, 4000])
def test_packed_equals_one_by_one(kind, batch_tokens, monkeypatch):
    monkeypatch.setattr(continuations, "BATCH_TOKENS", {"cpu": batch_tokens})
    monkeypatch.setattr(continuations, "HEAD_ROWS", 7)
    model, requests = make_model(**KINDS[kind]), list(questions())
    found = continuation_likelihoods(model, requests)
    wanted = [alone(model, *request) for request in requests]
    assert found.logprobs == pytest.approx([logprob for logprob, _ in wanted], abs=1e-5)
    assert found.greedy.tolist() == [greedy for _, greedy in wanted]


def test_what_the_model_writes_greedily_is_called_greedy():
    model = make_model()
    ids = [3, 5]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    other = [*ids[2:-1], (ids[-1] + 1) % 23]
    found = continuation_likelihoods(model, [(ids[:2], ids[2:]), (ids[:2], other)])
    assert found.greedy.tolist() == [True, False]


def test_a_shared_context_is_read_once(monkeypatch):
    model, read = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, *rest: read.append(ids.numel()) or hidden(ids, *rest)
    )
    context = [1, 2, 3, 4, 5, 6]
    continuation_likelihoods(model, [(context, [7, 8, ending]) for ending in range(4)])
    assert read == [6 + 4 * 2]  # the last token of each predicts nothing


def test_the_longest_row_comes_first_and_progress_counts_to_the_end(monkeypatch):
    """What does not fit into memory shows at once, and not after an hour."""
    model, seen, widths = make_model(), [], []
    hidden = model.hidden
    model.hidden = lambda ids, *rest: widths.append(ids.size(1)) or hidden(ids, *rest)
    requests = list(questions())
    monkeypatch.setitem(continuations.BATCH_TOKENS, "cpu", 40)
    continuation_likelihoods(model, requests, lambda done, of: seen.append((done, of)))
    assert widths == sorted(widths, reverse=True)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (len(requests), len(requests))


def test_the_cut_keeps_the_last_tokens_and_one_to_predict_them_from():
    assert cut([1, 2], [3, 4], 16) == ([1, 2], [3, 4])
    assert cut([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5])
    assert cut([1, 2], [3, 4, 5], 3) == ([2], [3, 4, 5])
    assert cut([1], [2, 3, 4, 5, 6], 3) == ([3], [4, 5, 6])


def test_the_model_is_left_as_it_was_even_when_stopped():
    model = make_model(dropout=0.5).train()
    requests = list(questions())
    first = continuation_likelihoods(model, requests)
    assert model.training
    second = continuation_likelihoods(model, requests)
    assert np.array_equal(first.logprobs, second.logprobs)  # without dropout

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continuation_likelihoods(model, requests, stop)
    assert model.training


def test_nothing_asked_is_nothing_found():
    assert continuation_likelihoods(make_model(), []).logprobs.shape == (0,)
