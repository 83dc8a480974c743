"""The text a run learned from: found, gone, changed; and where in it something stands."""

import hashlib
import json

import numpy as np
import pytest

from octavo.errors import DataError
from octavo.explaining import training_text as module
from octavo.explaining.training_text import TrainingText, training_text
from octavo.text.shards import write_manifest, write_shard


def test_the_text_of_a_run_is_what_it_read(make_run, tmp_path):
    found = training_text(make_run().run)
    assert found.data == (tmp_path / "sea.txt").read_bytes()
    assert found.remarks == []
    assert found.val_fraction == 0.1


def test_a_text_that_has_changed_is_searched_and_said(make_run, tmp_path):
    run = make_run().run
    (tmp_path / "sea.txt").write_text("The sea is gone.", encoding="utf-8")
    found = training_text(run)
    assert found.data == b"The sea is gone."
    [remark] = found.remarks
    assert "has changed since" in remark
    assert hashlib.sha256(b"The sea is gone.").hexdigest() in remark


def test_a_text_that_is_gone_is_said(make_run, tmp_path):
    run = make_run().run
    (tmp_path / "sea.txt").unlink()
    found = training_text(run)
    assert found.documents == []
    assert "cannot be read any more: there is no text" in found.remarks[0]


def test_a_model_from_elsewhere_needs_a_corpus(tmp_path):
    assert "--corpus FILE" in training_text(None).remarks[0]
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael.", encoding="utf-8")
    found = training_text(None, str(path))
    assert (found.data, found.remarks) == (b"Call me Ishmael.", [])
    with pytest.raises(DataError, match="there is no text"):
        training_text(None, str(tmp_path / "bock.txt"))


def test_conversations_are_searched_as_they_were_said(make_run, tmp_path):
    """In the file a line break is two characters, and a quotation mark too."""
    path = tmp_path / "talk.jsonl"
    messages = [{"role": "user", "content": 'Say "sea",\nplease.'}]
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    data = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    lm = make_run(settings={"data": {"kind": "chat"}}, source=path, data=data)
    found = training_text(lm.run)
    assert b'Say "sea",\nplease.' in found.data
    assert found.remarks == []


def test_tokens_are_searched_as_the_text_they_stand_for(make_run, tmp_path, monkeypatch):
    lm, said = make_run(), "she sells sea shells"
    monkeypatch.setattr(module, "IDS", 7)
    home = tmp_path / "shards"
    home.mkdir()
    ids = np.array(lm.tokenizer.encode(said))
    shard = write_shard(home / "train-00000.npy", ids, "train")
    write_manifest(home, [shard], lm.tokenizer)
    found = training_text(make_run("other", source=home, data={"sha256": "gone"}).run)
    assert found.data == said.encode()
    assert "has changed" in found.remarks[0]
    monkeypatch.setattr(module, "MOST", 10)
    found = training_text(make_run("third", source=home, data={"sha256": "gone"}).run)
    assert found.data == said.encode()[:10]


def test_only_the_beginning_of_a_huge_text_is_searched(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("aaaaaa", encoding="utf-8")
    (tmp_path / "b.txt").write_text("bbbbbb", encoding="utf-8")
    monkeypatch.setattr(module, "MOST", 10)
    found = training_text(None, str(tmp_path))
    assert found.documents == [b"aaaaaa", b"bbbb"]
    assert "were searched" in found.remarks[0]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, "line 1, byte 0 of document 1 of 2"),
        (4, "line 2, byte 4 of document 1 of 2"),
        (9, "line 1, byte 0 of document 2 of 2"),
        (14, "line 3, byte 5 of document 2 of 2"),
        (17, "line 3, byte 8 of document 2 of 2, in about the last 10%, which was kept for "
         "validation"),
    ],
)  # fmt: skip
def test_where_something_stands(place, words):
    assert TrainingText("x", [b"one\ntwo", b"a\nb\n12345"], val_fraction=0.1).where(place) == words


def test_a_single_file_has_no_documents():
    assert TrainingText("x", [b"a\nb"]).where(2) == "line 2, byte 2"
