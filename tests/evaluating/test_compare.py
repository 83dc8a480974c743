"""Intervals cover what they say, pairs cancel what is hard for both, S0's claim is no evidence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.evaluating import compare
from octavo.evaluating.compare import (
    Noise,
    difference,
    flips,
    published,
    published_sentence,
    resample,
    round_up,
    seed_noise,
    sentence,
)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(compare, "RESAMPLES", 1000)


def two_sides(generator, seeds=1, units=60, gain=0.0, seed_noise=0.0):
    """Losses of two methods on windows of very different difficulty."""
    hard = generator.normal(3, 1, units)
    taste = generator.normal(gain, 0.2, units)  # windows that suit one of them better
    runs = generator.normal(0, seed_noise, (2, seeds, 1)) + generator.normal(
        0, 0.05, (2, seeds, units)
    )
    return hard + taste + runs[0], hard + runs[1]


def test_the_claim_of_s0_is_not_evidence():
    """RoPE took HellaSwag from 0.3036 to 0.3074, which the README called an improvement."""
    result = published(0.3036, 0.3074, 10_042)
    assert result.z == pytest.approx(0.58, abs=0.005)
    assert result.errors[0] == pytest.approx(0.0046, abs=5e-5)
    assert result.p == pytest.approx(2 * (1 - 0.72), abs=0.01)
    assert result.items_needed_paired == pytest.approx(81_000, rel=0.01)
    assert result.detectable_paired == pytest.approx(0.011, abs=0.0005)
    said = published_sentence(result, 0.3036, 0.3074, 10_042)
    assert "not evidence" in said
    assert "z = 0.58" in said
    assert "82,000" in said  # two digits, rounded up: an estimate should not look exact


def test_a_large_published_difference_is_evidence():
    said = published_sentence(published(0.2955, 0.3842, 10_042), 0.2955, 0.3842, 10_042)
    assert "that they differ" in said
    assert "not evidence" not in said


@pytest.mark.parametrize("scores", [(30.36, 30.74), (0.0, 0.5), (0.3, 1.0)])
def test_scores_in_per_cent_are_not_taken_for_shares(scores):
    with pytest.raises(ConfigError, match="shares between 0 and 1"):
        published(*scores, 10_042)


def test_pairs_cancel_what_is_hard_for_both():
    """Unpaired, windows that differ by whole nats would drown two hundredths."""
    generator = np.random.default_rng(0)
    hard = generator.normal(3, 1, 400)
    a, b = hard + generator.normal(0.02, 0.05, 400), hard
    result = difference(a[None], b[None], np.ones(400))
    assert result.verdict == "better"
    assert result.gain == pytest.approx((a - b).mean())
    assert result.high - result.low < 0.015
    unpaired = 2 * 1.96 * math.hypot(a.std(), b.std()) / math.sqrt(400)
    assert result.high - result.low < unpaired / 10


def test_the_gain_is_a_ratio_of_sums_and_its_error_the_linear_one():
    generator = np.random.default_rng(1)
    weights = generator.integers(5, 50, 300).astype(float)
    gains = 0.1 * weights + generator.normal(0, 2, 300)
    draws = resample(gains, weights)
    ratio = gains.sum() / weights.sum()
    rest = gains - ratio * weights
    assert draws.mean() == pytest.approx(ratio, abs=0.001)
    assert draws.std() == pytest.approx(rest.std() * math.sqrt(300) / weights.sum(), rel=0.05)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.booleans())
def test_exchanging_the_sides_mirrors_the_answer(seed, seeds_are_chance):
    generator = np.random.default_rng(seed)
    a, b = two_sides(generator, seeds=3, gain=0.05)
    noise = seed_noise(a.mean(1), b.mean(1), paired=True) if seeds_are_chance else None
    one, other = (difference(*pair, np.ones(60), noise) for pair in ((a, b), (b, a)))
    assert one.gain == pytest.approx(-other.gain)
    assert one.low == pytest.approx(-other.high, abs=0.01 + 0.1 * (one.high - one.low))
    assert one == difference(a, b, np.ones(60), noise)  # nothing is drawn anew


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_over_three_seeds_cover_the_truth(few_resamples, paired):
    """Resampling three seeds covers at most three times in four; windows alone hardly ever."""
    generator = np.random.default_rng(2)
    covered = blind = 0
    for _ in range(100):
        a, b = two_sides(generator, seeds=3, seed_noise=0.3)
        figures = a.mean(1), b.mean(1)
        noise = seed_noise(*figures, paired)
        with_seeds, without = (difference(a, b, np.ones(60), n) for n in (noise, None))
        covered += with_seeds.low <= 0 <= with_seeds.high
        blind += without.low <= 0 <= without.high
    assert covered >= 91  # 95 % but for the luck of 100 trials
    assert blind < 50


def test_the_evidence_said_to_be_needed_is_enough_four_times_in_five(few_resamples):
    generator = np.random.default_rng(3)
    true, spread = 0.02, 0.2
    sample = generator.normal(0, spread, 200)
    sample += true - sample.mean()
    asked = difference(sample[None], np.zeros((1, 200)), np.ones(200))
    assert asked.verdict == "unknown"
    assert asked.detectable == pytest.approx(2.8 * spread / math.sqrt(200), rel=0.15)
    units = round(200 * asked.times_needed)
    found = 0
    for _ in range(150):
        again = generator.normal(true, spread, (1, units))
        found += difference(again, np.zeros((1, units)), np.ones(units)).verdict == "better"
    assert 0.68 <= found / 150 <= 0.92


def test_more_seeds_are_asked_for_where_seeds_are_the_chance():
    a, b = np.full((2, 3, 50), 3.0)
    a = a + np.array([[0.0], [0.1], [0.2]]) + np.linspace(0, 0.01, 50)
    noise = seed_noise(a.mean(1), b.mean(1), paired=True)
    result = difference(a, b, np.ones(50), noise)
    assert noise == Noise(pytest.approx(0.1 / math.sqrt(2)), 2)
    assert result.verdict == "unknown"
    said = sentence(result, "A", "B", "nats a token", "windows")
    assert said.startswith("cannot tell with this much evidence: B is ahead of A by 0.11 nats")
    assert "seeds a side" in said
    # Seven pairs with that spread: t with 6 degrees, 2.45, and power 0.84, times 0.1 / sqrt(7).
    assert 6 <= result.times_needed * 3 <= 12


def test_seeds_that_are_not_the_same_are_pooled():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0])
    assert seed_noise(a, b, paired=False) == Noise(pytest.approx(math.sqrt((2 + 2) / 3)), 3)
    assert seed_noise(a[:1], b[:1], paired=False) is None
    assert seed_noise(a[:1], b[:1], paired=True) is None
    # What a seed does to both sides is no noise.
    assert seed_noise(a, a + 5, paired=True) == Noise(pytest.approx(0), 2)


def test_the_same_figures_are_exactly_equal():
    a = np.random.default_rng(4).normal(3, 1, (1, 30))
    result = difference(a, a.copy(), np.ones(30))
    assert (result.gain, result.low, result.high, result.verdict) == (0, 0, 0, "identical")
    assert "exactly 0" in sentence(result, "A", "B", "nats a token", "windows")


def test_words_name_the_better_side_first_and_its_interval():
    a, b = np.full((1, 40), 2.0) + np.linspace(-0.04, 0.04, 40), np.full((1, 40), 2.5)
    said = sentence(difference(a, b, np.ones(40)), "A", "B", "nats a token", "windows")
    assert said.startswith("A is better than B by 0.500 nats a token, 95 % interval [0.49")
    right = sentence(
        difference(a, b, np.ones(40), lower_is_better=False), "A", "B", "points", "items"
    )
    assert right.startswith("B is better than A by 0.500 points")


def test_sides_that_are_level_are_not_said_to_lead():
    a, b = np.array([[100.0, 0, 100, 0]]), np.array([[0.0, 100, 0, 100]])
    result = difference(a, b, np.ones(4), lower_is_better=False)
    assert result.verdict == "unknown"
    assert "A and B are level" in sentence(result, "A", "B", "points", "items")


def test_right_and_wrong_answers_count_where_they_differ():
    a, b = np.array([100, 0, 100, 0, 0.0]), np.array([100, 100, 0, 100, 0.0])
    assert flips(a, b) == (1, 2)


def test_one_window_says_nothing():
    with pytest.raises(ConfigError, match="single window"):
        difference(np.ones((1, 1)), np.ones((1, 1)), np.ones(1))


def test_estimates_have_two_digits():
    assert [round_up(n) for n in (0.2, 7, 81_532.7, 1_001)] == [1, 7, 82_000, 1_100]
