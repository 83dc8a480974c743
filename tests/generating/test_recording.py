"""What is recorded is what was computed, also token by token with the cache."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from model_kit import random_model

from octavo.generating.engine import TorchEngine
from octavo.generating.recording import Recorder, WatchedEngine, attention_weights, token_text
from octavo.generating.sampling import Sampling
from octavo.generating.writing import window_start, write
from octavo.model.attention import sdpa
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

VOCAB = 29


def make_model(**settings):
    shape = {"vocab_size": VOCAB, "block_size": 16, "n_layer": 2, "n_head": 4, "d_model": 16}
    return random_model(ModelConfig(**{**shape, **settings}))


def in_one_pass(model, ids):
    """(layers, H, T, T) of a text that fits the context."""
    recorder = Recorder()
    with torch.inference_mode():
        model(torch.tensor([ids]), attend=recorder)
    return torch.cat(recorder.calls).numpy()


def watched_writing(model, prompt, count, **options):
    watched = WatchedEngine(TorchEngine(model, vocab=VOCAB, chunk=5), **options)
    pieces = write(watched, None, [prompt], Sampling(seed=3), count)
    return watched, [piece.id for piece in pieces]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_weights_are_the_softmax_done_by_hand(kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 8, generator=generator)
    k = torch.randn(2, kv_heads, 5, 8, generator=generator)
    found = attention_weights(q, k)
    for b, h, t in np.ndindex(2, 4, 3):
        key = k[b, h // (4 // kv_heads)]
        seen = range(t + 3)  # three queries, the last of five tokens
        powers = [math.exp(float(q[b, h, t] @ key[s]) / math.sqrt(8)) for s in seen]
        by_hand = [power / sum(powers) for power in powers] + [0.0] * (2 - t)
        assert found[b, h, t].tolist() == pytest.approx(by_hand, abs=1e-6)


def test_a_mask_says_where_queries_may_look():
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[[[True, False, True], [False, True, False]]]])
    found = attention_weights(q, k, mask)[0, 0]
    assert found[0, 1] == 0
    assert found[1].tolist() == [0, 1, 0]
    assert found.sum(-1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("switches", [{}, {"n_kv_head": 1}, {"qk_norm": True, "norm": "layernorm"}])
def test_recording_changes_nothing_and_explains_everything(switches):
    model, ids = make_model(**switches), torch.randint(0, VOCAB, (2, 9))
    outputs = []

    def attend(q, k, v, mask, dropout):
        outputs.append((v, sdpa(q, k, v, mask, dropout)))
        return outputs[-1][1]

    recorder = Recorder(attend)
    with torch.inference_mode():
        assert torch.equal(model(ids, attend=recorder), model(ids))
    for weights, (v, y) in zip(recorder.calls, outputs, strict=True):
        v = v.repeat_interleave(4 // v.size(1), 1)
        assert torch.allclose(weights @ v, y, atol=1e-5)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)


def test_a_recorder_keeps_only_the_rows_it_is_asked_for():
    model, ids = make_model(), torch.randint(0, VOCAB, (1, 9))
    some = Recorder(first=2, last=5)
    with torch.inference_mode():
        model(ids, attend=some)
    whole = in_one_pass(model, ids[0].tolist())
    assert np.array_equal(torch.cat(some.calls).numpy(), whole[:, :, 2:5])


@pytest.mark.parametrize("prompt", [[3], list(range(12))])
def test_attention_while_writing_with_the_cache_is_that_of_one_pass(prompt):
    model = make_model()
    watched, new = watched_writing(model, prompt, 16 - len(prompt))
    read = (prompt + new)[:-1]  # after the last one nothing was drawn
    assert watched.ids == read
    found = watched.weights().astype(np.float32)
    assert np.abs(found - in_one_pass(model, read)).max() < 1e-3  # half precision's
    assert np.abs(found.sum(-1) - 1).max() < 2e-3


def test_watching_does_not_change_what_is_written():
    model = make_model()
    plain = write(TorchEngine(model, vocab=VOCAB, chunk=5), None, [[1, 2]], Sampling(seed=3), 40)
    assert watched_writing(model, [1, 2], 40)[1] == [piece.id for piece in plain]


def test_past_the_context_a_token_looks_at_the_window_it_was_read_in():
    """Once the window had moved on, rows were put where the window began and not the text."""
    model, prompt = make_model(), [5, 7]
    watched, new = watched_writing(model, prompt, 40)
    ids, found = (prompt + new)[:-1], watched.weights().astype(np.float32)
    assert found.shape == (2, 4, 41, 41)
    for last in range(len(ids)):
        start = window_start(last + 1, 16)
        row = in_one_pass(model, ids[start : last + 1])[:, :, -1]
        assert np.abs(found[:, :, last, start : last + 1] - row).max() < 1e-3
        assert not found[:, :, last, :start].any()
        assert not found[:, :, last, last + 1 :].any()


def test_of_a_prompt_longer_than_the_context_the_window_counts():
    prompt = [i % VOCAB for i in range(37)]
    watched, new = watched_writing(make_model(), prompt, 3)
    start = window_start(37, 16)
    assert watched.ids == (prompt + new)[start:-1]
    assert np.abs(watched.weights().astype(np.float32).sum(-1) - 1).max() < 2e-3


def test_no_more_is_kept_than_asked_for(tmp_path):
    watched, _ = watched_writing(make_model(), [1, 2, 3], 30, most=10)
    assert len(watched.ids) == 10
    watched.save(tmp_path / "attention" / "step-1.npz", None)
    with np.load(tmp_path / "attention" / "step-1.npz") as saved:  # no pickle
        assert saved["attention"].shape == (2, 4, 10, 10)
        assert saved["ids"].tolist() == watched.ids
        assert saved["tokens"].tolist()[:3] == ["1 ", "2 ", "3 "]


def test_half_a_character_is_shown_as_bytes():
    tokenizer = Tokenizer.byte()
    assert [token_text(tokenizer, b) for b in "aé".encode()] == ["a", "\\xc3", "\\xa9"]
    assert [token_text(None, i) for i, _ in pairwise([7, 8, 9])] == ["7 ", "8 "]
