import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kit import random_model

from octavo.errors import ConfigError, NonFiniteError
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import PRESETS, Sampling
from octavo.generating.writing import STRIDE, complete, split_at_stop, write
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

SAMPLING = Sampling(seed=5)


class Table:
    """A tokenizer that is a table of byte strings; its last id, if asked for, ends a text."""

    def __init__(self, tokens, eot=False):
        self.tokens = list(tokens)
        self.eot_id = len(self.tokens) if eot else None

    def stream(self):
        return TableDecoder(self.tokens)


class TableDecoder:
    def __init__(self, tokens):
        self.tokens = tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return self.utf8.decode(self.tokens[token])

    def flush(self):
        return self.utf8.decode(b"", True)


class Script:
    """An engine that writes what it is told: rows[first id of the prompt].

    It writes ``ahead(slot)`` tokens at once, as far as the protocol lets it.
    """

    def __init__(self, rows, slots=2, ahead=lambda slot: 1):
        self.rows, self.slots, self.held, self.most, self.ahead = rows, slots, set(), 0, ahead

    def step(self, slots, most=1):
        indices = [slot.index for slot in slots]
        assert len(set(indices)) == len(indices)
        assert set(indices) <= set(range(self.slots))
        self.held.update(indices)
        self.most = max(self.most, len(indices))
        return [self.next(slot, min(most, slot.left, self.ahead(slot))) for slot in slots]

    def next(self, slot, count):
        done = len(slot.ids) - slot.prompt_length
        ids = self.rows[slot.ids[0]][done : done + count]
        ids = ids[: ids.index(slot.eot) + 1] if slot.eot in ids else ids
        slot.top = [[(token, -float(done + k))] for k, token in enumerate(ids)]
        return ids

    def release(self, index):
        self.held.discard(index)


def one_row(tokens, stop=(), count=None, eot=False):
    """The pieces of a row that writes these byte strings."""
    tokenizer = Table(tokens, eot)
    script = list(range(len(tokens) + eot))
    count = len(script) if count is None else count
    return list(write(Script({0: script}), tokenizer, [[0]], SAMPLING, count, stop))


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


short_stops = st.text("ab\n", min_size=1, max_size=5)


@st.composite
def split_texts(draw, letters="ab\n"):
    """A text and some way to break its bytes into tokens, empty ones too."""
    text = draw(st.text(letters, min_size=1, max_size=30))
    data = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=len(data))))
    return text, [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(split_texts(), short_stops)
def test_a_stop_string_is_found_wherever_tokens_begin_and_end(split, stop):
    """nanoGPT#36, #308: a stop string rarely is a token; the text must be as str.find cuts it."""
    text, tokens = split
    pieces = one_row(tokens, stop)
    found = text.find(stop)
    assert text_of(pieces) == (text if found < 0 else text[:found])
    assert [piece.finished for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finished == ("length" if found < 0 else "stop")
    read = sum(len(token) for token in tokens[: len(pieces)])
    assert found < 0 or read - len(tokens[len(pieces) - 1]) < found + len(stop) <= read
    shown = ""  # what is shown never has to be taken back, and nothing is held without need
    for piece, upto in zip(pieces[:-1], range(1, len(pieces)), strict=True):
        shown += piece.text
        so_far = b"".join(tokens[:upto]).decode()
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert stop.startswith(held)
        longer = [so_far[k:] for k in range(len(shown)) if stop.startswith(so_far[k:])]
        assert longer == []


@settings(derandomize=True, max_examples=200, deadline=None)
@given(split_texts(), st.lists(short_stops, min_size=2, max_size=4))
def test_of_several_stop_strings_the_one_completed_first_counts(split, stops):
    text, tokens = split
    expected = text
    for end in range(1, len(text) + 1):  # as if one read character by character
        complete_here = [stop for stop in stops if text[:end].endswith(stop)]
        if complete_here:
            expected = text[: end - max(map(len, complete_here))]
            break
    assert text_of(one_row(tokens, stops)) == expected


def test_what_waits_is_no_longer_than_it_must_be():
    assert split_at_stop("one two\nEN", ["\nEND", "stop"]) == ("one two", "\nEN", False)
    assert split_at_stop("one two\nEx", ["\nEND", "stop"]) == ("one two\nEx", "", False)
    assert split_at_stop("s stop it", ["\nEND", "stop"]) == ("s ", "", True)
    assert split_at_stop("anything", []) == ("anything", "", False)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(split_texts("aé€\U0001f600"))
def test_streamed_text_is_the_whole_text_and_no_character_is_split(split):
    text, tokens = split
    pieces = one_row(tokens)
    assert text_of(pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_a_character_cut_off_by_the_end_is_replaced_once():
    whole = "a€".encode()
    pieces = one_row([whole[:2], whole[2:3]])
    assert [piece.text for piece in pieces] == ["a", "\ufffd"]
    ended = one_row([whole[:2], whole[2:3]], eot=True)
    assert [piece.text for piece in ended] == ["a", "", "\ufffd"]


def test_the_end_of_text_token_ends_a_row_and_has_no_text():
    pieces = one_row([b"ab", b"c"], eot=True, count=99)
    assert [(piece.id, piece.text, piece.finished) for piece in pieces] == [
        (0, "ab", None),
        (1, "c", None),
        (2, "", "eot"),
    ]
    waiting = one_row([b"ab", b"c"], eot=True, stop="cd")  # no d can come any more
    assert [piece.text for piece in waiting] == ["ab", "", "c"]


def test_a_row_ends_after_max_new_tokens():
    assert [piece.finished for piece in one_row([b"a", b"b", b"c"], count=2)] == [None, "length"]
    (nothing,) = one_row([b"a"], count=0)
    assert (nothing.text, nothing.id, nothing.finished) == ("", None, "length")


def test_more_rows_than_slots_wait_and_every_slot_is_given_back():
    rows = {first: [(first + k) % 4 for k in range(first + 1)] + [4] * 9 for first in range(4)}
    tokenizer = Table([b"a", b"b", b"c", b"d"], eot=True)
    prompts = [[0], [3, 1], [1, 1, 1], [2], [0, 0]]
    alone = [complete(Script(rows, 1), tokenizer, [p], SAMPLING, 9)[0] for p in prompts]
    assert alone == ["a", "dabc", "bc", "cda", "a"]
    for slots in (1, 2, 3, 9):
        engine = Script(rows, slots)
        pieces = list(write(engine, tokenizer, prompts, SAMPLING, 9))
        assert [text_of(p for p in pieces if p.row == row) for row in range(5)] == alone
        assert sum(piece.finished is not None for piece in pieces) == 5
        assert engine.most == min(slots, 5)
        assert engine.held == set()


@pytest.mark.parametrize(
    "ahead", [lambda slot: 3, lambda slot: 1 + slot.index * 4, lambda slot: 99]
)
def test_an_engine_that_writes_ahead_writes_the_same_pieces(ahead):
    """What lies past a stop string is thrown away, and no row gets more than is left to it."""
    rows = {first: [(first + k) % 4 for k in range(60)] for first in range(4)}
    rows[2] = [1, 2, 1, 1, 3, 4, 0]  # ends by itself
    tokenizer, prompts = Table([b"a", b"b", b"c", b"d"], eot=True), [[0], [3, 1], [1], [2], [0]]
    for stop, count in (((), 50), ("dab", 50), ("bb", 5), ((), 1)):
        expected = list(
            write(Script(rows, 2), tokenizer, prompts, SAMPLING, count, stop, logprobs=1)
        )
        engine = Script(rows, 2, ahead)
        pieces = list(write(engine, tokenizer, prompts, SAMPLING, count, stop, logprobs=1))
        for row in range(5):
            of_row = [[p for p in those if p.row == row] for those in (pieces, expected)]
            assert of_row[0] == of_row[1]
        assert engine.held == set()


def test_the_first_piece_comes_at_once_and_rows_stay_in_step():
    asked = []

    class Spy(Script):
        def step(self, slots, most=1):
            asked.append(most)
            return super().step(slots, most)

    engine = Spy({0: [0] * 99, 1: [1] * 99}, slots=2, ahead=lambda slot: (7, 4)[slot.index])
    pieces = write(engine, None, [[0], [1]], SAMPLING, 20)
    assert [next(pieces).row for _ in range(13)] == [0, 1] * 5 + [0, 0, 0]
    assert asked == [1, STRIDE]
    pieces.close()
    assert engine.held == set()


def test_copies_are_numbered_within_their_prompt():
    numbers = []

    class Spy(Script):
        def step(self, slots, most=1):
            numbers.extend((slot.ids[0], slot.n) for slot in slots)
            return super().step(slots, most)

    engine = Spy({0: [0], 1: [1]}, slots=6)
    texts = complete(engine, Table([b"x", b"y"]), [[0], [1]], SAMPLING, 1, n=3)
    assert texts == ["x", "x", "x", "y", "y", "y"]
    assert numbers == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_an_engine_that_fails_and_a_reader_who_leaves_free_the_slots():
    class Failing(Script):
        def step(self, slots, most=1):
            super().step(slots, most)
            raise NonFiniteError("the model's logits are not finite")

    failing = Failing({0: [0] * 9})
    with pytest.raises(NonFiniteError):
        complete(failing, Table([b"a"]), [[0], [0]], SAMPLING, 9)
    assert failing.held == set()
    engine = Script({0: [0] * 9})
    pieces = write(engine, Table([b"a"]), [[0], [0]], SAMPLING, 9)
    next(pieces)
    assert engine.held == {0, 1}
    pieces.close()
    assert engine.held == set()


def test_without_a_tokenizer_pieces_have_ids_and_no_text():
    pieces = list(write(Script({0: [5, 6]}), None, [[0]], SAMPLING, 2))
    assert [(piece.id, piece.text, piece.finished) for piece in pieces] == [
        (5, "", None),
        (6, "", "length"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; give 0 or more"),
        ({"n": 0}, "n is 0; give 1 or more"),
        ({"logprobs": -2}, "logprobs is -2; give 0 or more"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"stop": "x", "tokenizer": None}, "the stop string 'x' needs text"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(change, message):
    good = {"tokenizer": Table([b"a"]), "prompts": [[0]], "sampling": SAMPLING, "max_new_tokens": 1}
    with pytest.raises(ConfigError, match=message):  # before the first piece is asked for
        write(Script({0: [0]}), **{**good, **change})


@pytest.fixture(scope="module")
def model():
    """A tiny model over bytes, whose text is mostly invalid UTF-8."""
    return random_model(ModelConfig(vocab_size=256, block_size=16, n_layer=1, n_head=2, d_model=16))


BYTES = Tokenizer.byte()
PROMPTS = [[72], [72, 101, 108], list(range(40)), [72]]


@pytest.mark.parametrize("sampling", PRESETS.values(), ids=PRESETS)
def test_a_rows_text_is_the_same_alone_in_a_batch_and_streamed(model, sampling):
    alone = [complete(TorchEngine(model), BYTES, [p], sampling, 30, n=2) for p in PROMPTS]
    flat = [text for copies in alone for text in copies]
    assert flat[:2] == flat[6:]  # the same prompt, seed and copy: the same text
    for slots in (2, 3, 8):
        engine = TorchEngine(model, slots)
        assert complete(engine, BYTES, PROMPTS, sampling, 30, n=2) == flat
        ids, streamed = [[] for _ in flat], [""] * len(flat)
        for piece in write(engine, BYTES, PROMPTS, sampling, 30, n=2, logprobs=3):
            ids[piece.row].append(piece.id)
            streamed[piece.row] += piece.text
            assert piece.id in [token for token, _ in piece.top]
        assert streamed == flat == [BYTES.decode(row) for row in ids]


def test_one_rows_stop_string_does_not_touch_its_neighbours(model):
    engine = TorchEngine(model, slots=4)
    whole = complete(engine, BYTES, PROMPTS, SAMPLING, 40)
    stop = whole[1][7:10]
    stopped = complete(engine, BYTES, PROMPTS, SAMPLING, 40, stop)
    assert stopped == [text.split(stop)[0] for text in whole]
    assert len(stopped[1]) <= 7 < len(stopped[0])
