"""The arithmetic coder gives back every symbol, and spends on it what its probability says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.explaining.coder import TOTAL, Counts, Decoder, Encoder, cumulative


def table_of(shares):
    return np.cumsum([0, *shares])


def coded(tables, symbols):
    encoder = Encoder()
    for table, symbol in zip(tables, symbols, strict=True):
        encoder.code(table, symbol)
    return encoder.finish()


def read(code, tables):
    decoder = Decoder(code)
    return [decoder.code(table) for table in tables]


def bits(tables, symbols):
    pairs = zip(tables, symbols, strict=True)
    return -sum(math.log2((t[s + 1] - t[s]) / t[-1]) for t, s in pairs)


shares = st.lists(st.integers(1, 50) | st.integers(1, 2**28), min_size=1, max_size=9)


@given(st.lists(st.tuples(shares, st.integers(0, 8)), max_size=60))
@settings(max_examples=150)
def test_what_was_written_is_read(steps):
    tables = [table_of(share) for share, _ in steps]
    symbols = [number % len(share) for share, number in steps]
    assert read(coded(tables, symbols), tables) == symbols


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("depth", [3, 40, 400])
def test_a_carry_runs_through_many_bytes(last, depth):
    """The middle third holds 1/2 for ever: 0.0111... until the end says which side it is."""
    tables, symbols = [table_of([1, 1, 1])] * (depth + 1), [1] * depth + [last]
    assert read(coded(tables, symbols), tables) == symbols


def test_the_least_probable_symbol_of_a_large_vocabulary_is_read_too():
    tables = [table_of([1] * 99_999 + [TOTAL])] * 50
    symbols = [0, 99_999, 99_998] * 16 + [5, 5]
    assert read(coded(tables, symbols), tables) == symbols


def test_a_text_takes_its_surprise_and_no_more_than_a_thousandth_above():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (5_000, 80)).astype(np.float32)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    symbols = [int(rng.choice(80, p=p / p.sum())) for p in np.exp(logprobs)]
    surprise = -logprobs[np.arange(5_000), symbols].sum() / math.log(2)
    tables = cumulative(logits)
    code = coded(tables, symbols)
    assert surprise / 8 - 1 < len(code) < surprise / 8 * 1.001 + 3
    assert bits(tables, symbols) <= 8 * len(code) <= bits(tables, symbols) + 16
    assert read(code, tables) == symbols


def test_shares_are_probabilities_and_nothing_is_impossible():
    logits = np.array([[0.0, -1.0, -8.0, -90.0, -np.inf, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    tables = cumulative(logits)
    assert (np.diff(tables) >= 1).all()
    assert tables[:, 0].tolist() == [0, 0]
    found = np.diff(tables)[0] / tables[0, -1]
    wanted = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert found == pytest.approx(wanted, rel=0.003, abs=2e-8)
    assert len(set(np.diff(tables)[1])) == 1
    assert (tables[:, -1] <= TOTAL + 6).all()


def test_the_integers_are_the_same_on_every_machine():
    """They are part of the format: a file written anywhere must be read anywhere."""
    logits = np.float32([[0.0, -0.1, -1.0, -10.0, -30.0]])
    assert cumulative(logits).tolist() == [
        [0, 117973915, 224991131, 268430097, 268435458, 268435459]
    ]


def test_what_never_happens_costs_next_to_nothing():
    encoder, counts = Encoder(), Counts(2)
    for _ in range(50_000):
        counts.code(encoder, 0)
    assert len(encoder.finish()) <= 4


def test_counts_learn_what_comes():
    rng = np.random.default_rng(0)
    symbols = rng.choice([7, 8, 200], size=3_000, p=[0.5, 0.25, 0.25]).tolist()
    encoder, counts = Encoder(), Counts(257)
    for symbol in symbols:
        counts.code(encoder, symbol)
    code = encoder.finish()
    assert len(code) < 3_000 * 1.5 / 8 * 1.03 + 40
    decoder, counts = Decoder(code), Counts(257)
    assert [counts.code(decoder, None) for _ in symbols] == symbols
