"""torch.compile: the same run, resumed or not, and the plain loop where no compiler works."""

import math

import pytest
import torch
from training_kit import assert_same_weights, cut_at

from octavo.config import load_config
from octavo.training.display import Display
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.loop import train
from octavo.training.task import prepare

SETTINGS = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "model.dropout=0.2", "train.dropout_final=0.1", "train.max_steps=6",
    "train.micro_batch_size=4", "eval.every=0", "eval.windows=4", "checkpoint.every=3",
    "log.every=1", "log.sample_every=0", "log.sample_tokens=3",
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("Round and round the rugged rocks. " * 40, encoding="utf-8")

    def make(*settings):
        return load_config(None, [*SETTINGS, f"data.source={tmp_path / 'text.txt'}", *settings])

    return make


def losses(config, tmp_path, name):
    task = prepare(config, "cpu", tmp_path / name)
    learner = build_learner(task, torch.device("cpu"), Display(quiet=True))
    return [optimizer_step(learner).loss for _ in range(6)]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_compiled_training_equals_eager_and_resumes_bitwise(config, tmp_path):
    plain = ("model.dropout=0.0", "train.dropout_final=null")
    eager = losses(config("train.compile=false", *plain), tmp_path, "eager")
    compiled = losses(config("train.compile=true", *plain), tmp_path, "compiled")
    assert compiled == pytest.approx(eager, rel=1e-5)

    whole = losses(config("train.compile=true"), tmp_path, "whole")
    assert all(math.isfinite(loss) for loss in whole)
    settings = config("train.compile=true")
    train(settings, tmp_path / "undisturbed", quiet=True)
    with cut_at(4):
        train(settings, tmp_path / "cut", quiet=True)
    train(settings, tmp_path / "cut", resume=True, quiet=True)
    assert_same_weights(tmp_path / "undisturbed", tmp_path / "cut")


def test_where_no_compiler_works_training_goes_on_and_says_so(
    config, tmp_path, monkeypatch, capsys
):
    def broken(function):
        def compiled(*args):
            raise RuntimeError("no C++ compiler found\nlong explanation")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    train(config("train.compile=true"), tmp_path / "run")
    said = capsys.readouterr().out
    assert "torch.compile does not work here (no C++ compiler found); going on without" in said
    assert "long explanation" not in said


def test_auto_compiles_long_runs_only(config, tmp_path):
    assert prepare(config(), "cpu", tmp_path).config.train.compile is False
    long = config("train.max_steps=10000000000", "train.micro_batch_size=64")
    assert prepare(long, "cpu", tmp_path).config.train.compile is True
