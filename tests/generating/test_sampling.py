import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from octavo.errors import ConfigError, NonFiniteError
from octavo.generating import sampling
from octavo.generating.sampling import PRESETS, Sampling, filters, pick, probabilities, uniform

GREEDY = PRESETS["greedy"]
NAMES = [field.name for field in dataclasses.fields(Sampling)]


def random_logits(seed, size=97, scale=3.0):
    return np.random.default_rng(seed).standard_normal(size) * scale


def by_hugging_face(warpers, logits, history):
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for warper in warpers:
        scores = warper(torch.tensor([history]), scores)
    return scores[0].numpy()


def last(logits, history, **settings):
    *_, (name, filtered) = filters(logits, history, Sampling(**settings))
    return name, filtered


WARPERS = {
    "repetition_penalty": (hf.RepetitionPenaltyLogitsProcessor, [0.5, 1.3, 5.0]),
    "temperature": (hf.TemperatureLogitsWarper, [0.01, 0.7, 3.0]),
    "top_k": (hf.TopKLogitsWarper, [1, 5, 97, 1000]),
    "top_p": (hf.TopPLogitsWarper, [0.0, 0.01, 0.5, 0.9, 0.999]),
    "min_p": (hf.MinPLogitsWarper, [0.01, 0.2, 1.0]),
    "typical_p": (hf.TypicalLogitsWarper, [0.01, 0.3, 0.9, 0.999]),
}


@pytest.mark.parametrize("name", WARPERS)
def test_each_filter_equals_hugging_faces(name):
    warper, values = WARPERS[name]
    for value in values:
        for seed in range(20):
            logits, history = random_logits(seed, scale=1 + seed % 7), [3, 5, 5, seed]
            ours, theirs = last(logits, history, **{name: value}), [warper(value)]
            assert ours[0] == name
            np.testing.assert_allclose(ours[1], by_hugging_face(theirs, logits, history), 1e-12)


def test_the_chain_applies_the_filters_in_hugging_faces_order():
    chain = {
        "repetition_penalty": 1.2,
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical_p": 0.9,
    }
    for seed in range(50):
        logits, history = random_logits(seed), [1, 2, 3, 50]
        theirs = [WARPERS[name][0](value) for name, value in chain.items()]
        expected = by_hugging_face(theirs, logits, history)
        np.testing.assert_allclose(last(logits, history, **chain)[1], expected, 1e-12)
        softmax = torch.softmax(torch.tensor(expected), -1).numpy()
        ours = probabilities(logits, history, Sampling(**chain))
        np.testing.assert_allclose(ours, softmax, 1e-12)


def test_filters_tell_what_each_one_cut_away():
    report = dict(filters(np.log([0.5, 0.3, 0.15, 0.05]), [], Sampling(top_k=3, top_p=0.6)))
    kept = {name: np.isfinite(logits).tolist() for name, logits in report.items()}
    assert kept == {
        "model": [True, True, True, True],
        "top_k": [True, True, True, False],
        "top_p": [True, True, False, False],
    }


def test_filters_leave_the_models_logits_alone():
    logits = random_logits(0)
    before = logits.copy()
    everything = Sampling(
        temperature=0.5,
        top_k=9,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.5,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=1.0,
    )
    pick(logits, [1, 2], everything, 0, 2)
    assert (logits == before).all()


def test_top_k_keeps_all_that_tie_with_the_kth():
    logits = [1.0, 3.0, 2.0, 2.0, 2.0, 0.0]
    assert np.flatnonzero(np.isfinite(last(logits, [], top_k=2)[1])).tolist() == [1, 2, 3, 4]
    hugging_face = by_hugging_face([hf.TopKLogitsWarper(2)], logits, [])
    np.testing.assert_array_equal(last(logits, [], top_k=2)[1], hugging_face)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, {0}), (0.5, {0}), (0.51, {0, 2}), (0.75, {0, 2}), (0.8, {0, 1, 2})]
)
def test_top_p_keeps_the_token_that_crosses_p(p, kept):
    # Shares 1/2, 1/8, 1/4, 1/8 are exact in binary; of the equal ones the lower id goes first.
    logits = np.log([0.5, 0.125, 0.25, 0.125])
    assert set(np.flatnonzero(np.isfinite(sampling.top_p(logits, p)))) == kept


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.integers(-20, 8), min_size=1, max_size=60), st.floats(0, 1), st.booleans())
def test_top_p_equals_sorting_the_whole_vocabulary(levels, p, some_ruled_out):
    # Whole numbers make ties; the threshold in front of the sort must not change what is kept.
    logits = np.array(levels, dtype=np.float64)
    if some_ruled_out:
        logits[logits < logits.max() - 12] = -np.inf
    weights = np.exp(logits - logits.max())
    order = sorted(range(len(levels)), key=lambda i: (-weights[i], i))
    kept, held = set(), 0.0
    for i in order:
        if held >= p * weights.cumsum()[-1] and kept:
            break
        kept.add(i)
        held += weights[i]
    ours = set(np.flatnonzero(np.isfinite(sampling.top_p(logits, p))).tolist())
    # Only ids without weight may differ: they add nothing to what is held.
    assert {i for i in ours ^ kept if weights[i] > 0} == set()


def test_presence_and_frequency_count_written_tokens_only():
    """OpenAI's definition; a prompt that says "the" must not forbid the text to say it."""
    settings = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    *_, (name, logits) = filters(np.zeros(5), [0, 0, 1, 2, 2, 2], settings, prompt_length=2)
    assert name == "presence_and_frequency_penalty"
    assert logits.tolist() == [0.0, -0.75, -1.25, 0.0, 0.0]


def test_repetition_penalty_counts_the_prompt_and_ignores_padded_ids():
    settings = Sampling(repetition_penalty=2.0)
    *_, (_, logits) = filters([1.0, -1.0, 1.0], [0, 1, 1, 7], settings, prompt_length=3)
    assert logits.tolist() == [0.5, -2.0, 1.0]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9])
def test_cold_sampling_is_greedy_and_takes_the_lowest_id_among_equals(temperature):
    huge = np.array([0.0, 3e38, -3e38, 3e38], dtype=np.float32)
    cold = Sampling(temperature=temperature, top_k=3, top_p=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an overflow would warn
        assert {pick(huge, [], cold, 0, position) for position in range(20)} == {1}
        assert probabilities(huge, [], cold).tolist() == [0, 1, 0, 0]


def test_the_hottest_and_the_coldest_temperatures_do_not_overflow():
    logits = np.array([3e38, -3e38, 0.0], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (1e-5, 1.0, 1000.0):
            assert probabilities(logits, [], Sampling(temperature=temperature)).sum() == 1


def test_edges_of_every_setting():
    logits = random_logits(1, size=8)
    best = int(logits.argmax())
    plain = probabilities(logits, [], Sampling())
    for off in ({"top_k": 0}, {"top_k": 10**9}, {"top_p": 1.0}, {"min_p": 0.0}, {"typical_p": 1.0}):
        assert (probabilities(logits, [], Sampling(**off)) == plain).all()
    for only_best in ({"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}):
        assert probabilities(logits, [], Sampling(**only_best)).argmax() == best
        assert (probabilities(logits, [], Sampling(**only_best)) > 0).sum() == 1
    assert (probabilities(logits, [], Sampling(typical_p=0.0)) > 0).sum() == 1


@pytest.mark.parametrize(
    "bad",
    [
        *({name: value} for name in NAMES for value in (math.nan, math.inf, "warm", None, True)),
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"seed": -1},
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))} is .*; give a [^\n]*$"):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [[0, math.nan], [0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("how", [GREEDY, Sampling(), PRESETS["nucleus"]])
def test_logits_that_are_not_finite_are_refused(bad, how):
    with pytest.raises(NonFiniteError, match="not finite"):
        pick(bad, [], how, 0, 0)


def test_an_id_ruled_out_is_never_drawn():
    logits = [0.0, -math.inf, 0.0]
    drawn = {pick(logits, [], Sampling(), 0, position) for position in range(200)}
    assert drawn == {0, 2}


def test_presets_are_the_promised_ones():
    conservative = Sampling(temperature=0.6, top_k=40)
    nucleus, greedy = Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=0.0)
    assert dict(conservative=conservative, nucleus=nucleus, greedy=greedy) == PRESETS


def test_splitmix64_is_the_published_generator():
    # The stream of seed 1234567 as the reference C code prints it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [sampling.splitmix64(1234567, i) for i in range(3)] == published


GOLDEN = {
    (0, 0, 0): "0x1.4e0dba5e9a32fp-1",
    (0, 0, 1): "0x1.6705460be8829p-1",
    (0, 1, 0): "0x1.1adcf9e7c30dep-2",
    (1, 0, 0): "0x1.7906ac21d0e58p-2",
    (1337, 0, 5): "0x1.debaea75f9315p-1",
    (1337, 2, 1000): "0x1.b97d6cbb202bfp-1",
    (2**64 - 1, 7, 2**31): "0x1.e502486c30000p-3",
}


def test_uniform_keeps_its_golden_values():
    """The C++ engine must give the same numbers, so these never change."""
    assert {key: uniform(*key).hex() for key in GOLDEN} == GOLDEN


def test_uniforms_are_even_and_independent_across_seed_copy_and_position():
    draws = np.array(
        [[[uniform(s, n, p) for p in range(40)] for n in range(25)] for s in range(25)]
    )
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 100, (0, 1))[0]
    assert chi_square(counts, np.full(100, draws.size / 100)) < 149  # 99 degrees, p = 0.001
    for axis in range(3):  # neighbours along each key, in a 10 x 10 table
        a, b = np.delete(draws, -1, axis), np.delete(draws, 0, axis)
        table = np.histogram2d(a.ravel(), b.ravel(), 10, ((0, 1), (0, 1)))[0]
        assert chi_square(table, a.size / 100) < 149


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(typical_p=0.7),
        Sampling(temperature=1.5, repetition_penalty=1.5, presence_penalty=0.3, top_k=6),
    ],
    ids=str,
)
def test_draws_follow_the_enumerated_probabilities(how):
    logits, history = random_logits(5, size=8, scale=1.5), [2, 4]
    expected = probabilities(logits, history, how) * 4000
    counts = np.zeros(8)
    for position in range(4000):
        counts[pick(logits, history, how, 0, position)] += 1
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    assert chi_square(counts[possible], expected[possible]) < 24.3  # 7 degrees, p = 0.001


def test_a_draw_is_the_inverse_cdf_over_ids_in_order(monkeypatch):
    logits = np.log([0.25, 0.125, 0.5, 0.125])
    edges = {0.0: 0, 0.2499: 0, 0.25: 1, 0.3749: 1, 0.375: 2, 0.8749: 2, 0.875: 3, 1 - 2**-53: 3}
    for u, token in edges.items():
        monkeypatch.setattr(sampling, "uniform", lambda *key, u=u: u)
        assert pick(logits, [], Sampling(), 0, 0) == token


def test_a_draw_can_be_repeated_in_plain_arithmetic():
    """What the C++ engine will do: one sum after the other, no vector, no sorting."""
    for seed in range(200):
        logits = random_logits(seed, size=300)
        top = max(logits)
        weights = [float(np.exp(x - top)) for x in logits]
        running = list(itertools.accumulate(weights))
        target = uniform(seed, 3, seed) * running[-1]
        token = next(i for i, c in enumerate(running) if c > target)
        assert pick(logits, [], Sampling(seed=seed), 3, seed) == token


def test_top_logprobs_are_the_models_own_and_hold_the_drawn_token():
    logits = random_logits(2, size=20)
    reference = torch.log_softmax(torch.tensor(logits), -1)
    values, ids = reference.topk(3)
    worst = int(logits.argmin())
    expected = [*zip(ids.tolist(), values.tolist(), strict=True), (worst, float(reference[worst]))]
    ours = sampling.top_logprobs(logits, 3, worst)
    assert [i for i, _ in ours] == [i for i, _ in expected]
    np.testing.assert_allclose([p for _, p in ours], [p for _, p in expected], 1e-12)
    assert len(sampling.top_logprobs(logits, 3, int(ids[1]))) == 3
    assert [i for i, _ in sampling.top_logprobs([1.0, 1.0, 1.0], 2, 0)] == [0, 1]
