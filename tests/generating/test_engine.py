import itertools
from dataclasses import replace

import pytest
import torch
from model_kit import random_model

from octavo.errors import ConfigError, NonFiniteError
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import PRESETS, Sampling, pick
from octavo.generating.writing import Slot, window_start
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig

VOCAB = 29
GREEDY = PRESETS["greedy"]
SAMPLED = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2)
PROMPTS = [[3], [1, 2, 3, 4, 5], list(range(13)), [5, 4] * 20, [9, 9, 9]]


def make_model(seed=0, **settings):
    shape = {"vocab_size": VOCAB, "block_size": 16, "n_layer": 2, "n_head": 2, "d_model": 16}
    return random_model(ModelConfig(**{**shape, **settings}), seed)


def make_slot(index, prompt, sampling=SAMPLED, n=0):
    return Slot(index, list(prompt), n, sampling, len(prompt))


def written(engine, prompts, count, sampling=SAMPLED, n=0):
    """What is written after each prompt when all are stepped together."""
    slots = [make_slot(i, prompt, sampling, n) for i, prompt in enumerate(prompts)]
    for _ in range(count):
        for slot, drawn in zip(slots, engine.step(slots), strict=True):
            slot.ids.extend(drawn)
    for slot in slots:
        engine.release(slot.index)
    return [slot.ids[slot.prompt_length :] for slot in slots]


def by_hand(model, prompt, count, sampling, n=0):
    """The rule in plain words: read the window, draw, drop its oldest half when it overflows."""
    model.eval()
    block, ids, window = model.config.block_size, list(prompt), list(prompt)
    for _ in range(count):
        while len(window) > block:
            window = window[max(1, block // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1].numpy()
        token = pick(logits, ids, sampling, n, len(ids), len(prompt))
        ids.append(token)
        window.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("position", ["learned", "rope", "both", "none"])
def test_cached_batched_chunked_and_by_hand_write_the_same(position, sampling):
    """Far past block_size, from prompts shorter and longer than it.

    GPT-2's positions went wrong with a cache (mlx-lm#93), left padding changed a batch's text
    (transformers#3021): the same ids must come out on every path.
    """
    model = make_model(position=position, n_kv_head=1)
    expected = [by_hand(model, prompt, 40, sampling) for prompt in PROMPTS]
    one = TorchEngine(model)
    assert [written(one, [prompt], 40, sampling)[0] for prompt in PROMPTS] == expected
    for chunk in (1, 3, 64):
        together = TorchEngine(model, slots=len(PROMPTS), chunk=chunk)
        assert written(together, PROMPTS, 40, sampling) == expected
    uncached = TorchEngine(model, slots=len(PROMPTS), use_cache=False)
    assert written(uncached, PROMPTS, 40, sampling) == expected


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_windows(block_size):
    model = make_model(block_size=block_size)
    expected = [by_hand(model, prompt, 12, SAMPLED) for prompt in PROMPTS]
    assert written(TorchEngine(model, slots=5), PROMPTS, 12) == expected
    assert written(TorchEngine(model, slots=5, use_cache=False), PROMPTS, 12) == expected


def test_the_window_holds_the_newest_ids_and_at_least_half_a_block():
    for block, length in itertools.product(range(1, 12), range(1, 60)):
        start = window_start(length, block)
        assert start % max(1, block // 2) == 0
        assert length - start <= block
        assert start == 0 or length - start > block - max(1, block // 2)
    assert [window_start(length, 8) for length in (8, 9, 12, 13, 16, 17)] == [0, 4, 4, 8, 8, 12]


def test_rows_that_join_and_leave_write_as_if_alone():
    model = make_model()
    alone = TorchEngine(model)
    expected = [written(alone, [prompt], 25)[0] for prompt in PROMPTS]
    engine = TorchEngine(model, slots=3)
    waiting = list(enumerate(PROMPTS))
    free, active, texts = [2, 0, 1], {}, {}
    for step in range(1000):
        if waiting and free and step % 4 == 0:  # one joins now and then
            number, prompt = waiting.pop(0)
            active[number] = make_slot(free.pop(0), prompt)
        slots = list(active.values())[::-1]  # the order of a call means nothing
        if not slots:
            break
        for slot, drawn in zip(slots, engine.step(slots), strict=True):
            slot.ids.extend(drawn)
        for number, slot in list(active.items()):
            if len(slot.ids) - slot.prompt_length == 25:
                texts[number] = slot.ids[slot.prompt_length :]
                engine.release(slot.index)
                free.append(slot.index)
                del active[number]
    assert [texts[number] for number in range(len(PROMPTS))] == expected


def test_a_copy_depends_on_its_number_and_seed_not_on_its_slot():
    engine = TorchEngine(make_model(), slots=4)
    alone = {n: written(engine, [[1, 2]], 30, n=n)[0] for n in range(3)}
    assert len({tuple(ids) for ids in alone.values()}) == 3
    neighbours = [[7, 8, 9], [1, 2], [4], [1, 2]]
    assert written(engine, neighbours, 30, n=2)[1] == alone[2]
    assert written(engine, neighbours, 30, n=2)[3] == alone[2]
    assert written(engine, [[1, 2]], 30, replace(SAMPLED, seed=8))[0] != alone[0]


def test_a_slot_may_be_stepped_again_without_appending():
    """A step that failed, or whose token was thrown away, can be repeated."""
    engine = TorchEngine(make_model())
    slot = make_slot(0, [1, 2, 3])
    (first,) = engine.step([slot])
    assert engine.step([slot]) == [first]
    slot.ids.extend([*first, 4, 5])  # several at once are read at once
    again = make_slot(0, slot.ids)
    again.prompt_length = 3
    assert engine.step([slot]) == TorchEngine(make_model()).step([again])


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


def test_nothing_is_drawn_after_the_end_of_text():
    model = make_model()
    truth = by_hand(model, [1, 2], 8, SAMPLED)
    slot = make_slot(0, [1, 2])
    slot.draft, slot.eot = truth, truth[4]
    (drawn,) = TorchEngine(model).step([slot], most=8)
    assert drawn == truth[: truth.index(truth[4]) + 1]
    slot.draft, slot.left = truth, 2
    assert TorchEngine(model).step([slot], most=8) == [drawn[:2]]


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


def test_a_padded_vocabulary_is_never_drawn():
    """build-nanogpt#81: an id from the padding has no text, and the tokenizer panics."""
    model = make_model(vocab_size=32, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 100 * model.lm_head.weight[:3]
    assert max(written(TorchEngine(model), [[1]], 40)[0]) >= VOCAB  # the trap is real
    for use_cache, sampling in itertools.product((True, False), (GREEDY, SAMPLED)):
        engine = TorchEngine(model, vocab=VOCAB, use_cache=use_cache)
        assert max(written(engine, [[1]], 40, sampling)[0]) < VOCAB


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_top_reports_the_models_log_probabilities(use_cache):
    model = make_model(vocab_size=32).eval()
    engine = TorchEngine(model, vocab=VOCAB, use_cache=use_cache)
    slot = make_slot(0, [1, 2, 3], Sampling(temperature=5.0, seed=3))
    slot.logprobs = 2
    for _ in range(10):
        ((drawn,),) = engine.step([slot])
        (top,) = slot.top
        with torch.no_grad():
            plain = torch.log_softmax(model(torch.tensor([slot.ids]))[0, -1, :VOCAB], -1)
        best = plain.topk(2).indices.tolist()
        assert [token for token, _ in top] == list(dict.fromkeys([*best, drawn]))
        for token, logprob in top:
            assert logprob == pytest.approx(float(plain[token]), abs=1e-4)
        slot.ids.append(drawn)
    slot.logprobs = 0
    engine.step([slot])
    assert slot.top == [[]]


@pytest.mark.parametrize("wrong", [-1, VOCAB, 10**6])
def test_an_id_the_model_does_not_have_is_named(wrong):
    for use_cache in (True, False):
        with pytest.raises(ConfigError, match=f"no token {wrong}; its vocabulary is 0 to 28"):
            TorchEngine(make_model(), use_cache=use_cache).step([make_slot(0, [1, wrong])])


def test_damaged_weights_are_an_error_and_not_a_token():
    model = make_model()
    model.norm_f.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        TorchEngine(model).step([make_slot(0, [1])])
