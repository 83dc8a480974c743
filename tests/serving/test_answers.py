"""Tokens are given out with their characters, and cut off with them."""

from hypothesis import example, given
from hypothesis import strategies as st

from octavo.generating.sampling import Sampling
from octavo.generating.writing import Row, Slot
from octavo.serving.answers import Choice
from octavo.serving.scheduler import Written
from octavo.text.tokenizer import Tokenizer

BYTES = Tokenizer.byte()
BPE = Tokenizer.train_bpe(["the cat sat on the mat, naïve € 😀 " * 9], 290)


def written(tokenizer, text, stops):
    """What a row would hand over for these tokens, each explained by its number."""
    ids = tokenizer.encode(text)
    row = Row(0, Slot(0, [0], 0, Sampling(), 1, left=len(ids)), tokenizer, stops)
    for number, token in enumerate(ids):
        piece = row.push(token, [])
        yield Written(piece, {"number": number})
        if piece.finished:
            return


@given(
    st.text("the cat€😀ï", min_size=1, max_size=30),
    st.lists(st.text("hea t€", min_size=1, max_size=3), max_size=2),
    st.sampled_from([BYTES, BPE]),
    st.integers(1, 5),
    st.booleans(),
)
@example("the cat", ["ca"], BPE, 1, True)
@example("a€", ["€"], BYTES, 1, False)
def test_the_tokens_texts_joined_are_the_text(text, stops, tokenizer, at_once, echo):
    pieces = list(written(tokenizer, text, stops))
    prompt = tokenizer.encode("mat €")
    choice = Choice(tokenizer, prompt, [[]] * len(prompt), echo)
    shown, tokens, reasons = "", [], []
    for start in range(0, len(pieces), at_once):
        part = choice.add(pieces[start : start + at_once])
        shown += part.text
        tokens += part.tokens
        reasons.append(part.finished)
        assert "".join(token.text for token in tokens) == shown[: sum(len(t.text) for t in tokens)]
    found = [text.find(stop) for stop in stops if stop in text]
    new = shown.removeprefix("mat €") if echo else shown
    assert text.startswith(new)
    assert new == text or found
    assert not any(stop in new for stop in stops)
    assert "".join(token.text for token in tokens) == shown
    assert all(t.text for t in tokens if t.explanation) or not text.isascii()
    assert all(shown[t.offset :].startswith(t.text) for t in tokens)
    own = [t.explanation["number"] for t in tokens if t.explanation]
    assert own == list(range(len(own)))
    assert reasons[-1] == ("stop" if found else "length")
    assert not any(reasons[:-1])
