"""A run with a budget ends by the clock: on time and annealed, however fast the machine is.

The clock here is the test's own: it moves by what each step and each validation is said to take.
"""

import json
from types import SimpleNamespace

import pytest
from training_kit import config_of, events

from octavo.errors import ConfigError, Preempted
from octavo.training import deadline as deadline_module
from octavo.training import keeper as keeper_module
from octavo.training import loop as loop_module
from octavo.training.deadline import LEAVING
from octavo.training.display import seconds_of
from octavo.training.loop import train

SETTINGS = (
    "data.tokenizer=char", "model.block_size=16", "model.n_layer=1", "model.n_head=2",
    "model.d_model=16", "train.micro_batch_size=2", "eval.every=25", "eval.windows=4",
    "log.every=1", "log.sample_tokens=5", "log.sample_every=0", "checkpoint.every=0",
    "train.max_steps=3", "train.compile=false", "recipe=modern", "train.spike_window=0",
    "optim.schedule=trapezoid", "optim.cooldown=0.5",
)  # fmt: skip


class Clock:
    """Seconds that pass only when a step or a validation takes them."""

    def __init__(self, monkeypatch, seconds_of_step):
        self.now, self.steps, self.validating = 1000.0, 0, 0.0
        self.seconds_of_step = seconds_of_step
        step, validate = loop_module.optimizer_step, keeper_module.validate

        def slow_step(*args):
            self.now += self.seconds_of_step(self.steps)
            self.steps += 1
            return step(*args)

        def slow_validate(learner):
            self.now += self.validating
            return validate(learner)

        own = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        for module in (keeper_module, deadline_module, loop_module):
            monkeypatch.setattr(module, "time", own)
        monkeypatch.setattr(loop_module, "optimizer_step", slow_step)
        monkeypatch.setattr(keeper_module, "validate", slow_validate)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    return path


def run(text, budget, clock, *more, **options):
    config = config_of(text, *SETTINGS, f"train.budget={budget}", *more)
    return train(config, text.parent / "run", quiet=True, began=clock.now, **options)


def rates(result):
    return [event["lr"] for event in events(result.run, "train")]


def test_it_takes_as_many_steps_as_there_is_time_for_and_ends_annealed(text, monkeypatch):
    clock = Clock(monkeypatch, lambda step: 0.5)
    result = run(text, 50 + LEAVING, clock)
    assert result.step == 100
    assert clock.now == pytest.approx(1050)
    found = rates(result)
    assert found[49] == found[0]
    assert found[-1] == pytest.approx(found[0] / 50, rel=0.05)  # the last step of a cooldown of 50


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_it_ends_on_time_when_the_machine_changes_its_pace(text, monkeypatch, factor):
    clock = Clock(monkeypatch, lambda step: 0.5 if step < 60 else 0.5 * factor)
    result = run(text, 50 + LEAVING, clock)
    assert clock.now == pytest.approx(1050, abs=0.5 * factor)
    assert rates(result)[-1] < 0.05 * rates(result)[0]


def test_validations_take_of_the_time_and_the_last_one_fits(text, monkeypatch):
    clock = Clock(monkeypatch, lambda step: 0.5)
    clock.validating = 4.0
    result = run(text, 50 + LEAVING, clock, "eval.every=30")
    assert clock.now == pytest.approx(1050, abs=1)
    assert result.step == 76  # after 30 and 60 steps one of four seconds, and one at the end


def test_a_stopped_run_has_what_is_left_of_its_time(text, monkeypatch):
    clock = Clock(monkeypatch, lambda step: 0.5)
    agreed = loop_module._Stop.agreed
    monkeypatch.setattr(loop_module._Stop, "agreed", lambda self: clock.steps == 40)
    with pytest.raises(Preempted, match="at step 40 of 100"):
        run(text, 50 + LEAVING, clock)
    monkeypatch.setattr(loop_module._Stop, "agreed", agreed)
    clock.now += 10_000
    result = run(text, 50 + LEAVING, clock, resume=True)
    assert result.step == 100
    assert clock.now == pytest.approx(11_050)
    assert run(text, 50 + LEAVING, clock, resume=True).step == 100  # it is over
    assert run(text, 60 + LEAVING, clock, resume=True).step == 120  # unless there is more


def test_a_draft_gets_a_tenth_of_the_time(text, monkeypatch):
    clock = Clock(monkeypatch, lambda step: 0.5)
    result = run(text, 100 + LEAVING, clock, "train.draft=true", "model.n_layer=4")
    draft = json.loads((result.run / "draft" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.step == 180
    assert 14 <= draft["step"] <= 20
    assert clock.now <= 1100 + LEAVING


@pytest.mark.parametrize("text", ["", "soon", "15 minutes", "0", "m", "-3m", "1m1h"])
def test_what_is_no_time_is_said(text):
    with pytest.raises(ConfigError, match="15m, 90s or 1h30m"):
        seconds_of(text)
