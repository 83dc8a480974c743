"""What a run directory gives back is what was put in, or an error that says what to do."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_kit import save, value_of
from training_kit import flip

from octavo import disk
from octavo.checkpoint import Run, newest_run
from octavo.config import Config, ModelConfig, TrainConfig
from octavo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    ResourceError,
)
from octavo.manifest import verify
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

TINY = ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, d_model=8)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs" / "one", Config(model=TINY))


def read_all(run: Run) -> None:
    saved = run.load()
    saved.model_tensors()
    saved.optimizer_tensors()


# ---- creating and opening


def test_a_new_run_holds_its_settings_its_tokenizer_and_what_else_it_is_given(tmp_path):
    config = Config(model=TINY, train=TrainConfig(max_steps=7))
    tokenizer = Tokenizer.char("hello")
    Run.create(tmp_path / "deep" / "run", config, tokenizer, files={"input.txt": b"hello"})
    run = Run.open(str(tmp_path / "deep" / "run"))
    assert run.config == config
    assert run.tokenizer.fingerprint == tokenizer.fingerprint
    assert (run.path / "input.txt").read_bytes() == b"hello"
    assert (run.latest, run.best, run.checkpoints, run.damaged) == (None, None, [], [])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_an_empty_directory_becomes_a_run_also_behind_a_link(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    run = Run.create(tmp_path / "link", Config(model=TINY))
    assert Run.open(tmp_path / "empty").config == run.config
    assert Run.create(tmp_path / "plain", Config(model=TINY)).tokenizer is None


def test_where_no_run_can_be_made_it_is_said_in_one_line(tmp_path, run):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x", encoding="utf-8")
    impossible = ["file", "file/run", "loop", "loop/run", "full", "x" * 300, "nul\0nul"]
    for path in [run.path, *(f"{tmp_path}/{name}" for name in impossible)]:
        with pytest.raises(ConfigError) as caught:
            Run.create(path, Config())
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        assert caught.value.fix
    with pytest.raises(ConfigError, match=r"already is a run; .*--resume"):
        Run.create(run.path, Config())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "loop", "runs"]


def test_a_path_that_is_no_run_is_answered_with_the_nearest_one(tmp_path, run):
    save(run, 1)
    (tmp_path / "runs" / "empty").mkdir()
    wanted = {
        tmp_path / "runs" / "oen": f"did you mean {run.path}?",
        tmp_path / "runs": f"near it: {run.path}",
        tmp_path / "runs" / "empty": f"near it: {run.path}",
        tmp_path / "nowhere" / "x": f"octavo train --out {tmp_path / 'nowhere' / 'x'} makes one",
        run.folder / "step-00000002": f"did you mean {run.folder / 'step-00000001'}?",
    }
    for path, fix in wanted.items():
        with pytest.raises(ConfigError, match="is no run; looked for ") as caught:
            Run.open(path)
        assert caught.value.fix == fix
    for path in ("nul\0nul", "x" * 300, run.path / "config.yaml"):
        with pytest.raises(ConfigError):
            Run.open(path)


def test_the_newest_run_is_the_one_saved_last(tmp_path, run):
    assert newest_run(tmp_path / "runs") is None
    other = Run.create(tmp_path / "runs" / "another", Config(model=TINY))
    for number, (each, step) in enumerate([(run, 1), (other, 1), (run, 2), (other, 2), (run, 3)]):
        os.utime(save(each, step), (number, number))
    assert newest_run(tmp_path / "runs") == run.path


# ---- what is saved is what is loaded


def test_model_and_optimizer_come_back_bitwise_and_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    run = Run.create(tmp_path / "run", Config(model=TINY))
    model = GPT(TINY)
    moments = {
        f"{name}.{kind}": torch.randn_like(value).to(dtype)
        for name, value in model.named_parameters()
        for kind, dtype in (("exp_avg", torch.float32), ("exp_avg_sq", torch.bfloat16))
    }
    moments |= {"step": torch.tensor(3), "scale": torch.tensor(65536.0)}
    state = {"step": 3, "best": None, "loss": 0.1 + 0.2, "scaler": {"growth": 2}}
    path = run.save(3, model.state_dict(), moments, state, keep=1, facts={"text": "abc"})

    saved = Run.open(run.path).load()
    assert (saved.step, saved.path, saved.state) == (3, path, state)
    assert saved.manifest.facts == {"text": "abc"}
    tensors = saved.optimizer_tensors()
    assert tensors.keys() == moments.keys()
    for name, value in moments.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)

    other = GPT(TINY)
    other.load_state_dict(saved.model_tensors(), strict=True)
    assert other.lm_head.weight is other.tok_emb.weight
    ids = torch.arange(8)[None]
    assert torch.equal(other(ids), model(ids))
    arrays = saved.model_arrays()
    assert arrays.keys() == model.state_dict().keys()
    assert all(np.array_equal(arrays[n], v.numpy()) for n, v in model.state_dict().items())
    assert arrays["lm_head.weight"] is arrays["tok_emb.weight"]
    parameters = sum(p.nbytes for p in model.parameters())
    assert parameters < saved.manifest.files["model.safetensors"]["bytes"] < parameters + 2000


def test_saving_again_what_was_saved_last_changes_nothing(run):
    first = save(run, 1)
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    assert save(run, 1) == first
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()} == before


def test_after_a_rollback_the_new_attempt_is_the_latest_though_its_step_is_lower(run):
    for step in (10, 20, 30):
        save(run, step, keep=9)
    pinned = Run.open(run.folder / "step-00000010")
    assert (pinned.path, pinned.latest, pinned.best) == (run.path, pinned.pinned, pinned.pinned)
    assert value_of(pinned) == 10

    again = save(pinned, 20, keep=9, value=-20)
    assert again.name == "step-00000020-2"
    assert save(pinned, 20, keep=9, value=-21).name == "step-00000020-3"
    assert save(pinned, 20, keep=9).name == "step-00000020-4"  # as the first, but now the latest
    assert value_of(run) == 20
    run.mark_best(20, 1.5)
    assert run.best == run.folder / "step-00000020-4"
    assert value_of(run, again) == -20
    assert [verify(p).order for p in run.checkpoints] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(CheckpointError, match="has no sound checkpoint; found none"):
        run.load()
    (save(run, 1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="found 1 damaged"):
        run.load()


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    old, new = Tokenizer.char("abc"), Tokenizer.char("abd")
    run = Run.create(tmp_path / "run", Config(model=TINY), old)
    save(run, 1)
    assert value_of(Run.open(run.path)) == 1
    new.save(run.path / "tokenizer.json")
    with pytest.raises(DataError) as caught:
        Run.open(run.path).load()
    assert old.fingerprint in str(caught.value)
    assert new.fingerprint in str(caught.value)
    (run.path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=old.fingerprint):
        Run.open(run.path).load()


def test_settings_of_another_model_are_refused_and_others_are_not(run):
    """One changed digit of rope_theta would otherwise load, and write nonsense."""
    save(run, 1)
    path = run.path / "config.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("max_steps: 2000", "max_steps: 3000"), encoding="utf-8")
    assert value_of(Run.open(run.path)) == 1
    path.write_text(text.replace("rope_theta: 10000.0", "rope_theta: 10000.5"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.rope_theta is 10000\.5, but .* 10000\.0"):
        Run.open(run.path).load()


# ---- what is damaged


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_is_named_with_the_checkpoint_to_use_instead(run, name):
    older, newer = save(run, 1), save(run, 2)
    flip(newer / name, (newer / name).stat().st_size // 2, bit=4)
    assert run.latest == newer
    with pytest.raises(CheckpointError, match=f"{name} is damaged") as caught:
        read_all(run)
    assert caught.value.exit_code == 4
    assert caught.value.fix == f"use a sound one: {older}"
    assert value_of(Run.open(older)) == 1


def test_a_checkpoint_that_lost_a_file_is_passed_over_told_and_never_deleted(run):
    for step in (1, 2, 3):
        save(run, step, keep=3)
    broken = run.folder / "step-00000003"
    (broken / "optimizer.safetensors").unlink()
    assert run.latest == run.folder / "step-00000002"
    assert run.damaged == [broken]
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has no bytes, not \d+"):
        run.load(broken)
    save(run, 4, keep=2)
    assert [p.name for p in run.checkpoints] == ["step-00000002", "step-00000004"]
    assert run.damaged == [broken]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"checkpoint": "../../other"}'])
def test_while_best_json_is_unreadable_nothing_is_deleted(run, text):
    for step in (1, 2, 3):
        save(run, step, keep=3)
    (run.folder / "best.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"best\.json"):
        _ = run.best
    save(run, 4, keep=1)
    assert len(run.checkpoints) == 4
    run.mark_best(1, 0.5)
    save(run, 5, keep=1)
    assert [verify(p).step for p in run.checkpoints] == [1, 5]


def test_numbers_that_are_not_finite_are_never_saved(run):
    good, bad = np.ones(3, np.float32), np.array([1, np.nan, 2], np.float32)
    save(run, 1)
    for model, optimizer in (({"w": bad}, {"w": good}), ({"w": good}, {"w": bad})):
        with pytest.raises(NonFiniteError, match="w holds NaN or infinity; at step 2; not saved"):
            run.save(2, model, optimizer, {}, keep=1)
    assert [p.name for p in run.checkpoints] == ["step-00000001"]


# ---- retention


def test_only_a_saved_step_can_be_best(run):
    with pytest.raises(CheckpointError, match="step 3 has no checkpoint"):
        run.mark_best(3, 1.0)
    save(run, 3)
    run.mark_best(3, 1.25)
    assert json.loads((run.folder / "best.json").read_text(encoding="utf-8")) == {
        "checkpoint": "step-00000003",
        "step": 3,
        "metric": 1.25,
    }


@settings(max_examples=25)
@given(
    keep=st.integers(1, 3),
    saves=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=10),
)
def test_the_latest_few_and_the_best_are_kept(tmp_path_factory, keep, saves):
    run = Run.create(tmp_path_factory.mktemp("runs") / "run", Config(model=TINY))
    written: list[Path] = []
    best = None
    for number, (step, is_best, through_pin) in enumerate(saves):
        writer = Run.open(written[-1]) if written and through_pin else run
        written.append(save(writer, step, keep=keep, value=number))
        if is_best:
            run.mark_best(step, 1.0)
            best = written[-1]
        assert run.latest == written[-1]
        assert run.best == best
        expected = [p for p in written if p in written[-keep:] or p == best]
        kept = run.checkpoints
        assert kept[-keep:] == written[-keep:]
        assert best is None or best in kept
        assert set(kept) - set(expected) <= set(written[:-keep])  # an old best may wait for a save
        assert len(kept) <= keep + 2
        assert all(verify(path) for path in kept)
    assert list(run.path.rglob(".*")) == []


def test_too_little_room_is_noticed_before_anything_is_written(run, monkeypatch):
    save(run, 1)
    usage = shutil.disk_usage(run.path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(disk, "scratch", None)
    with pytest.raises(ResourceError, match=r"needs 1\.0 MB, 1\.0 MB are free"):
        save(run, 2)
    assert value_of(run) == 1
