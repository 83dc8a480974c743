"""Tokenizers in llama.cpp's words, held against its way of encoding written out once more here."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.exchanging.gguf_vocabulary import BYTES, LLAMA3, NEVER, QWEN2, make_vocabulary
from octavo.text.tokenizer import Tokenizer

TEXT = "She sells sea shells by the sea shore; naïve café — “déjà vu” 日本語 🌊\n"
CHAR = Tokenizer.char(TEXT)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def encoded(vocabulary, word):
    """The ids of a word that is not cut: the earliest learned merge first, then look them up."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary.merges)}
    symbols = [BYTES[byte] for byte in word.encode()]
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        symbols[at : at + 2] = ["".join(best)]
    return [ids[symbol] for symbol in symbols if symbol in ids]  # others are left out


@given(st.text(alphabet=sorted(set(TEXT)), max_size=30))
@settings(max_examples=60)
def test_characters_come_out_as_they_went_in(text):
    assert encoded(make_vocabulary(CHAR), text) == CHAR.encode(text)


@given(st.text(max_size=20))
@settings(max_examples=60)
def test_bytes_come_out_as_they_went_in(text):
    tokenizer = Tokenizer.byte()
    try:
        wanted = tokenizer.encode(text)
    except ValueError:
        return  # half a character
    assert encoded(make_vocabulary(tokenizer), text) == wanted


def test_words_come_out_as_they_went_in():
    tokenizer = Tokenizer.train_bpe([TEXT * 20], 330)
    vocabulary = make_vocabulary(tokenizer)
    for word in ("She", " sells", " shells", "naïve", " 日本語", "xyz"):
        assert encoded(vocabulary, word) == tokenizer.encode(word)
    assert vocabulary.pre == "gpt-2"
    assert vocabulary.end == tokenizer.eot_id == tokenizer.vocab_size - 1
    assert vocabulary.types[-1] == 3
    assert not vocabulary.end_is_new
    assert vocabulary.remarks == []


def test_what_a_character_vocabulary_lacks_is_left_out_and_said():
    vocabulary = make_vocabulary(CHAR)
    assert encoded(vocabulary, "seaèXЖ shore") == CHAR.encode("sea shore")
    assert "leaves characters outside the vocabulary out" in vocabulary.remarks[0]


def test_without_an_end_of_text_one_is_added():
    vocabulary = make_vocabulary(CHAR)
    assert vocabulary.end_is_new
    assert vocabulary.end == CHAR.vocab_size
    assert vocabulary.tokens[-1] == "<|endoftext|>"
    assert vocabulary.types[-1] == 3
    with_end = make_vocabulary(Tokenizer.char(TEXT, separator=True))
    assert with_end.tokens == vocabulary.tokens
    assert with_end.merges == vocabulary.merges
    assert not with_end.end_is_new


def test_there_is_always_a_merge():
    """llama.cpp does not load a file without, and `gguf` does not write an empty list."""
    assert make_vocabulary(Tokenizer.byte()).merges == [NEVER]
    assert make_vocabulary(Tokenizer.char("only ascii")).merges == [NEVER]


def spec_of(tokenizer, folder, **changes):
    tokenizer.save(folder / "tokenizer.json")
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | changes


def load(spec, folder):
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer.load(folder)


def split(regex):
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, LEVEL | {"use_regex": False}]}


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (LEVEL, "gpt-2"),
        (split(LLAMA3), "llama-bpe"),
        (split(QWEN2), "qwen2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL],
            },
            "smollm",
        ),
    ],
)
def test_cuts_go_by_llama_cpp_s_names(cut, name, tmp_path):
    spec = spec_of(Tokenizer.train_bpe([TEXT], 300), tmp_path, pre_tokenizer=cut)
    assert make_vocabulary(load(spec, tmp_path)).pre == name


@pytest.mark.parametrize("cut", [split(r"\w+"), LEVEL | {"add_prefix_space": True}])
def test_unknown_cuts_are_refused(cut, tmp_path):
    spec = spec_of(Tokenizer.train_bpe([TEXT], 300), tmp_path, pre_tokenizer=cut)
    with pytest.raises(ConfigError, match="no name that octavo knows for these cuts"):
        make_vocabulary(load(spec, tmp_path))


def test_ids_without_a_token_added_tokens_and_normalizers(tmp_path):
    spec = spec_of(Tokenizer.train_bpe([TEXT], 300), tmp_path, normalizer={"type": "NFC"})
    known = len(spec["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] += [
        {"id": known + 2, "content": "<|user|>", "special": True, **flags},
        {"id": known + 3, "content": "plain", "special": False, **flags},
    ]
    vocabulary = make_vocabulary(load(spec, tmp_path))
    assert vocabulary.tokens[known:] == [
        f"[unused {known}]", f"[unused {known + 1}]", "<|user|>", "plain",
    ]  # fmt: skip
    assert vocabulary.types[known:] == [5, 5, 3, 4]
    assert vocabulary.remarks == ["llama.cpp does not normalize texts (NFC)"]
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens)


def test_sentencepiece_is_refused(tmp_path):
    spec = spec_of(Tokenizer.train_bpe([TEXT], 300), tmp_path)
    spec["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    spec["pre_tokenizer"] = None
    with pytest.raises(ConfigError, match="SentencePiece"):
        make_vocabulary(load(spec, tmp_path))
