"""What only the PyTorch engine promises: how it reads, and what it does with a draft."""

import itertools

import pytest
import torch
from engine_kit import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    VOCAB,
    by_hand,
    make_model,
    make_slot,
    written,
)

from octavo.generating.engine import TorchEngine
from octavo.generating.writing import window_start
from octavo.model.gpt import GPT


def test_the_window_holds_the_newest_ids_and_at_least_half_a_block():
    for block, length in itertools.product(range(1, 12), range(1, 60)):
        start = window_start(length, block)
        assert start % max(1, block // 2) == 0
        assert length - start <= block
        assert start == 0 or length - start > block - max(1, block // 2)
    assert [window_start(length, 8) for length in (8, 9, 12, 13, 16, 17)] == [0, 4, 4, 8, 8, 12]


DRAFTS = {
    "right": lambda truth, at: truth[at : at + 5],
    "right, then wrong": lambda truth, at: [*truth[at : at + at % 4], 0, 1],
    "wrong": lambda truth, at: [(truth[at] + 1) % VOCAB, *truth[at + 1 : at + 4]],
    "longer than everything": lambda truth, at: (truth * 9)[at : at + 99],
    "now and then none": lambda truth, at: truth[at : at + at % 3],
}


def drafted(engine, prompts, truths, guess, count, sampling, most=99):
    """What is written with drafts, and how much each step returned to each row."""
    slots = [make_slot(i, prompt, sampling) for i, prompt in enumerate(prompts)]
    sizes = []
    while active := [slot for slot in slots if len(slot.ids) < slot.prompt_length + count]:
        for slot in active:
            done = len(slot.ids) - slot.prompt_length
            slot.left, slot.draft = count - done, guess(truths[slot.index], done)
        for slot, drawn in zip(active, engine.step(active, most), strict=True):
            assert 1 <= len(drawn) <= min(most, slot.left)
            assert len(slot.top) == len(drawn)
            slot.ids.extend(drawn)
            sizes.append(len(drawn))
    return [slot.ids[slot.prompt_length :] for slot in slots], sizes


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("guess", DRAFTS.values(), ids=DRAFTS)
def test_a_draft_decides_how_much_is_returned_and_never_what(guess, use_cache):
    """Ragged rows, far past block_size, with penalties: rows with and without drafts together."""
    model = make_model(position="both", n_kv_head=1)
    for sampling in (GREEDY, SAMPLED):
        truths = [by_hand(model, prompt, 50, sampling) for prompt in PROMPTS]
        engine = TorchEngine(model, slots=len(PROMPTS), use_cache=use_cache, chunk=3)
        texts, sizes = drafted(engine, PROMPTS, truths, guess, 40, sampling)
        assert texts == [truth[:40] for truth in truths]
        assert (max(sizes) > 1) == (guess is not DRAFTS["wrong"])
        assert drafted(engine, PROMPTS, truths, guess, 40, sampling, most=2)[0] == texts


def test_a_right_draft_is_accepted_up_to_the_end_of_the_window():
    """Past it every position shifts, so a draft never crosses it."""
    model = make_model()
    truth = by_hand(model, [1, 2], 60, GREEDY)
    texts, sizes = drafted(
        TorchEngine(model), [[1, 2]], [truth], DRAFTS["longer than everything"], 40, GREEDY
    )
    assert texts == [truth[:40]]
    assert sizes == [15, 8, 8, 8, 1]  # 2 + 15 is the first length with another window


def test_the_cache_keeps_only_what_was_accepted(reads):
    model = make_model()
    truth = by_hand(model, [1, 2, 3], 8, GREEDY)
    engine, slot = TorchEngine(model), make_slot(0, [1, 2, 3], GREEDY)
    slot.draft = [*truth[:3], *[(token + 1) % VOCAB for token in truth[3:6]]]
    reads.clear()
    assert engine.step([slot], most=9) == [truth[:4]]
    assert engine.cache.lengths == [3 + 3]
    slot.draft = []
    slot.ids.extend(truth[:4])
    assert engine.step([slot], most=9) == [truth[4:5]]
    assert reads == [(1, 9), (1, 1)]


@pytest.fixture
def reads(monkeypatch):
    """The shapes (rows, tokens) of all passes through the model."""
    shapes, hidden = [], GPT.hidden

    def noted(model, idx, *rest, **named):
        shapes.append(tuple(idx.shape))
        return hidden(model, idx, *rest, **named)

    monkeypatch.setattr(GPT, "hidden", noted)
    return shapes


def test_one_step_reads_one_token_and_a_prompt_in_chunks(reads):
    engine = TorchEngine(make_model(), slots=2, chunk=5)
    slots = [make_slot(0, range(12)), make_slot(1, [1, 2, 3])]
    for slot, drawn in zip(slots, engine.step(slots), strict=True):
        slot.ids.extend(drawn)
    assert reads == [(2, 5), (1, 5), (1, 2)]
    reads.clear()
    slots[1].ids.extend([1, 2, 3])
    engine.step(slots)
    assert reads == [(1, 1), (1, 4)]  # a row that lacks one token is not padded to its neighbour


def test_a_full_window_is_read_again_once_every_half_block(reads):
    engine = TorchEngine(make_model())
    written(engine, [[1] * 16], 18)
    assert [T for _, T in reads] == [16, 9, *[1] * 7, 9, *[1] * 7, 9]


def test_the_cache_grows_with_need_and_not_beyond_block_size():
    model = make_model(block_size=64)
    engine = TorchEngine(model, chunk=4)
    assert engine.cache.capacity == 4
    expected = by_hand(model, [1, 2], 100, SAMPLED)
    assert written(engine, [[1, 2]], 8)[0] == expected[:8]
    assert engine.cache.capacity == 16
    assert written(engine, [[1, 2]], 100)[0] == expected
    assert engine.cache.capacity == 64
    assert TorchEngine(make_model(block_size=2)).cache.capacity == 2


def test_dropout_does_not_disturb_writing():
    model = make_model(dropout=0.5)
    model.train()
    expected = written(TorchEngine(make_model()), [[1, 2]], 20)
    engine = TorchEngine(model)
    assert written(engine, [[1, 2]], 20) == expected
    model.train()  # the training loop went on in between
    assert written(engine, [[1, 2]], 20) == expected


def test_half_precision_weights_get_a_half_precision_cache():
    model = make_model().to(torch.bfloat16)
    engine = TorchEngine(model, slots=2)
    assert engine.cache.keys.dtype == torch.bfloat16
    assert all(0 <= token < VOCAB for row in written(engine, [[1], [2, 3]], 20) for token in row)
