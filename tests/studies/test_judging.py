"""Runs are judged on the same text, by windows where they share them and by bytes where not."""

import dataclasses
import math

import numpy as np
import pytest
from training_kit import config_of

from octavo.errors import ConfigError, DataError
from octavo.language_model import load
from octavo.studies.judging import Stretches, Windows, check_side, find_runs, make_ruler
from octavo.training.loop import train
from octavo.training.task import score_validation

TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells. Né?\n" * 100
SMALL = (
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "train.max_steps=4", "train.micro_batch_size=4", "eval.windows=9", "log.sample_tokens=1",
    "optim.lr=1e-2", "data.val_fraction=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judging")
    (folder / "sea.txt").write_text(TEXT, encoding="utf-8")
    (folder / "other.txt").write_text(TEXT[::-1], encoding="utf-8")
    made = {
        "char": [],
        "again": ["train.seed=1"],
        "longer": ["model.block_size=24"],
        "byte": ["data.tokenizer=byte"],
        "bpe": ["data.tokenizer=bpe", "data.bpe_vocab_size=280"],
        "other": [f"data.source={folder / 'other.txt'}"],
    }
    for name, settings in made.items():
        train(config_of(folder / "sea.txt", *SMALL, *settings), folder / name, quiet=True)
    return folder


def models(folder, *names):
    return [load(folder / name) for name in names]


def test_runs_that_share_everything_are_judged_on_their_own_windows(folder):
    both = models(folder, "char", "again")
    ruler = make_ruler(both)
    assert isinstance(ruler, Windows)
    for lm in both:
        loss = ruler.figures(lm).sum() / ruler.weights.sum()
        assert loss == pytest.approx(score_validation(lm).loss, rel=1e-6)


def test_windows_that_overlap_are_no_more_evidence(folder):
    ruler = make_ruler(models(folder, "char", "again"), count=10_000)
    assert isinstance(ruler, Windows)
    assert 240 < len(ruler.x) <= len(TEXT) // 2 // 16


@pytest.mark.parametrize("name", ["char", "byte", "bpe", "longer"])
def test_stretches_are_the_whole_text_and_nothing_twice(folder, name):
    """However a model cuts the text into tokens, the bits of its stretches are the bits of it."""
    everything = models(folder, "char", "byte", "bpe", "longer")
    ruler = make_ruler(everything, text=str(folder / "sea.txt"), count=7)
    assert isinstance(ruler, Stretches)
    assert len(ruler.weights) == 7
    lm = load(folder / name)
    whole, first = lm.score(TEXT), int(lm.tokenizer.byte_lengths()[lm.tokenizer.encode(TEXT)[0]])
    assert ruler.edges[0] == max(
        int(each.tokenizer.byte_lengths()[each.tokenizer.encode(TEXT)[0]]) for each in everything
    )
    if first == ruler.edges[0]:
        assert ruler.figures(lm).sum() == pytest.approx(whole.nats / math.log(2), rel=1e-6)
    moved = dataclasses.replace(ruler, edges=np.array([first, 500.0, len(TEXT.encode())]))
    assert moved.figures(lm).sum() == pytest.approx(whole.nats / math.log(2), rel=1e-6)
    assert moved.weights.sum() == whole.bytes


def test_other_tokenizers_are_judged_on_what_none_has_learned_from(folder):
    """Half of the characters is not half of the bytes or tokens: the common end is what is left."""
    ruler = make_ruler(models(folder, "char", "byte"))
    assert isinstance(ruler, Stretches)
    assert ruler.unit == "bits a byte"
    assert "different tokenizers" in ruler.remark
    shorter = TEXT.encode()[len(TEXT.encode()) // 2 :].decode(errors="ignore")
    assert TEXT.endswith(ruler.passage)
    assert len(ruler.passage) <= len(shorter)


def test_other_contexts_are_judged_by_bytes(folder):
    ruler = make_ruler(models(folder, "char", "longer"))
    assert isinstance(ruler, Stretches)
    assert "different contexts" in ruler.remark


def test_other_texts_are_refused_with_both_hashes_and_a_way_out(folder):
    pair = models(folder, "char", "other")
    with pytest.raises(ConfigError, match=r"SHA-256 [0-9a-f]{64}.* with [0-9a-f]{64}.*--text FILE"):
        make_ruler(pair)
    assert isinstance(make_ruler(pair, text=str(folder / "sea.txt")), Windows)


def test_a_character_that_a_run_does_not_know_names_the_run(folder, tmp_path):
    (tmp_path / "x.txt").write_text("Q" * 5000, encoding="utf-8")
    with pytest.raises(DataError, match=r"'Q'.* for .*char"):
        make_ruler(models(folder, "byte", "char"), text=str(tmp_path / "x.txt"))


def test_a_short_text_is_no_two_stretches(folder, tmp_path):
    (tmp_path / "short.txt").write_text(TEXT[:900], encoding="utf-8")
    with pytest.raises(DataError, match="two stretches of 1024 bytes"):
        make_ruler(models(folder, "byte", "char"), text=str(tmp_path / "short.txt"))


def test_a_word_names_one_run_or_several(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_runs("char") == ["char"]
    assert find_runs("char,again") == ["char", "again"]
    assert find_runs("b*") == ["bpe", "byte"]
    assert find_runs(str(folder)) == [
        str(folder / name) for name in ("again", "bpe", "byte", "char", "longer", "other")
    ]
    with pytest.raises(ConfigError, match="no run is called z"):
        find_runs("z*")


def test_one_run_does_not_count_twice_and_other_methods_are_named(folder):
    with pytest.raises(ConfigError, match="are the same weights"):
        check_side(models(folder, "char", "char"))
    assert check_side(models(folder, "char", "again")) == []
    (remark,) = check_side(models(folder, "char", "longer"))
    assert "model.block_size" in remark
