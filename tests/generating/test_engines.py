"""What every engine promises: PyTorch's with its cache and without, and the native one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_kit import (
    ENGINES,
    GREEDY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    by_hand,
    make_model,
    make_slot,
    written,
)

from octavo.errors import ConfigError, NonFiniteError
from octavo.generating import native
from octavo.generating.sampling import Sampling, top_logprobs


@pytest.fixture(params=ENGINES)
def build(request, monkeypatch):
    """(model, slots, options) to an engine, whose steps a slow machine does not cut short."""
    monkeypatch.setattr(native, "SLICE", 60.0)
    return ENGINES[request.param]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("position", ["learned", "rope", "both", "none"])
def test_alone_together_in_chunks_and_by_hand_the_same_is_written(build, position, sampling):
    """Far past block_size, from prompts shorter and longer than it, one token a step and many.

    GPT-2's positions went wrong with a cache (mlx-lm#93), left padding changed a batch's text
    (transformers#3021): the same ids must come out on every path.
    """
    model = make_model(position=position, n_kv_head=1)
    expected = [by_hand(model, prompt, 40, sampling) for prompt in PROMPTS]
    one = build(model)
    assert [written(one, [prompt], 40, sampling)[0] for prompt in PROMPTS] == expected
    for chunk, most in ((1, 1), (3, 7), (64, 64)):
        together = build(model, len(PROMPTS), chunk=chunk)
        assert written(together, PROMPTS, 40, sampling, most) == expected


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_windows(build, block_size):
    model = make_model(block_size=block_size)
    expected = [by_hand(model, prompt, 12, SAMPLED) for prompt in PROMPTS]
    assert written(build(model, 5), PROMPTS, 12, most=5) == expected


def test_rows_that_join_and_leave_write_as_if_alone(build):
    model = make_model()
    expected = [by_hand(model, prompt, 25, SAMPLED) for prompt in PROMPTS]
    engine, waiting, free = build(model, 3), list(enumerate(PROMPTS)), [2, 0, 1]
    active, texts, steps = {}, {}, 0
    while waiting or active:
        if waiting and free and steps % 4 == 0:  # one joins now and then
            number, prompt = waiting.pop(0)
            active[number] = make_slot(free.pop(0), prompt, left=25)
        slots = list(active.values())[::-1]  # the order of a call means nothing
        for slot, ids in zip(slots, engine.step(slots, 2) if slots else [], strict=True):
            slot.ids.extend(ids)
            slot.left -= len(ids)
        for number, slot in [pair for pair in active.items() if not pair[1].left]:
            texts[number] = slot.ids[slot.prompt_length :]
            engine.release(slot.index)
            free.append(active.pop(number).index)
        steps += 1
    assert [texts[number] for number in range(len(PROMPTS))] == expected


def test_a_copy_depends_on_its_number_and_seed_not_on_its_slot(build):
    engine = build(make_model(), 4)
    alone = {n: written(engine, [[1, 2]], 30, n=n)[0] for n in range(3)}
    assert len({tuple(ids) for ids in alone.values()}) == 3
    neighbours = [[7, 8, 9], [1, 2], [4], [1, 2]]
    assert written(engine, neighbours, 30, n=2)[1] == alone[2]
    assert written(engine, neighbours, 30, n=2)[3] == alone[2]
    assert written(engine, [[1, 2]], 30, replace(SAMPLED, seed=8))[0] != alone[0]


def test_what_was_not_appended_is_forgotten(build):
    """A step may be repeated, or only its first ids kept; other ids may stand there then."""
    model = make_model(block_size=64)
    engine, slot = build(model), make_slot(0, [1, 2, 3])
    first = engine.step([slot], 8)
    assert engine.step([slot], 8) == first
    slot.ids += [*first[0][:2], 4, 5]  # several at once are read at once
    fresh = make_slot(0, slot.ids)
    fresh.prompt_length = 3
    assert engine.step([slot], 8) == build(model).step([fresh], 8)


def test_nothing_is_drawn_after_the_end_of_text_or_beyond_what_is_left(build):
    model = make_model(block_size=64)
    truth = by_hand(model, [1, 2], 8, SAMPLED)
    engine, slot = build(model), make_slot(0, [1, 2], draft=truth, eot=truth[4])
    (drawn,) = engine.step([slot], 20)
    assert drawn == truth[: truth.index(truth[4]) + 1]
    slot.eot, slot.left = None, 3
    assert engine.step([slot], 20) == [truth[:3]]


def test_a_padded_vocabulary_is_never_drawn(build):
    """build-nanogpt#81: an id from the padding has no text, and the tokenizer panics."""
    model = make_model(vocab_size=32, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 100 * model.lm_head.weight[:3]
    assert max(written(build(model), [[1]], 40)[0]) >= VOCAB  # the trap is real
    for sampling in (GREEDY, SAMPLED):
        assert max(written(build(model, vocab=VOCAB), [[1]], 40, sampling)[0]) < VOCAB


def test_top_reports_the_models_log_probabilities(build):
    model = make_model(vocab_size=32)
    engine = build(model, vocab=VOCAB)
    slot = make_slot(0, [1, 2, 3], Sampling(temperature=5.0, seed=3), logprobs=2, keep_logits=True)
    for _ in range(10):
        ((drawn,),) = engine.step([slot])
        (top,), (logits,) = slot.top, slot.logits
        with torch.no_grad():
            wanted = model(torch.tensor([slot.ids]))[0, -1, :VOCAB].numpy()
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        expected = top_logprobs(logits, 2, drawn)
        assert [token for token, _ in top] == [token for token, _ in expected]
        np.testing.assert_allclose([p for _, p in top], [p for _, p in expected], rtol=1e-14)
        slot.ids.append(drawn)
    slot.logprobs = 0
    engine.step([slot])
    assert slot.top == [[]]


@pytest.mark.parametrize("wrong", [-1, VOCAB, 10**6, 2**40])
def test_an_id_the_model_does_not_have_is_named(build, wrong):
    engine = build(make_model())
    for slot in (make_slot(0, [1, wrong]), make_slot(0, [1], draft=[2, wrong])):
        with pytest.raises(ConfigError, match=f"no token {wrong}; its vocabulary is 0 to 28"):
            engine.step([slot], 8)


@pytest.mark.parametrize("rows", [1, 3])
def test_damaged_weights_are_an_error_and_not_a_token(build, rows):
    model = make_model()
    model.norm_f.weight.data[0] = torch.nan
    engine = build(model, rows)
    with pytest.raises(NonFiniteError, match="not finite"):
        engine.step([make_slot(i, [1]) for i in range(rows)])
