"""What the loop promises: equal steps, equal resumes, nothing lost."""

import dataclasses
import math
import signal
import sys
import time

import numpy as np
import pytest
import torch
from training_kit import (
    FOX,
    SMALL,
    assert_same_weights,
    config_of,
    cut_at,
    events,
    poison_loss,
    saved,
    step_and_gradients,
)

import octavo
from octavo.checkpoint import Run
from octavo.errors import ConfigError, DataError, NonFiniteError, ResourceError
from octavo.training.display import Display
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.loop import train
from octavo.training.task import prepare


def config(text, *settings):
    return config_of(text, *SMALL, *settings)


def learner_of(text, tmp_path, *settings):
    task = prepare(config(text, *settings), "cpu", tmp_path / "none")
    return build_learner(task, torch.device("cpu"), Display(quiet=True))


def test_a_run_learns_and_leaves_everything_behind(text, tmp_path):
    result = train(config(text, "train.max_steps=40"), tmp_path / "run", quiet=True)
    kinds = [event["event"] for event in events(result.run)]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert {"train", "eval", "save", "sample"} <= set(kinds)
    losses = [event["loss"] for event in events(result.run, "train")]
    assert losses[-1] < losses[0] - 0.5
    evaluations = events(result.run, "eval")
    assert result.best_val_loss == min(event["val_loss"] for event in evaluations)
    last = evaluations[-1]
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_loss"]))
    # One character is one byte here, so bits per byte is the loss in another unit.
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2))
    for name in ("config.yaml", "tokenizer.json", "samples.txt", "report.html", "curve.png"):
        assert (result.run / name).stat().st_size > 0, name


def assert_same_step(one, other):
    """Equal loss and gradients, from equal weights; Adam itself would magnify rounding."""
    (step, gradients), (other_step, other_gradients) = map(step_and_gradients, (one, other))
    assert step.loss == pytest.approx(other_step.loss, rel=1e-6)
    assert step.grad_norm == pytest.approx(other_step.grad_norm, rel=1e-6)
    for a, b in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_accumulation_equals_one_large_batch(text, tmp_path):
    whole = learner_of(text, tmp_path, "train.micro_batch_size=8")
    parts = learner_of(text, tmp_path, "train.micro_batch_size=2", "train.grad_accum=4")
    assert_same_step(whole, parts)


def test_ragged_targets_are_weighted_by_token_not_by_batch(text, tmp_path):
    """A mean of micro-batch means would weigh the short row as much as the full ones."""

    def ragged(learner):
        plain = learner.task.batches.rows

        def rows(first, count):
            x, y = plain(first, count)
            y[np.arange(first, first + count) % 4 == 0, 3:] = -100
            return x, y

        object.__setattr__(
            learner.task, "batches", type("Ragged", (), {"rows": staticmethod(rows)})
        )
        return learner

    whole = ragged(learner_of(text, tmp_path, "train.micro_batch_size=8"))
    parts = ragged(learner_of(text, tmp_path, "train.micro_batch_size=2", "train.grad_accum=4"))
    assert_same_step(whole, parts)


def test_clipping_bounds_what_the_optimizer_sees_and_logs_the_norm_before(text, tmp_path):
    learner = learner_of(text, tmp_path, "optim.grad_clip=1e-3")
    step, gradients = step_and_gradients(learner)
    assert step.grad_norm > 1e-2
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.dropout=0.2", "train.grad_accum=2", "data.sampling=random"),
        ("model.dropout=0.3", "train.dropout_final=0.0", "train.grad_checkpoint=true"),
    ],
)
def test_resumed_equals_undisturbed_bitwise(text, tmp_path, settings):
    train(config(text, *settings), tmp_path / "whole", quiet=True)
    with cut_at(5, signal.SIGINT) as stopped:
        train(config(text, *settings), tmp_path / "cut", quiet=True)
    assert "--resume" in str(stopped.value)
    train(config(text, *settings), tmp_path / "cut", resume=True, quiet=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")


@pytest.fixture
def threads():
    """Sets how many threads PyTorch has, for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_step_takes_at_most_its_threads_and_gives_them_back(text, tmp_path, threads):
    for has, most, takes in ((3, 2, 2), (2, 3, 2), (3, 0, 3)):
        threads(has)
        learner = learner_of(text, tmp_path, f"train.threads={most}")
        taken, loss = [], learner.loss

        def watched(*given, taken=taken, loss=loss):
            taken.append(torch.get_num_threads())
            return loss(*given)

        learner.loss = watched
        optimizer_step(learner)
        assert taken == [takes]
        assert learner.state()["threads"] == takes
        assert torch.get_num_threads() == has


def test_with_limited_threads_a_run_goes_on_bitwise_where_there_are_more(
    text, tmp_path, threads, capsys
):
    limited = config(text, "train.threads=2", "model.d_model=64", "train.micro_batch_size=32")
    threads(2)
    train(limited, tmp_path / "whole", quiet=True)
    with cut_at(5, signal.SIGINT):
        train(limited, tmp_path / "cut", quiet=True)
    threads(4)
    train(limited, tmp_path / "cut", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert "warning" not in capsys.readouterr().out


def test_a_validation_is_not_counted_twice_by_a_resume(text, tmp_path):
    """The best step is saved after its validation; doing that again would use up patience."""
    settings = ("eval.every=2", "checkpoint.every=0")
    with cut_at(3):
        train(config(text, *settings), tmp_path / "run", quiet=True)
    train(config(text, *settings), tmp_path / "run", resume=True, quiet=True)
    assert [event["step"] for event in events(tmp_path / "run", "eval")] == [2, 4, 6, 8]


def losses_of(run):
    return {event["step"]: event["loss"] for event in events(run, "train")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_within_the_step_and_exits_75(text, tmp_path, number):
    with cut_at(3, number) as stopped:
        train(config(text), tmp_path / "run", quiet=True)
    assert stopped.value.exit_code == 75
    assert Run.open(tmp_path / "run").latest.name == "step-00000003"
    assert signal.getsignal(number) is not None


def test_early_stopping_ends_and_stays_ended(text, tmp_path):
    settings = ("train.patience=2", "eval.every=1", "optim.lr=1.0", "train.max_steps=50")
    result = train(config(text, *settings), tmp_path / "run", quiet=True)
    assert result.reason == "early stop"
    assert result.step < 50
    again = train(config(text, *settings), tmp_path / "run", resume=True, quiet=True)
    assert (again.step, again.reason) == (result.step, "early stop")


def test_a_finished_run_says_so_and_more_steps_carry_it_on(text, tmp_path, capsys):
    run = tmp_path / "run"
    train(config(text), run, quiet=True)
    before = len(events(run))
    train(config(text), run, resume=True)
    assert "finished" in capsys.readouterr().out
    assert len(events(run)) == before
    assert train(config(text, "train.max_steps=10"), run, resume=True, quiet=True).step == 10


def test_a_non_finite_step_is_skipped_counted_and_never_saved(text, tmp_path, monkeypatch):
    poison_loss(monkeypatch, {3}, math.nan)
    train(config(text), tmp_path / "run", quiet=True)
    assert [event["step"] for event in events(tmp_path / "run", "skip")] == [3]
    assert all(torch.isfinite(value).all() for value in saved(tmp_path / "run")[1].values())
    assert events(tmp_path / "run")[-1]["skipped"] == 1


def test_too_many_bad_steps_end_the_run_with_the_last_good_state(text, tmp_path, monkeypatch):
    poison_loss(monkeypatch, range(4, 100), math.nan)
    with pytest.raises(NonFiniteError, match="in a row"):
        train(config(text, "train.max_bad_steps=3"), tmp_path / "run", quiet=True)
    assert all(torch.isfinite(value).all() for value in saved(tmp_path / "run")[1].values())


def test_a_full_disk_is_survived_twice_and_fatal_the_third_time(text, tmp_path, monkeypatch):
    plain, failures = Run.save, []

    def save(self, *args, **kwargs):
        if len(failures) < limit:
            failures.append(1)
            raise ResourceError("No space left on device")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Run, "save", save)
    limit = 2
    assert train(config(text), tmp_path / "two", quiet=True).reason == "finished"
    failures.clear()
    limit = 99
    with pytest.raises(ResourceError, match="No space"):
        train(config(text), tmp_path / "three", quiet=True)


def test_other_settings_or_another_text_are_refused_on_resume(text, tmp_path):
    train(config(text, "train.max_steps=2"), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config(text), tmp_path / "run", quiet=True)
    text.write_text(FOX.replace("fox", "cat"), encoding="utf-8")
    with pytest.raises((DataError, ConfigError), match="text has changed"):
        train(config(text), tmp_path / "run", resume=True, quiet=True)


def test_two_trainings_of_one_run_are_refused(text, tmp_path):
    train(config(text, "train.max_steps=2"), tmp_path / "run", quiet=True)
    with Run.open(tmp_path / "run").locked(), pytest.raises(ConfigError, match="process"):
        train(config(text), tmp_path / "run", resume=True, quiet=True)


def test_bf16_trains_to_within_two_percent_of_fp32(text, tmp_path):
    results = [
        train(
            config(text, "train.max_steps=60", f"train.precision={precision}"),
            tmp_path / precision,
            quiet=True,
        ).best_val_loss
        for precision in ("fp32", "bf16")
    ]
    assert results[1] == pytest.approx(results[0], rel=0.02)
    with pytest.raises(ConfigError, match="bf16 or fp32"):
        train(config(text, "train.precision=fp16"), tmp_path / "fp16", quiet=True)


def test_checkpointing_activations_and_chunking_the_loss_change_nothing(text, tmp_path):
    plain = learner_of(text, tmp_path)
    thrifty = learner_of(text, tmp_path, "train.grad_checkpoint=true", "train.loss_chunk=7")
    assert_same_step(plain, thrifty)


def test_layer_norms_sum_to_the_global_norm(text, tmp_path):
    step = optimizer_step(learner_of(text, tmp_path), with_layers=True)
    assert set(step.layers) == {"blocks.0", "blocks.1", "rest"}
    total = math.sqrt(sum(norm**2 for norm in step.layers.values()))
    assert total == pytest.approx(step.grad_norm, rel=1e-5)


def test_text_from_standard_input_is_kept_with_the_run(tmp_path, monkeypatch):
    import io

    stdin = type("Stdin", (), {"buffer": io.BytesIO(FOX.encode()), "isatty": lambda self: False})()
    monkeypatch.setattr(sys, "stdin", stdin)
    train(config("-", "train.max_steps=2"), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "input.txt").read_text(encoding="utf-8") == FOX
    more = dataclasses.replace(Run.open(tmp_path / "run").config)
    more = dataclasses.replace(more, train=dataclasses.replace(more.train, max_steps=4))
    assert train(more, tmp_path / "run", resume=True, quiet=True).step == 4


def test_tensorboard_gets_the_same_numbers(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(text, "log.to=[tensorboard]"), tmp_path / "run", quiet=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == pytest.approx(losses_of(tmp_path / "run"))


def test_from_python_in_three_lines(text, tmp_path):
    octavo.train(config(text, "train.max_steps=3"), tmp_path / "run", quiet=True)
    lm = octavo.load(tmp_path / "run")
    assert len(lm.generate("The", max_new_tokens=5, temperature=0)) == 5


def test_wandb_offline_gets_the_numbers_and_no_network(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = ("log.to=[wandb]", "log.project=sea", "log.run_name=shells")
    train(config(text, *settings), tmp_path / "run", quiet=True)
    (session,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"train/loss" not in (recorded := session.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)  # a process of W&B's own writes, and may still do so after finish()
    assert b"train/loss" in recorded
    assert b"shells" in recorded


def test_a_missing_extra_names_the_line_that_installs_it(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'pip install "octavo\[track\]"'):
        train(config(text, "log.to=[wandb]"), tmp_path / "run", quiet=True)
