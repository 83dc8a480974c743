"""Going back from a spike: those rows are never learned from, and nothing else is lost."""

import json
import signal

import pytest
import torch
from test_spike import POISON, POISONED_ROW, config, poisoned_text
from training_kit import assert_same_weights, cut_at, events, poison_loss, saved

from octavo.checkpoint import Run
from octavo.reporting.report import read_metrics
from octavo.training import learner as learner_module
from octavo.training.display import Display
from octavo.training.learner import build_learner, restore
from octavo.training.loop import train
from octavo.training.spike import MOST_REWINDS
from octavo.training.task import prepare

REWIND = "train.on_spike=rewind"


@pytest.fixture
def poisoned(tmp_path):
    return poisoned_text(tmp_path)


def assert_same_end(one, other):
    assert_same_weights(one, other)
    assert losses(one) == losses(other)


def losses(run):
    """What still holds of the log, as a report shows it."""
    return {e["step"]: e["loss"] for e in read_metrics(run) if e["event"] == "train"}


def state(run):
    opened = Run.open(run)
    return opened.load(opened.latest).state


def rows_learned_from(monkeypatch):
    """Every (step, first row) that the optimizer was given, in order."""
    plain, seen = learner_module.optimizer_step, []

    def watched(learner, with_layers=False):
        step = plain(learner, with_layers)
        if step.taken:
            reading = learner.progress.recent[-1]
            seen.append((reading["step"], reading["row"]))
        return step

    monkeypatch.setattr("octavo.training.loop.optimizer_step", watched)
    return seen


def test_a_run_goes_back_and_on_with_the_rows_after_the_spike(poisoned, tmp_path, monkeypatch):
    seen, run = rows_learned_from(monkeypatch), tmp_path / "run"
    train(config(poisoned, REWIND), run, quiet=True)
    assert seen[:34] == [(step, 4 * (step - 1)) for step in range(1, 35)]
    # Back to the checkpoint of step 30: step 31 is done again, with the rows after step 35's.
    assert seen[34:] == [(step, 4 * (step - 1) + 20) for step in range(31, 45)]
    assert all(not first <= POISONED_ROW < first + 4 for _, first in seen)
    (back,) = events(run, "rewind")
    assert (back["step"], back["spiked_at"], back["skipped_rows"]) == (30, 35, 20)
    assert state(run)["skipped_rows"] == 20
    assert POISON in events(run, "spike")[0]["text"]
    assert events(run)[-1]["reason"] == "finished"


def test_the_log_reads_as_if_what_was_taken_back_had_never_been(poisoned, tmp_path):
    train(config(poisoned, REWIND), tmp_path / "run", quiet=True)
    told = read_metrics(tmp_path / "run")
    steps = [event["step"] for event in told if event["event"] == "train"]
    assert steps == list(range(1, 45))
    kinds = [event["event"] for event in told]
    assert kinds.count("spike") == kinds.count("rewind") == 1
    assert "Went back from a spike at step 35 to step 30" in (
        tmp_path / "run" / "report.html"
    ).read_text(encoding="utf-8")


CUT = (REWIND, "train.spike_sigmas=4", "model.dropout=0.05")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A text, and a run that met its spike and went back undisturbed."""
    home = tmp_path_factory.mktemp("whole")
    text = poisoned_text(home)
    train(config(text, *CUT), home / "run", quiet=True)
    assert [event["spiked_at"] for event in events(home / "run", "rewind")] == [35]
    return text, home / "run"


# The undisturbed run takes 49 steps: 35 until the spike, then 31 to 44 again.
@pytest.mark.parametrize(
    ("step", "how"),
    [(33, signal.SIGINT), (35, None), (36, None), (36, signal.SIGINT), (39, None), (46, None)],
)
def test_a_run_cut_anywhere_near_a_rewind_ends_as_the_undisturbed_one(whole, tmp_path, step, how):
    """Also when Ctrl-C has saved between the checkpoint and the spike: that one is passed over."""
    text, undisturbed = whole
    with cut_at(step, how):
        train(config(text, *CUT), tmp_path / "cut", quiet=True)
    train(config(text, *CUT), tmp_path / "cut", resume=True, quiet=True)
    assert_same_end(undisturbed, tmp_path / "cut")


def test_the_best_step_is_not_forgotten_on_the_way_back(poisoned, tmp_path):
    settings = (REWIND, "eval.every=33", "train.max_steps=40")
    result = train(config(poisoned, *settings), tmp_path / "run", quiet=True)
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert (result.best_step, result.best_val_loss) == (best["step"], best["metric"])


def test_without_a_checkpoint_the_step_is_left_out(poisoned, tmp_path, monkeypatch):
    seen = rows_learned_from(monkeypatch)
    run = tmp_path / "run"
    train(config(poisoned, REWIND, "checkpoint.every=0"), run, quiet=True)
    assert [step for step, _ in seen] == [step for step in range(1, 45) if step != 35]
    assert events(run, "rewind") == []
    assert [event["step"] for event in events(run, "skip")] == [35]


@pytest.mark.parametrize("spiking", [25, 30])  # 30: the checkpoint of its period was never made
def test_what_comes_back_with_other_rows_is_lived_with(poisoned, tmp_path, monkeypatch, spiking):
    """Else a run whose weights are to blame would go back for ever."""
    poison_loss(monkeypatch, range(spiking, 100))
    run = tmp_path / "run"
    train(config(poisoned, REWIND, f"train.max_steps={spiking + 3}"), run, quiet=True)
    assert [event["step"] for event in events(run, "rewind")] == [20] * MOST_REWINDS
    reports = sorted(path.stem for path in (run / "spikes").glob("*.json"))
    name = f"step-{spiking:08d}"
    assert reports == [name, *(f"{name}-{n}" for n in (2, 3, 4))]
    assert events(run)[-1]["reason"] == "finished"


def test_a_non_finite_step_is_gone_back_from_too(poisoned, tmp_path, monkeypatch):
    poison_loss(monkeypatch, {15}, float("nan"))
    plain = learner_module.optimizer_step
    tried = []

    def once(learner, with_layers=False):
        tried.append(learner.progress.step + 1)
        return plain(learner, with_layers)

    monkeypatch.setattr("octavo.training.loop.optimizer_step", once)
    run = tmp_path / "run"
    train(config(poisoned, REWIND, "train.max_steps=20"), run, quiet=True)
    assert tried[:17] == [*range(1, 16), 11, 12]
    assert all(torch.isfinite(value).all() for value in saved(run)[1].values())


def test_rewinding_can_be_asked_for_on_the_way(poisoned, tmp_path):
    steady = "optim.schedule=constant"
    train(config(poisoned, steady, "train.max_steps=30"), tmp_path / "run", quiet=True)
    train(config(poisoned, steady, REWIND), tmp_path / "run", resume=True, quiet=True)
    assert len(events(tmp_path / "run", "rewind")) == 1


class Once(list):
    """Holds each of its items until it was asked for."""

    def __contains__(self, item):
        if there := super().__contains__(item):
            self.remove(item)
        return there


def test_the_weights_a_run_was_given_are_gone_back_to_without_a_memory(
    poisoned, tmp_path, monkeypatch
):
    """The checkpoint of step 0 has no optimizer state: what was gathered since must go."""
    task = prepare(config(poisoned, REWIND, "train.max_steps=8"), "cpu", tmp_path / "none")
    given = build_learner(task, torch.device("cpu"), Display(quiet=True)).tensors()[0]
    back, straight = tmp_path / "back", tmp_path / "straight"
    for run in (back, straight):
        Run.create(run, task.config, task.tokenizer, task.files, given)
    poison_loss(monkeypatch, Once([5]), float("nan"))
    train(task.config, back, resume=True, quiet=True)
    assert [(e["step"], e["skipped_rows"]) for e in events(back, "rewind")] == [(0, 20)]
    monkeypatch.undo()

    def restore_further_on(learner, run, display):
        restore(learner, run, display)
        learner.progress.skipped_rows = 20

    monkeypatch.setattr("octavo.training.loop.restore", restore_further_on)
    train(task.config, straight, resume=True, quiet=True)
    assert_same_end(back, straight)
