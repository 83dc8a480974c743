"""The black box: what leaps is told from what falls, and the report says which rows and where."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_kit import FOX, config_of, events, poison_loss

from octavo.text.batches import Batches
from octavo.training import learner as learner_module
from octavo.training.display import Display
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.loop import train
from octavo.training.request import finetune_request
from octavo.training.spike import MIN_READINGS, height_of, spiking
from octavo.training.task import prepare

POISON = "zqxjzqxjzqxjzqxj"
POISONED_ROW = 4 * 34 + 1  # the second row of the 35th step
SMALL = (
    "model.block_size=16", "model.n_layer=2", "model.n_head=2", "model.d_model=16",
    "train.max_steps=44", "train.micro_batch_size=4", "optim.warmup=2", "optim.lr=3e-2",
    "eval.every=0", "eval.windows=8", "checkpoint.every=10", "log.every=1", "log.sample_every=0",
    "log.sample_tokens=5", "train.spike_window=20",
)  # fmt: skip


def config(source, *settings):
    return config_of(source, *SMALL, *settings)


def poisoned_text(tmp_path):
    """A text whose row `POISONED_ROW` is nonsense; everywhere else it is easy."""
    path = tmp_path / "fox.txt"
    path.write_text(FOX * 3, encoding="utf-8")
    batches = prepare(config(path), "cpu", tmp_path / "none").batches
    assert isinstance(batches, Batches)
    start = int(batches.starts(POISONED_ROW, 1)[0]) + 1
    text = FOX * 3
    path.write_text(text[:start] + POISON + text[start + len(POISON) :], encoding="utf-8")
    return path


@pytest.fixture
def poisoned(tmp_path):
    return poisoned_text(tmp_path)


def report_of(run, step):
    return json.loads((run / "spikes" / f"step-{step:08d}.json").read_text(encoding="utf-8"))


def reading(loss, grad_norm=1.0, scale=None):
    return {"loss": loss, "grad_norm": grad_norm, "scale": scale, "layers": {}}


def test_a_poisoned_row_is_found_named_and_shown(poisoned, tmp_path, capsys):
    run = tmp_path / "run"
    train(config(poisoned), run)
    (event,) = events(run, "spike")
    assert event["step"] == 35
    assert event["row"] == POISONED_ROW
    report = report_of(run, 35)
    assert report["standing_out"] == [POISONED_ROW]
    worst = report["worst"][0]
    assert POISON in worst["text"]
    start = int(worst["where"].split()[1].replace(",", ""))
    assert poisoned.read_text(encoding="utf-8")[start : start + 17] == worst["text"]
    assert all(hard["target"] in POISON for hard in worst["hardest"])
    # The rows' mean is the loss of the step, for there is no dropout here.
    logged = next(e for e in events(run, "train") if e["step"] == 35)
    assert np.mean(report["losses"]) == pytest.approx(logged["loss"], rel=1e-5)
    assert len(report["recent"]) == 21
    assert report["recent"][-1]["loss"] == logged["loss"]
    text = (run / event["report"]).read_text(encoding="utf-8")
    assert POISON in text
    assert "σ above its median" in text
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "spike" in line]
    assert line.startswith("spike at step 35: loss ")
    assert line.endswith("step-00000035.txt")


def test_watching_changes_nothing_of_what_is_learned(poisoned, tmp_path):
    """The report runs the model once more: neither a draw nor a mode may be left changed."""
    ends = []
    for name, window in (("watched", 20), ("not", 0)):
        settings = (f"train.spike_window={window}", "train.spike_sigmas=4", "model.dropout=0.05")
        train(config(poisoned, *settings), tmp_path / name, quiet=True)
        ends.append([e["loss"] for e in events(tmp_path / name, "train")])
    assert (tmp_path / "watched" / "spikes").exists()
    assert not (tmp_path / "not" / "spikes").exists()
    assert ends[0] == ends[1]


def spoil(monkeypatch, step, how):
    """Let ``how(learner)`` befall the learner right before ``step`` (counted from 1)."""
    plain = learner_module.optimizer_step

    def spoiled(learner, with_layers=False):
        handle = how(learner) if learner.progress.step + 1 == step else None
        try:
            return plain(learner, with_layers)
        finally:
            if handle:
                handle.remove()

    monkeypatch.setattr("octavo.training.loop.optimizer_step", spoiled)


def nan_activations(learner):
    block = learner.body.blocks[1]
    return block.register_forward_hook(lambda module, inputs, output: output * math.nan)


def nan_gradient(learner):
    """From the last block on down to the embeddings, which the head's weights are tied to."""
    mlp = learner.body.blocks[1].mlp
    return mlp.register_full_backward_hook(lambda module, into, out: (into[0] * math.nan,))


@pytest.mark.parametrize(
    ("how", "what", "began"),
    [
        (nan_activations, "the loss is not finite", "blocks.1: the first whose activations"),
        (nan_gradient, "the gradient is not finite", "blocks.1: on the way back the first"),
    ],
)
def test_what_is_not_finite_is_reported_with_the_layer_where_it_began(
    poisoned, tmp_path, monkeypatch, how, what, began
):
    spoil(monkeypatch, 3, how)
    run = tmp_path / "run"
    train(config(poisoned, "train.max_steps=5"), run, quiet=True)
    assert [event["step"] for event in events(run, "skip")] == [3]
    (event,) = events(run, "spike")
    assert (event["step"], event["reason"]) == (3, what)
    assert event["began"].startswith(began)
    text = (run / event["report"]).read_text(encoding="utf-8")
    assert began in text
    json.loads((run / "spikes" / "step-00000003.json").read_text(), parse_constant=pytest.fail)


def test_the_layer_whose_gradient_jumped_most_is_named(poisoned, tmp_path, monkeypatch):
    def jump(learner):
        weight = learner.body.blocks[1].attn.v_proj.weight
        return weight.register_hook(lambda gradient: gradient * 1e4)

    spoil(monkeypatch, 30, jump)
    run = tmp_path / "run"
    train(config(poisoned, "train.max_steps=31"), run, quiet=True)
    (event,) = events(run, "spike")
    assert event["reason"].startswith("gradient norm")
    assert event["began"].startswith("blocks.1: its gradient norm is")
    assert report_of(run, 30)["standing_out"] == [], "the rows were like all others"


def test_a_report_that_cannot_be_made_does_no_harm(poisoned, tmp_path, monkeypatch):
    def too_much(*args):
        raise RuntimeError("out of memory\nand a long trace")

    monkeypatch.setattr("octavo.training.spike.token_nats", too_much)
    run = tmp_path / "run"
    assert train(config(poisoned), run, quiet=True).reason == "finished"
    assert report_of(run, 35)["unknown"] == "out of memory"
    assert "could not be looked at: out of memory" in (
        run / "spikes" / "step-00000035.txt"
    ).read_text(encoding="utf-8")


def test_ids_without_a_tokenizer_are_shown_as_ids(tmp_path, monkeypatch):
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 9, 2000).astype(np.uint16))
    spoil(monkeypatch, 2, nan_activations)
    train(config(path, "train.max_steps=3"), tmp_path / "run", quiet=True)
    worst = report_of(tmp_path / "run", 2)["worst"][0]
    assert len(worst["text"].split()) == 17
    assert all(isinstance(hard["target"], int) for hard in worst["hardest"])


@pytest.mark.parametrize("labels", [False, True], ids=["completions", "labels"])
def test_examples_are_shown_without_their_padding(poisoned, tmp_path, monkeypatch, labels):
    train(config(poisoned, "train.max_steps=2"), tmp_path / "base", quiet=True)
    names = ("text", "label") if labels else ("prompt", "completion")
    pairs = [("The fox", "box"), ("The quick", "dog"), ("Pack my", "box")] * 8
    lines = [json.dumps(dict(zip(names, pair, strict=True))) for pair in pairs]
    (tmp_path / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    request = finetune_request(
        [str(tmp_path / "base"), str(tmp_path / "records.jsonl")],
        ["train.max_steps=3", "train.micro_batch_size=4", "eval.windows=4"],
        train_all=True, head_only=False, labels=labels,
    )  # fmt: skip
    spoil(monkeypatch, 2, nan_activations)
    train(request.config, tmp_path / "tuned", quiet=True)
    for worst in report_of(tmp_path / "tuned", 2)["worst"]:
        assert worst["where"].startswith("example ")
        if labels:
            assert [worst["text"], worst["hardest"][0]["target"]] in [[*pair] for pair in pairs]
        else:
            assert any(worst["text"].startswith("".join(pair)) for pair in pairs)


def test_spikes_are_told_from_what_only_falls_wobbles_or_has_no_history():
    falling = [reading(5 * 0.96**i) for i in range(40)]
    assert spiking(falling, reading(5 * 0.96**40), 6) == ""
    assert spiking(falling, reading(5 * 0.96**20), 6), "a fall does not hide a leap back"
    steady = [reading(2 + 0.02 * math.sin(i)) for i in range(40)]
    assert spiking(steady, reading(2.1), 6) == ""
    assert spiking(steady, reading(4.0), 6).startswith("loss 4 is ")
    assert spiking(steady, reading(2.0, grad_norm=5), 6).startswith("gradient norm 5 is ")
    assert spiking(steady[: MIN_READINGS - 1], reading(100.0), 6) == ""
    assert spiking([], reading(None), 6) == "the loss is not finite"
    assert spiking([], reading(1.0, None), 6) == "the gradient is not finite"
    assert spiking([], reading(1.0, None, scale=65536.0), 6) == "", "the scaler sees to that"


def test_one_spike_in_the_window_does_not_hide_the_next():
    """With mean and standard deviation it would: 100 among sixteen 2s makes σ 23."""
    before = [reading(2 + 0.02 * math.sin(i)) for i in range(20)] + [reading(100.0)]
    assert spiking(before, reading(4.0), 6)


@given(
    st.lists(st.floats(0.1, 100), min_size=MIN_READINGS, max_size=64),
    st.floats(0.1, 100),
    st.floats(1e-3, 1e3),
)
def test_the_rule_does_not_depend_on_the_unit(sample, value, factor):
    height, median = height_of(sample, value, 0.02)
    scaled = height_of([v * factor for v in sample], value * factor, 0.02)
    assert scaled == pytest.approx((height, median * factor), rel=1e-6, abs=1e-6)


def test_a_spike_that_lasts_is_one_spike(poisoned, tmp_path, monkeypatch):
    poison_loss(monkeypatch, range(30, 36))
    train(config(poisoned, "train.max_steps=38"), tmp_path / "run", quiet=True)
    assert [event["step"] for event in events(tmp_path / "run", "spike")] == [30]


def test_the_ring_stays_small(poisoned, tmp_path):
    """Rows are kept as numbers, their text is fetched again: a reading is a few hundred bytes."""
    task = prepare(config(poisoned, "train.spike_window=64"), "cpu", tmp_path / "none")
    learner = build_learner(task, torch.device("cpu"), Display(quiet=True))
    for _ in range(70):
        optimizer_step(learner)
    assert len(learner.progress.recent) == 64
    assert len(json.dumps(learner.progress.recent)) < 64 * 300
