import copy
import json

import pytest

from octavo.errors import DataError
from octavo.text import tokenizer_json
from octavo.text.tokenizer import Tokenizer

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
CHANGES = {
    "a space in front": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "no cutting": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "a normalizer": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "a plain added token": lambda spec: spec["added_tokens"].append(
        ADDED | {"id": 999, "content": "the", "special": False}
    ),
    "whole words first": lambda spec: spec["model"].update(ignore_merges=True),
    "a missing byte": lambda spec: spec["model"]["vocab"].pop("a"),
    "a word without a merge": lambda spec: spec["model"]["vocab"].update(zebra=999),
}


@pytest.fixture
def spec(tokenizers, tmp_path):
    tokenizers["bpe"].save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("change", CHANGES)
def test_only_files_of_gpt2s_kind_go_through_tiktoken(change, spec, hard_texts):
    """Each of these files gives, or could give, other ids there than in the library."""
    from tokenizers import Tokenizer as Library

    assert tokenizer_json.is_gpt2_kind(spec)
    CHANGES[change](spec)
    assert not tokenizer_json.is_gpt2_kind(spec)
    if change != "a missing byte":  # its merges make the library refuse the file
        ours, theirs = Tokenizer(copy.deepcopy(spec)), Library.from_str(json.dumps(spec))
        for name in ("plain", "code", "blanks", "contractions"):
            assert ours.encode(hard_texts[name]) == theirs.encode(hard_texts[name]).ids


def test_bytes_with_something_in_front_are_no_plain_bytes(tokenizers, tmp_path):
    tokenizers["byte"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["pre_tokenizer"]["add_prefix_space"] = True
    assert Tokenizer(spec).encode("a") == list(b" a")


def test_characters_that_are_changed_first_are_not_supported(tokenizers, tmp_path):
    tokenizers["char"].save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match="decoder"):
        Tokenizer(spec | {"normalizer": {"type": "Lowercase"}})


def test_byte_characters_are_the_librarys_alphabet():
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.pre_tokenizers import ByteLevel

    characters = tokenizer_json.byte_characters()
    assert set(characters) == set(ByteLevel.alphabet())
    assert Decoder().decode(characters[:128]).encode() == bytes(range(128))


def test_merges_are_read_in_both_spellings(spec):
    merges = tokenizer_json.merges_of(spec)
    spec["model"]["merges"] = [list(pair) for pair in merges]
    assert tokenizer_json.merges_of(spec) == merges


def test_a_pair_needs_both_files(gpt2_files, tmp_path):
    (tmp_path / "encoder.json").write_bytes((gpt2_files / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_files / "vocab.bpe").read_bytes())
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt"):
        tokenizer_json.read_pair(tmp_path)
