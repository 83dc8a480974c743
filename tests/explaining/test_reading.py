"""What is said about a text is what the model's logits say."""

import math

import numpy as np
import pytest
import torch

from octavo.adapting.classify import Classifier
from octavo.errors import ConfigError
from octavo.explaining.reading import ROWS, Window, attended_tokens, read, windows
from octavo.generating.writing import window_start
from octavo.model.gpt import GPT


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def text(count, vocab=17):
    return np.random.default_rng(0).integers(0, vocab, count).tolist()


@pytest.mark.parametrize(
    "switches",
    [{}, {"norm": "layernorm", "position": "learned", "bias": True}, {"norm_position": "post"},
     {"norm_position": "sandwich", "tie_embeddings": False}, {"block_size": 3 * ROWS}],
)  # fmt: skip
def test_the_figures_of_a_text_are_its_logits(make_lm, switches):
    lm = make_lm(tokenizer=None, **switches)
    ids = text(min(lm.config.block_size, 150))
    found, p = read(lm, ids), softmax(lm.logits(ids))
    came = p[np.arange(len(ids) - 1), ids[1:]]
    assert found.probability[:-1] == pytest.approx(came, rel=1e-5)
    assert math.isnan(found.probability[-1])
    assert found.entropy == pytest.approx(-(p * np.log2(p)).sum(-1), rel=1e-5)
    assert found.top_probability == pytest.approx(np.sort(p)[:, ::-1][:, :6], rel=1e-5)
    assert found.top_ids[:, 0].tolist() == p.argmax(-1).tolist()
    ranks = [1 + int((row > row[token]).sum()) for row, token in zip(p, ids[1:], strict=False)]
    assert found.rank.tolist() == [*ranks, 0]
    assert found.bits == pytest.approx(-np.log2(came).mean(), rel=1e-5)


def test_the_last_layer_of_the_lens_is_the_model_and_the_others_are_shorter_models(make_lm):
    lm = make_lm(tokenizer=None)
    ids = text(16)
    found = read(lm, ids)
    assert np.array_equal(found.lens_probability[:-1, -1], found.probability[:-1])
    assert np.array_equal(found.lens_ids[:, -1], found.top_ids[:, 0])
    assert np.array_equal(found.lens_best[:, -1], found.top_probability[:, 0])
    for layer in range(lm.config.n_layer + 1):
        shorter = GPT(lm.config)
        shorter.load_state_dict(lm.model.state_dict())
        shorter.blocks = shorter.blocks[:layer]
        p = softmax(shorter.eval()(torch.tensor([ids]))[0].detach().numpy())
        assert found.lens_best[:, layer] == pytest.approx(p.max(-1), rel=1e-4)
        assert found.lens_ids[:, layer].tolist() == p.argmax(-1).tolist()
        came = p[np.arange(15), ids[1:]]
        assert found.lens_probability[:-1, layer] == pytest.approx(came, rel=1e-4)


def test_a_long_text_is_read_as_the_model_would_that_wrote_it(make_lm):
    lm = make_lm(tokenizer=None)
    ids = text(70)
    found = read(lm, ids, most_weights=10**6)
    for last in range(70):
        start = window_start(last + 1, 16)
        p = softmax(lm.logits(ids[start : last + 1]))[-1]
        assert found.top_probability[last, 0] == pytest.approx(p.max(), rel=1e-4)
        assert found.entropy[last] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-4)
        assert found.attention[last].shape == (3, 4, last + 1 - start)
        assert found.attention[last].sum(-1) == pytest.approx(np.ones((3, 4)), abs=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 24, 25, 100])
def test_windows_answer_for_every_token_once(length, block_size):
    plan = windows(length, block_size)
    assert [t for w in plan for t in range(w.first, w.end)] == list(range(length))
    for window in plan:
        assert 0 <= window.end - window.start <= block_size
        for end in range(window.first + 1, window.end + 1):
            assert window.start == window_start(end, block_size)


def test_an_unlike_window_is_seen():
    assert windows(25, 16) == [Window(0, 0, 16), Window(8, 16, 24), Window(16, 24, 25)]


def test_attention_is_kept_of_as_many_tokens_as_there_is_room_for(make_lm):
    lm = make_lm(tokenizer=None)
    ids = text(40)
    for room in (0, 11, 12, 12 * 3, 3000, 10**9):
        kept = read(lm, ids, most_weights=room).attention
        assert len(kept) == attended_tokens(lm, 40, room)
        assert sum(row.size for row in kept) <= room
    whole = read(lm, ids, most_weights=10**9).attention
    assert len(whole) == 40
    for some, all_of_it in zip(read(lm, ids, most_weights=4000).attention, whole, strict=False):
        assert np.array_equal(some, all_of_it)


def test_padding_of_the_vocabulary_is_no_token(make_lm):
    lm = make_lm(vocab_size=32)  # the tokenizer has fewer
    size = lm.tokenizer.vocab_size
    assert size < 32
    ids = lm.tokenizer.encode("She sells")
    found, p = read(lm, ids), softmax(lm.logits(ids)[:, :size])
    assert found.top_probability[:, 0] == pytest.approx(p.max(-1), rel=1e-5)
    assert found.top_ids.max() < size
    assert found.lens_ids.max() < size


def test_reading_leaves_no_hook_behind(make_lm):
    lm = make_lm()
    before = lm.logits([1, 2, 3])
    read(lm, [1, 2, 3])
    assert all(not block._forward_hooks for block in lm.model.blocks)
    assert not lm.model.blocks[0]._forward_pre_hooks
    assert np.array_equal(lm.logits([1, 2, 3]), before)


def test_what_cannot_be_read_is_refused(make_lm):
    lm = make_lm(tokenizer=None)
    with pytest.raises(ConfigError, match="text is empty"):
        read(lm, [])
    with pytest.raises(ConfigError, match="no token 17; its vocabulary is 0 to 16"):
        read(lm, [3, 17])
    lm.model = Classifier(lm.model, ["a", "b"])
    with pytest.raises(ConfigError, match="octavo attention RUN shows"):
        read(lm, [3, 4])
