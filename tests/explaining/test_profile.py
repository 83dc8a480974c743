"""Shares of a step that sum to one, operations that are the model's, and a verdict."""

import dataclasses

import numpy as np
import pytest
import torch

from octavo.checkpoint import Run
from octavo.config import build_config
from octavo.errors import ConfigError
from octavo.explaining import profile, roofline
from octavo.explaining.profile import Profile, Row, profile_training, profile_writing, random_task
from octavo.explaining.roofline import Machine
from octavo.language_model import load
from octavo.model.counts import cache_bytes, count_parameters, flops_per_token
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

MODEL = {"vocab_size": 40, "block_size": 32, "n_layer": 2, "n_head": 2, "d_model": 32}
MACHINE = Machine("cpu", flops=1e11, bandwidth=1e10)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(profile, "WRITE_SECONDS", 0.02)
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", 0.01)
    monkeypatch.setitem(roofline.SIZES, "cpu", (64, 1 << 12))


def make_config(model=None, **sections):
    train = {"micro_batch_size": 4, "grad_accum": 2, "device": "cpu"} | sections.pop("train", {})
    return build_config({"model": MODEL | (model or {}), "train": train, **sections})


def profiled(config, **options):
    return profile_training(random_task(config), 1, **options)


def parts(found):
    return {row.part: row for row in found.rows}


def assert_whole(found):
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert sum(row.forward + row.backward for row in found.rows) == pytest.approx(found.seconds)


def test_shares_sum_to_one_and_operations_to_the_models():
    config = make_config()
    found = profiled(config)
    assert_whole(found)
    assert found.tokens == 8 * 32
    assert found.flops == 3 * 8 * 32 * flops_per_token(config.model)
    wanted = [*profile.NAMES, "rest"]
    wanted.remove("idle")
    assert [row.part for row in found.rows] == wanted
    rows = parts(found)
    for part in ("embedding", "norms", "projections", "attention", "mlp", "head", "loss"):
        assert rows[part].forward > 0
        assert rows[part].backward > 0
    assert rows["optimizer"].bytes == 28 * count_parameters(config.model).total
    assert rows["mlp"].flops > rows["mlp"].bytes / 4
    assert {row.bound for row in found.rows} <= {"compute", "memory", "overhead"}
    assert found.layers.keys() == {"blocks.0", "blocks.1"}
    assert 0 < sum(found.layers.values()) < found.seconds
    assert max(found.operations.values()) == next(iter(found.operations.values()))
    assert found.conclusion.endswith(".")


@pytest.mark.parametrize(
    "switches",
    [
        dict(model={"norm_position": "sandwich", "position": "both", "qk_norm": True}),
        dict(train={"loss_chunk": 16}, model={"tie_embeddings": False, "mlp": "gelu"}),
        dict(train={"grad_checkpoint": True}, model={"norm": "layernorm", "bias": True}),
        dict(train={"precision": "bf16"}, optim={"name": "muon"}),
    ],
)
def test_any_model_and_any_step_is_taken_apart_without_a_rest(switches):
    found = profiled(make_config(**switches))
    assert_whole(found)
    assert parts(found)["mlp"].backward > 0


def test_what_is_left_out_is_said():
    found = profiled(make_config(train={"compile": True, "grad_accum": 9, "micro_batch_size": 1}))
    assert found.tokens == 4 * 32
    assert any("compile" in remark for remark in found.remarks)
    assert any("4 of a step's 9 micro-batches" in remark for remark in found.remarks)


def test_each_step_is_told():
    told = []
    profiled(make_config(), watch=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def run(tmp_path):
    tokenizer = Tokenizer.char("abcdefghij klmnopqrst.\n")
    config = build_config({"model": MODEL | {"vocab_size": tokenizer.vocab_size}})
    torch.manual_seed(0)
    weights = GPT(config.model).state_dict()
    return Run.create(tmp_path / "run", config, tokenizer, {}, weights)


def test_the_native_engine_reads_its_weights_and_keys_for_every_token(run):
    lm = load(run.path, "cpu", engine="native")
    found = profile_writing(lm, 8)
    assert_whole(found)
    prompt, writing = found.rows
    assert (prompt.part, writing.part) == ("prompt", "writing")
    norms_and_matrices = 4 * count_parameters(lm.config).total
    assert writing.bytes == 8 * (norms_and_matrices + cache_bytes(lm.config, 16 + 4))
    assert writing.flops == 8 * flops_per_token(lm.config, 20)
    assert prompt.flops == 16 * flops_per_token(lm.config, 16)
    assert found.tokens == 16 + 8
    assert found.where.startswith("native cpu, 1 thread")


def test_an_untied_embedding_is_not_read_whole(run, tmp_path):
    config = dataclasses.replace(run.config.model, tie_embeddings=False)
    config = dataclasses.replace(run.config, model=config)
    weights = GPT(config.model).state_dict()
    untied = Run.create(tmp_path / "untied", config, run.tokenizer, {}, weights)
    found = [
        profile_writing(load(r.path, "cpu", engine="native"), 8).rows[1] for r in (run, untied)
    ]
    assert found[0].bytes == found[1].bytes


def test_pytorchs_engine_is_taken_apart(run, tmp_path):
    lm = load(run.path, "cpu", engine="torch")
    found = profile_writing(lm, 100, tmp_path / "trace.json")
    assert_whole(found)
    assert found.tokens == 16, "no more than the context holds"
    rows = parts(found)
    assert rows.keys() >= {"embedding", "norms", "projections", "attention", "mlp", "head"}
    assert all(row.backward == 0 for row in found.rows)
    native = profile_writing(load(run.path, "cpu", engine="native"), 100)
    assert sum(row.bytes for row in found.rows) == native.rows[1].bytes
    assert (tmp_path / "trace.json").stat().st_size > 1000


def test_the_native_engine_has_no_trace(run, tmp_path):
    with pytest.raises(ConfigError, match="one piece"):
        profile_writing(load(run.path, "cpu", engine="native"), 8, tmp_path / "trace.json")


def test_the_conclusion_names_what_takes_longest_of_what_holds_most_up():
    def row(part, share, bound):
        return Row(part, share, 0.0, share, 1.0, 1.0, bound, 0.5)

    rows = [
        row("mlp", 0.3, "compute"),
        row("head", 0.25, "compute"),
        row("loss", 0.4, "memory"),
        row("rest", 0.05, "overhead"),
    ]
    found = Profile("train", "cpu", 1.0, 10, MACHINE, 0, rows)
    assert found.conclusion.startswith("55% of the time is bound by arithmetic")
    assert "most of it in mlp (30%)" in found.conclusion
    for what, bound in profile.HELP:
        one = Profile(what, "cpu", 1.0, 10, MACHINE, 0, [row("mlp", 1.0, bound)])
        assert profile.HELP[what, bound] in one.conclusion


def test_ids_are_drawn_so_that_no_text_is_needed():
    task = random_task(make_config())
    x, y = task.batches.rows(0, 8)
    assert x.shape == y.shape == (8, 32)
    assert 0 <= np.min(x) <= np.max(y) < 40


def test_examples_are_counted_as_long_as_they_are():
    """A classifier's rows are as wide as its longest text, not as the context."""
    task = random_task(make_config())
    x, y = task.batches.rows(0, 8)

    class Short:
        block_size = 10

        def rows(self, first, count):
            return x[:count, :10], y[:count, :10]

    found = profile_training(dataclasses.replace(task, batches=Short()), 1)
    assert found.tokens == 8 * 10
    assert found.flops == 3 * 8 * 10 * flops_per_token(task.config.model, 10)
