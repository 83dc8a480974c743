"""Hashes say what comparing the texts and the runs of tokens themselves says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text import overlap
from octavo.text.overlap import N, NGrams, Seen, share_found, stretches
from octavo.text.token_files import Tokens

EOT = 3
NONE = np.array([], dtype=np.uint64)


def runs(rows, eot=EOT):
    """The different runs of 13 ids that no end of a document goes through."""
    rows = [tuple(map(int, row)) for row in rows]
    every = {row[i : i + N] for row in rows for i in range(len(row) - N + 1)}
    return {run for run in every if eot not in run}


def rows_of(draw, size):
    ids = st.lists(st.integers(0, 4), min_size=0, max_size=size)
    return [np.array(row, dtype=np.uint16) for row in draw(st.lists(ids, min_size=1, max_size=4))]


@pytest.fixture
def _short(monkeypatch):
    """Runs that go over every border: of what is read at a time, and hashed at a time."""
    monkeypatch.setattr(overlap, "STRETCH", 40)
    monkeypatch.setattr(overlap, "CHUNK", 16)


@pytest.mark.usefixtures("_short")
@settings(max_examples=150)
@given(st.data())
def test_shares_are_those_of_comparing_every_run(data):
    """Few different ids, so that much is found; training lies in several files."""
    text, train = rows_of(data.draw, 120), rows_of(data.draw, 200)
    copied = data.draw(st.integers(0, 60))
    train.append(np.concatenate([train[0], text[0][:copied]]).astype(np.uint16))
    whole = Tokens(train)
    found = share_found({"it": text}, whole, EOT, threads=2)["it"]
    wanted, there = runs(text), runs([np.asarray(whole)], eot=None)
    assert found["ngrams"] == len(wanted)
    expected = len(wanted & there) / len(wanted) if wanted else None
    assert found["share"] == pytest.approx(expected)


@pytest.mark.usefixtures("_short")
@given(length=st.integers(0, 200), size=st.integers(1, 60))
def test_stretches_hold_every_run_once(length, size):
    row = np.arange(length)
    firsts = [ids[i] for ids in stretches(row, size) for i in range(len(ids) - N + 1)]
    assert firsts == list(range(max(length - N + 1, 0)))


def test_ids_of_any_size_make_different_hashes():
    """A weak hash takes rows for equal that differ in a high bit, in order, or by a shift."""
    rng = np.random.default_rng(0)
    row = rng.integers(0, 2**16, 20_000).astype(np.uint32)
    text = [row, row[::-1], row + 2**16, row * 2, row ^ 1, np.sort(row), np.repeat(row[:2000], 2)]
    assert len(NGrams(text, None).hashes) == len(runs(text, eot=None))


def test_of_too_many_runs_a_fair_sample_is_kept():
    rng = np.random.default_rng(1)
    text, other = (rng.integers(0, 1000, 60_000).astype(np.uint16) for _ in range(2))
    train = Tokens([np.concatenate([other, text[:15_000]])])  # a quarter of the text
    every = NGrams([text], None)
    kept = NGrams([text[:30_000], text[30_000 - N + 1 :]], None, most=5000)
    assert 2500 < len(kept.hashes) <= 5000
    assert kept.sampled == 1 / 16
    assert set(kept.hashes) < set(every.hashes)
    for ngrams in (every, kept):
        for ids in stretches(train):
            ngrams.look_in(overlap._hashes(ids))
    assert every.share == pytest.approx(0.25, abs=1e-3)
    assert kept.share == pytest.approx(0.25, abs=0.03)


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12))
def test_seen_is_a_set(batches):
    seen, before = Seen(NONE), set()
    for batch in batches:
        expected = []
        for number in batch:
            expected.append(number in before)
            before.add(number)
        assert seen.add(np.array(batch, dtype=np.uint64)).tolist() == expected
    again = Seen(np.array(sorted(before), dtype=np.uint64))
    assert again.add(np.array(sorted(before), dtype=np.uint64)).all()


def test_a_million_documents_stay_in_few_rows():
    """Every meeting looks through all rows: their number must not grow with the meetings."""
    seen, rng = Seen(NONE), np.random.default_rng(2)
    for _ in range(500):
        seen.add(rng.integers(0, 2**63, 2000).astype(np.uint64))
    assert len(seen._rows) <= 12
    assert sum(map(len, seen._rows)) == 1_000_000
