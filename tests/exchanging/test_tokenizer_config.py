"""What goes into tokenizer_config.json, and what of a foreign one is taken."""

import json

import pytest

from octavo.errors import CheckpointError, DataError
from octavo.exchanging.tokenizer_config import full_settings, read_settings, special_id
from octavo.text.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write(folder, **content):
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_tokens_and_template_are_taken_and_nothing_that_names_code(tmp_path):
    write(
        tmp_path,
        bos_token="<s>",
        eos_token={"__type": "AddedToken", "content": "</s>", "lstrip": False},
        unk_token=None,
        pad_token=7,
        chat_template=TEMPLATE,
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]},
        tokenizer_class="EvilTokenizer",
    )
    assert read_settings(tmp_path) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }


def test_a_template_in_a_file_of_its_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert read_settings(tmp_path) == {"chat_template": TEMPLATE}


def test_nothing_there_is_nothing(tmp_path):
    assert read_settings(tmp_path) == {}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        read_settings(tmp_path)


def test_ours_ends_and_begins_texts_with_its_one_special_token():
    found = full_settings(Tokenizer.byte(separator=True), 24, {})
    assert found["eos_token"] == found["bos_token"] == "<|endoftext|>"
    assert found["model_max_length"] == 24
    assert "eos_token" not in full_settings(Tokenizer.byte(), 24, {})


def test_what_came_along_wins_but_for_the_class():
    given = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "Evil"}
    found = full_settings(Tokenizer.byte(separator=True), 24, given)
    assert found["eos_token"] == "<|im_end|>"
    assert found["chat_template"] == TEMPLATE
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_token_that_is_none_is_named():
    tokenizer = Tokenizer.byte(separator=True)
    assert special_id(tokenizer, "<|endoftext|>") == tokenizer.eot_id == 256
    with pytest.raises(DataError, match="no token '<s>'"):
        special_id(tokenizer, "<s>")
