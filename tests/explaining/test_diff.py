"""Two checkpoints: what differs, by how much, and when nothing does."""

import json

import numpy as np
import pytest
from command_kit import without_torch

from octavo.checkpoint import Run
from octavo.config import build_config
from octavo.explaining.diff import SAME, diff
from octavo.text.tokenizer import Tokenizer

MODEL = {"vocab_size": 300, "block_size": 8, "n_layer": 1, "n_head": 2, "d_model": 4}
BYTES = Tokenizer.byte()


@pytest.fixture
def make(tmp_path):
    def make(name, weights, tokenizer=BYTES, **settings):
        config = build_config({"model": MODEL, **settings})
        arrays = {key: np.asarray(value, dtype=np.float32) for key, value in weights.items()}
        Run.create(tmp_path / name, config, tokenizer, {}, arrays)
        return tmp_path / name

    return make


def test_a_change_is_measured_and_the_largest_comes_first(make):
    a = make("a", {"w": [[3.0, 4.0]], "still": [1.0, 2.0], "norm": [2.0]})
    b = make("b", {"w": [[3.0, 4.5]], "still": [1.0, 2.0], "norm": [3.0]})
    found = diff(a, b)
    assert [change.name for change in found.changes] == ["norm", "w", "still"]
    norm, w, still = found.changes
    assert (norm.relative, norm.norm_a, norm.norm_b) == (0.5, 2, 3)
    assert (w.relative, w.norm_a, w.shape) == (pytest.approx(0.1), 5, (1, 2))
    assert still.relative == 0
    assert found.relative == pytest.approx(np.sqrt(0.5**2 + 1) / np.sqrt(25 + 5 + 4))
    assert not found.same_weights
    assert not found.identical


def test_the_same_is_called_identical(make):
    weights = {"w": np.random.default_rng(0).normal(size=(4, 4))}
    a, b = make("a", weights), make("b", weights)
    found = diff(a, b)
    assert found.identical
    assert found.relative == 0
    assert found.settings == {}
    assert found.tokenizer == SAME
    assert diff(a, a).identical


def test_the_least_bit_is_a_difference(make):
    a, b = make("a", {"w": [1.0, 1e-3]}), make("b", {"w": [1.0, np.nextafter(np.float32(1e-3), 1)]})
    assert not diff(a, b).same_weights


def test_a_change_from_zero_has_no_ratio(make):
    found = diff(make("a", {"w": [0.0], "v": [1.0]}), make("b", {"w": [1.0], "v": [9.0]}))
    assert [(c.name, c.relative) for c in found.changes] == [("w", None), ("v", 8)]
    json.dumps([c.relative for c in found.changes], allow_nan=False)


def test_other_shapes_and_names_are_said(make):
    a = make("a", {"w": np.zeros((2, 3)), "old": [1.0]})
    b = make("b", {"w": np.zeros((3, 3)), "new": [1.0]})
    found = diff(a, b)
    assert found.shapes == {"w": ((2, 3), (3, 3))}
    assert (found.only_a, found.only_b, found.changes) == (["old"], ["new"], [])
    assert not found.same_weights


def test_tied_weights_count_once(make):
    shared = np.ones((3, 3), dtype=np.float32)
    a = make("a", {"emb": shared, "head": shared})
    found = diff(a, a)
    assert [change.name for change in found.changes] == ["emb"]


def test_settings_that_differ_are_listed_as_they_are_typed(make):
    a = make("a", {"w": [1.0]}, optim={"lr": 1e-3}, train={"seed": 1})
    b = make("b", {"w": [1.0]}, optim={"lr": 2e-3}, train={"seed": 1})
    found = diff(a, b)
    assert found.settings == {"optim.lr": (1e-3, 2e-3)}
    assert found.same_weights
    assert found.identical


def test_other_tokenizers_are_not_identical(make):
    a = make("a", {"w": [1.0]})
    b = make("b", {"w": [1.0]}, tokenizer=Tokenizer.char("\x00\x01bc"))
    assert diff(a, b).tokenizer == "byte of 256 tokens, char of 4; 2 ids mean the same"
    c = make("c", {"w": [1.0]}, tokenizer=None)
    assert diff(a, c).tokenizer == "only the first has one"
    assert diff(c, a).tokenizer == "only the second has one"
    assert not diff(a, b).identical
    assert diff(a, b).same_weights


def test_an_adapter_is_said_to_be_one(make):
    a = make("a", {"w": [1.0]})
    b = make("b", {"lora": [1.0]}, finetune={"base": str(a)}, lora={"rank": 2})
    found = diff(a, b)
    assert "octavo merge" in found.remarks[0]
    assert (found.only_a, found.only_b) == (["w"], ["lora"])


def test_a_checkpoint_of_a_run(make):
    path = make("a", {"w": [1.0]})
    Run.open(path).save(5, {"w": np.array([2.0], np.float32)}, {}, {}, keep=2)
    first, second = Run.open(path).checkpoints
    found = diff(first, second)
    assert found.changes[0].relative == 1
    assert (found.a, found.b) == (f"{path}, step 0", f"{path}, step 5")
    assert found.settings == {}


def test_runs_are_compared_without_torch(make):
    a, b = make("a", {"w": [1.0]}), make("b", {"w": [2.0]})
    without_torch(
        "from octavo.explaining.diff import diff\n"
        f"assert diff({str(a)!r}, {str(b)!r}).relative == 1"
    )
