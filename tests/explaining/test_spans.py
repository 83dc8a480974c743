"""Every longest piece that stands in the other text is found, and nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.explaining import spans as module
from octavo.explaining.spans import SHORTEST, find_spans

PROSE = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 3


def by_hand(text: bytes, corpus: bytes) -> list[tuple[int, int]]:
    """From every place the longest piece that stands there, without those within another."""
    found = []
    for start in range(len(text)):
        end = start
        while end < len(text) and text[start : end + 1] in corpus:
            end += 1
        if end - start >= SHORTEST and (not found or end > found[-1][1]):
            found.append((start, end))
    return found


def check(text: bytes, corpus: bytes) -> list[tuple[int, int]]:
    spans = find_spans(text, corpus)
    for span in spans:
        assert (
            corpus[span.place : span.place + span.end - span.start] == text[span.start : span.end]
        )
    found = [(span.start, span.end) for span in spans]
    assert found == by_hand(text, corpus)
    return found


WORDS = [b"abcdefgh" * 4, b"Zyxw" * 7, b"q", b"--" * 14, b" a", PROSE[:50]]
pieces = st.lists(st.sampled_from(WORDS), max_size=5)


@settings(max_examples=100)
@given(
    text=pieces.map(b"".join), corpus=pieces.map(b"".join), stretch=st.sampled_from([20, 1 << 16])
)
def test_spans_are_those_of_a_search_by_hand(text, corpus, stretch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRETCH", stretch)  # a piece goes over the end of a stretch
        check(text, corpus)


@settings(max_examples=50)
@given(st.binary(max_size=80), st.binary(max_size=80), st.integers(SHORTEST - 2, SHORTEST + 2))
def test_the_shortest_piece_is_one_of_24_bytes(before, after, length):
    piece = bytes(range(100, 100 + length))
    text, corpus = b"\x00" + piece + b"\x01", before + b"\x02" + piece + b"\x03" + after
    assert ((1, 1 + length) in check(text, corpus)) == (length >= SHORTEST)


def test_two_pieces_may_overlap():
    one, other = bytes(range(0, 40)), bytes(range(20, 60))
    assert check(bytes(range(60)), one + b"\xff" + other) == [(0, 40), (20, 60)]


def test_a_piece_that_stands_twice_in_the_text_is_two_spans():
    piece = PROSE[:40]
    assert check(piece + b"|" + piece, b"..." + piece) == [(0, 40), (41, 81)]


def test_the_whole_text():
    assert check(PROSE, b"x" * 1000 + PROSE) == [(0, len(PROSE))]


@pytest.mark.parametrize(
    ("text", "corpus"), [(b"", b""), (b"abc", PROSE), (PROSE, b""), (b"", PROSE)]
)
def test_nothing_is_found_in_nothing(text, corpus):
    assert check(text, corpus) == []


def test_rulers_by_the_thousand_are_looked_at_once(monkeypatch):
    """Rulers and indentation matched at every place, each compared anew."""
    looked = []
    plain = module._pieces
    monkeypatch.setattr(module, "_pieces", lambda *a: looked.append(a) or plain(*a))
    corpus = b"".join(b"%d\n%s\n" % (n, b"-" * 60) for n in range(2000))
    assert [s.end - s.start for s in find_spans(b"-" * 40 + b"\n!", corpus)] == [41]
    assert len(looked) < 5
