"""A time is turned into a model: a law decides, the user's own settings hold, it ends in time."""

import itertools
import json
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from octavo.config import Config, load_config
from octavo.errors import ConfigError
from octavo.model_config import ModelConfig
from octavo.studies import budget as budget_module
from octavo.studies.budget import Choice, choose
from octavo.training.display import Display


def model_of(width, layers):
    return ModelConfig(vocab_size=65, d_model=width, n_layer=layers, n_head=2)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 2000, encoding="utf-8")
    return path


class Machine:
    """Tries models at a billion operations a second, or at what each step in turn is given.

    ``gains`` says how many times faster it is where a step is limited to so many threads.
    """

    speeds = itertools.repeat(1e9)

    def __init__(self, monkeypatch):
        machine, self.widths, self.gains = self, [], {0: 1.0}

        class Trial(budget_module.Trial):
            def __init__(self, config, source, device):
                self.model = ModelConfig(**{**vars(config.model), "vocab_size": source.vocab_size})
                self.rates, self.threads = [], config.train.threads
                machine.widths.append(self.model.d_model)

            def step(self):
                cost = 12 * 6 * self.model.n_layer * self.model.d_model**2
                self.rates.append(next(machine.speeds) / cost * machine.gains[self.threads])

        monkeypatch.setattr(budget_module, "Trial", Trial)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def tried(machine):
    """The widths that are tried."""
    return machine.widths


def chosen(text, budget, *settings, began=None):
    settings = [f"train.budget={budget}", *settings]
    source = f"data.source={json.dumps(str(text))}"
    config = load_config(None, [*settings, source])
    began = time.monotonic() if began is None else began
    return choose(config, settings, text.parent / "run", began, Display(quiet=True))[0]


def test_more_time_buys_a_larger_model_and_more_tokens(text, tried):
    runs = [chosen(text, budget) for budget in (30, 300, 3000, 30_000)]
    widths = [run.model.d_model for run in runs]
    tokens = [run.train.max_steps * run.train.batch_size * run.model.block_size for run in runs]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert tokens == sorted(tokens)


def test_it_tries_one_model_more_than_the_best(text, tried):
    best = chosen(text, 300, "model.block_size=256").model.d_model
    assert tried[-2] == best
    assert tried == sorted(tried)


@pytest.mark.parametrize("phase", [5, 6, 9, 30])
def test_models_are_told_apart_on_a_machine_whose_speed_swings(machine, phase):
    """Half as fast for some steps and then again as it was: one of two models had met the worse."""
    swinging = [1e9] * phase + [5e8] * phase
    for began in range(2 * phase):
        machine.speeds = itertools.islice(itertools.cycle(swinging), began, None)
        source = SimpleNamespace(vocab_size=65)
        small, large = (
            budget_module.Trial(Config(model=model_of(width, 4)), source, None)
            for width in (64, 128)
        )
        budget_module.race(small, None)
        assert budget_module.race(large, small) == statistics.median(small.rates) / 4


def test_models_are_compared_in_the_same_seconds(text, machine, monkeypatch):
    """Slower from one trial to the next: what the best was seen to do before counts no longer."""
    compared: list[Choice] = []
    excess = Choice.excess.fget
    monkeypatch.setattr(Choice, "excess", property(lambda of: compared.append(of) or excess(of)))
    machine.speeds = (1e9 * 0.9**step for step in itertools.count())
    chosen(text, 300, "model.dropout=0")
    assert compared
    for choice, best in zip(compared[::2], compared[1::2], strict=True):
        sizes = [of.model.n_layer * of.model.d_model**2 for of in (choice, best)]
        assert choice.speed / best.speed == pytest.approx(sizes[1] / sizes[0], rel=0.12)


@pytest.mark.parametrize(
    ("cores", "gains", "best"),
    [
        (16, {8: 1.5, 4: 1.8, 2: 1.7}, 4),  # two are slower than four
        (16, {8: 1.01}, 0),  # not worth it
        (6, {3: 1.2, 1: 0.6}, 3),
        (4, {2: 1.5, 1: 2.0}, 1),
        (2, {}, 0),  # nothing is tried, or there would be no gain to look up
    ],
)
def test_as_many_threads_as_are_fastest(text, machine, monkeypatch, cores, gains, best):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    machine.gains |= gains
    assert chosen(text, 300).train.threads == best


def test_fewer_threads_buy_more_tokens(text, machine, monkeypatch):
    def tokens():
        run = chosen(text, 300, "model.d_model=64", "model.n_head=2", "model.n_layer=3")
        return run.train.max_steps * run.train.batch_size * run.model.block_size

    before = tokens()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    machine.gains |= {4: 2.0, 2: 1.0}
    assert tokens() == pytest.approx(2 * before, rel=0.1)


def test_the_law_prefers_new_tokens_to_old_ones_and_large_models_to_small_ones():
    def excess(model, tokens, unique):
        return Choice([], model, 1.0, tokens, unique, 1.0).excess

    small, large = model_of(64, 2), model_of(128, 4)
    assert excess(small, 1e6, 10**6) < excess(small, 1e6, 10**5) < excess(small, 1e5, 10**5)
    assert excess(large, 1e6, 10**6) < excess(small, 1e6, 10**6)


def test_a_text_read_often_gets_dropout(tmp_path, tried):
    """Where the model could come to know it by heart, and nowhere else."""
    rates = []
    for repeats in (100, 400, 200_000):
        path = tmp_path / "text.txt"
        path.write_text("The quick brown fox jumps over it.\n" * repeats, encoding="utf-8")
        rates.append(chosen(path, 60).model.dropout)
    assert rates == [0.2, 0.2, 0.0]
    assert chosen(path, 60, "model.dropout=0.3").model.dropout == 0.3


def test_rates_rise_with_the_root_of_a_step_up_to_twice(text, tried):
    """The recipe's 0.015 is for steps of 768 tokens."""
    for budget in (30, 300, 30_000):
        run = chosen(text, budget)
        tokens = run.train.batch_size * run.model.block_size
        rate = 0.015 * min((tokens / 768) ** 0.5, 2.0)
        assert run.optim.lr == run.optim.muon_lr == pytest.approx(rate, rel=5e-3)
    assert rate == 0.03


def test_what_is_read_often_decays_more(tmp_path, tried):
    """One epoch wants the recipe's 0.1, nine four times that."""
    path = tmp_path / "text.txt"
    decays = []
    for repeats in (400_000, 10_000, 100):
        path.write_text("The quick brown fox.\n" * repeats, encoding="utf-8")
        run = chosen(path, 300, "model.d_model=64", "model.n_head=2", "model.n_layer=3")
        tokens = run.train.max_steps * run.train.batch_size * run.model.block_size
        epochs = tokens / (0.9 * 21 * repeats)
        decays.append(run.optim.weight_decay)
        assert decays[-1] == pytest.approx(min(max(0.05 * epochs, 0.1), 0.4), rel=0.1)
    assert (decays[0], decays[-1]) == (0.1, 0.4)


def test_in_little_time_less_is_seen_at_once(text, tried):
    for budget, context in ((3, 128), (30, 128), (30_000, 256)):
        assert chosen(text, budget).model.block_size == context


def test_what_the_user_sets_holds(text, tried):
    words = ["model.n_embd=96", "model.n_layer=2", "model.n_head=3", "optim.lr=0.5"]
    words += ["model.block_size=200", "train.micro_batch_size=7", "model.qk_norm=false"]
    run = chosen(text, 60, *words)
    assert tried == [96]
    assert (run.model.n_layer, run.model.n_head, run.model.qk_norm) == (2, 3, False)
    assert run.model.block_size == 200
    assert (run.optim.lr, run.optim.name, run.train.micro_batch_size) == (0.5, "muon", 7)


def test_the_users_threads_hold(text, machine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    machine.gains = {3: 1.0}  # there are trials with 3 threads and with no other number
    assert chosen(text, 60, "train.threads=3").train.threads == 3


def test_validations_take_little_of_the_time(text, tried):
    run = chosen(text, 60)
    speed = 1e9 / (12 * 6 * run.model.n_layer * run.model.d_model**2)
    seconds = min(384 * run.model.block_size, 9000) / (3 * speed)
    assert (run.train.max_steps // run.eval.every) * seconds <= 0.031 * 60 + seconds


def test_it_is_not_chosen_by_many_processes_at_once(text, tried, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"CONFIG\.yaml with --budget"):
        chosen(text, 60)


@pytest.mark.long
def test_the_command_ends_on_time_and_annealed(text):
    out, began = text.parent / "run", time.monotonic()
    words = ["train", str(text), "--budget", "15s", "--out", str(out), "log.every=1"]
    done = subprocess.run([sys.executable, "-m", "octavo", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30  # a slow machine is allowed much, a lost clock is not
    assert "best for the time: " in done.stdout
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [event["lr"] for event in map(json.loads, lines) if event["event"] == "train"]
    assert rates[-1] < 0.1 * rates[0]
