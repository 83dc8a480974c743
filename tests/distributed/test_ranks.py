"""Several processes are one run: the same rows, the same step, the same bits again."""

import shutil

import pytest
import torch
from crew import Crew, config, together
from training_kit import assert_same_weights, saved
from work import layers, restored, rows_seen, run, steps, stopped

import octavo
from octavo.checkpoint import INDEX, OPTIMIZER, Run
from octavo.config import TrainConfig, load_config
from octavo.errors import ConfigError
from octavo.training.parallel import Ranks


@pytest.mark.parametrize("settings", [(8, 1), (4, 2), (1, 8), (24, 1), (8, 3)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_a_steps_rows_without_a_gap(settings, size):
    train = TrainConfig(micro_batch_size=settings[0], grad_accum=settings[1])
    seen = []
    for rank in range(size):
        starts, micro = Ranks(rank, size).rows(100, train)
        assert micro <= train.micro_batch_size
        seen += [row + i for row in starts for i in range(micro)]
    assert seen == list(range(100, 100 + train.batch_size))


def test_rows_that_cannot_be_shared_are_an_error_with_the_numbers():
    with pytest.raises(ConfigError, match="6 rows cannot be shared equally among 4"):
        Ranks(0, 4).rows(0, TrainConfig(micro_batch_size=6))
    with pytest.raises(ConfigError, match="canonical mode runs on 1, 2 or 4 processes, not 3"):
        Ranks(0, 3).rows(0, TrainConfig(micro_batch_size=12, deterministic="canonical"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_step_is_the_same_on_any_number_of_ranks(texts, tmp_path, size, parallel):
    """Targets are ragged (documents are masked), so a mean of the ranks' means would differ."""
    settings = config(texts, f"train.parallel={parallel}", "model.position=both")
    (alone,) = together(tmp_path, 1, steps, settings)
    for found in together(tmp_path, size, steps, settings):
        assert found[0] == pytest.approx(alone[0], rel=1e-6)


def test_the_ranks_of_four_see_what_one_process_sees(texts, tmp_path):
    alone = together(tmp_path, 1, rows_seen, config(texts), 2)
    shared = together(tmp_path, 4, rows_seen, config(texts), 2)
    assert alone == [list(range(16))]
    assert sorted(row for rows in shared for row in rows) == list(range(16))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_resumed_equals_undisturbed_bitwise(texts, tmp_path, size, parallel):
    """One rank alone gets the signal, and all stop at the same step."""
    settings = config(texts, f"train.parallel={parallel}", "model.dropout=0.1")
    together(tmp_path, size, run, settings, tmp_path / "whole")
    crew = Crew(tmp_path, size, stopped, settings, tmp_path / "cut", 5, size - 1)
    assert crew.join() == [75] * size, crew.errors()
    assert crew.errors().count("error:") == 1
    assert saved(tmp_path / "cut")[0] == 5
    together(tmp_path, size, run, settings, tmp_path / "cut", True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_canonical_is_the_same_bits_on_any_number_of_ranks(texts, tmp_path):
    settings = config(texts, "train.deterministic=canonical", "model.dropout=0.1")
    sizes = (1, 2, 4)
    for size in sizes:
        together(tmp_path, size, run, settings, tmp_path / f"run-{size}")
    for size in sizes[1:]:
        assert_same_weights(tmp_path / "run-1", tmp_path / f"run-{size}")
    crew = Crew(tmp_path, 2, stopped, settings, tmp_path / "moved", 5, 0)
    assert crew.join() == [75, 75]
    together(tmp_path, 4, run, settings, tmp_path / "moved", True)
    assert_same_weights(tmp_path / "run-1", tmp_path / "moved")


def test_a_sharded_checkpoint_goes_on_anywhere(texts, tmp_path):
    """Each rank wrote its part of the optimizer; one, two and four take up the same numbers."""
    settings = config(texts, "train.parallel=fsdp", "eval.every=0")
    cut = tmp_path / "cut"
    assert Crew(tmp_path, 2, stopped, settings, cut, 4, 0).join() == [75, 75]
    names = {path.name for path in Run.open(cut).latest.iterdir()}
    assert {INDEX, "optimizer-0-of-2.safetensors", "optimizer-1-of-2.safetensors"} < names
    assert OPTIMIZER not in names
    lm = octavo.load(cut, device="cpu")
    assert len(lm.generate("The ", max_new_tokens=5)) > 0
    _, kept = saved(cut)
    for size in (1, 2, 4):
        for found in together(tmp_path, size, restored, settings, cut):
            assert found.keys() == kept.keys()
            assert all(torch.equal(found[name], kept[name]) for name in kept)
    together(tmp_path, 1, run, settings, tmp_path / "alone")
    losses = saved_loss(tmp_path / "alone")
    for size in (1, 4):
        moved = tmp_path / f"moved-{size}"
        shutil.copytree(cut, moved)
        together(tmp_path, size, run, settings, moved, True)
        assert saved_loss(moved) == pytest.approx(losses, rel=1e-3)


def saved_loss(path):
    from octavo.reporting.report import read_metrics

    return [event["loss"] for event in read_metrics(path) if event["event"] == "train"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_layers_gradient_norms_are_those_of_all_rows(texts, tmp_path, parallel):
    settings = config(texts, f"train.parallel={parallel}")
    (alone,) = together(tmp_path, 1, layers, settings)
    for found in together(tmp_path, 2, layers, settings):
        assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [["train.data_parallel=true"], ["training.use_data_parallel=true"], ["train.multi_gpu=true"]],
)
def test_data_parallel_is_answered_with_torchrun(words):
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        load_config(None, words)
