"""HellaSwag beside training: on time, once, after saving, and never the end of a run."""

import json
import os
import signal

import pytest
from training_kit import assert_same_weights, config_of, events

import octavo
from octavo.checkpoint import Run
from octavo.errors import ConfigError, DataError, Preempted
from octavo.evaluating.hellaswag import HellaSwag, read_items
from octavo.training.keeper import Keeper
from octavo.training.loop import train

ITEM = {
    "activity_label": "Packing", "ctx": "The quick brown fox", "label": 1,
    "endings": ["jumps over the jugs.", "jumps over the lazy dog.", "packs.", "five dozen."],
}  # fmt: skip
SMALL = (
    "data.tokenizer=byte", "model.block_size=32", "model.n_layer=1", "model.n_head=2",
    "model.d_model=16", "train.max_steps=6", "train.micro_batch_size=4", "eval.every=0",
    "eval.windows=2", "checkpoint.every=0", "log.every=1", "log.sample_every=0",
    "log.sample_tokens=2",
)  # fmt: skip


@pytest.fixture
def items(tmp_path):
    lines = [
        json.dumps({**ITEM, "ctx": f"{number} foxes", "label": number % 4}) for number in range(9)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config(text, items, *settings):
    judged = [f"eval.hellaswag={json.dumps(str(items))}"] if items else []
    return config_of(text, *SMALL, *judged, *settings)


def judged(run):
    return [event["step"] for event in events(run, "judge")]


def test_judged_at_the_interval_and_at_the_end_each_after_saving(text, items, tmp_path, capsys):
    run = train(config(text, items, "eval.hellaswag_every=4"), tmp_path / "run").run
    assert judged(run) == [4, 6]
    saved = set()
    for event in events(run):
        if event["event"] == "save":
            saved.add(event["step"])
        assert event["event"] != "judge" or event["step"] in saved
    printed = capsys.readouterr().out
    assert printed.count("HellaSwag") == 2
    assert "completion, 9 items" in printed
    assert (run / "report.html").exists()


def test_without_an_interval_only_at_the_end(text, items, tmp_path):
    assert judged(train(config(text, items), tmp_path / "run", quiet=True).run) == [6]


def test_at_the_last_step_of_the_interval_once(text, items, tmp_path):
    settings = "eval.hellaswag_every=3", "eval.hellaswag_items=2"
    run = train(config(text, items, *settings), tmp_path / "run", quiet=True).run
    assert judged(run) == [3, 6]
    assert events(run)[-2]["n"] == 2


@pytest.mark.parametrize("protocol", ["completion", "harness"])
def test_the_figures_are_those_of_the_saved_model(text, items, tmp_path, protocol):
    settings = f"eval.hellaswag_protocol={protocol}"
    run = train(config(text, items, settings), tmp_path / "run", quiet=True).run
    event = events(run, "judge")[0]
    lm = octavo.load(Run.open(run).latest)
    score = HellaSwag(read_items(items), lm.tokenizer, protocol).score(lm.model)
    assert event["hellaswag_acc"] == score.acc
    assert event["hellaswag_acc_norm"] == score.acc_norm
    assert event["stderr"] == pytest.approx(score.stderr)
    assert (event["n"], event["protocol"]) == (9, protocol)


def test_judging_changes_nothing_of_the_training(text, items, tmp_path):
    settings = "model.dropout=0.2", "eval.hellaswag_every=1"
    one = train(config(text, items, *settings), tmp_path / "one", quiet=True).run
    other = train(config(text, None, settings[0]), tmp_path / "other", quiet=True).run
    assert_same_weights(one, other)


def test_a_resumed_run_is_not_judged_twice(text, items, tmp_path):
    settings = "eval.hellaswag_every=3"
    run = train(config(text, items, settings), tmp_path / "run", quiet=True).run
    train(config(text, items, settings, "train.max_steps=8"), run, resume=True, quiet=True)
    assert judged(run) == [3, 6, 8]


def test_a_run_killed_while_judging_is_judged_when_it_goes_on(text, items, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    settings = config(text, items, "eval.hellaswag_every=3")
    monkeypatch.setattr(Keeper, "judge", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    assert judged(train(settings, tmp_path / "run", resume=True, quiet=True).run) == [3, 6]


@pytest.mark.parametrize(("every", "stopped_at"), [(4, 4), (0, 6)])
def test_ctrl_c_while_judging_stops_at_once_and_loses_nothing(
    text, items, tmp_path, monkeypatch, every, stopped_at
):
    score = HellaSwag.score

    def interrupted(self, model, watch):
        os.kill(os.getpid(), signal.SIGINT)
        return score(self, model, watch)

    settings = config(text, items, f"eval.hellaswag_every={every}")
    monkeypatch.setattr(HellaSwag, "score", interrupted)
    with pytest.raises(Preempted, match=f"saved at step {stopped_at} of 6"):
        train(settings, tmp_path / "run", quiet=True)
    assert judged(tmp_path / "run") == []
    monkeypatch.undo()
    run = train(settings, tmp_path / "run", resume=True, quiet=True).run
    assert judged(run) == sorted({stopped_at, 6})
    assert events(run)[-1]["event"] == "end"


@pytest.mark.parametrize(
    "failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_ends_the_judgement_not_the_run(
    text, items, tmp_path, monkeypatch, capsys, failure
):
    def fail(*_):
        raise failure

    monkeypatch.setattr(HellaSwag, "score", fail)
    result = train(config(text, items, "eval.hellaswag_every=2"), tmp_path / "run")
    assert (result.reason, result.step) == ("finished", 6)
    assert judged(result.run) == []
    assert "not judged" in capsys.readouterr().out


def test_what_is_wrong_is_found_before_step_0(text, items, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DataError, match="cannot read"):
        train(config(text, tmp_path / "absent.jsonl"), run, quiet=True)
    items.write_text('{"ctx": ', encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        train(config(text, items), run, quiet=True)
    with pytest.raises(ConfigError, match="no items"):
        train(config(text, None, "eval.hellaswag_every=5"), run, quiet=True)
    assert not run.exists()


def test_a_vanished_file_does_not_keep_a_run_from_ending(text, items, tmp_path, monkeypatch):
    """Items are read before step 0 and kept; what happens to the file after is no matter."""
    score = HellaSwag.score

    def then_remove(self, model, watch):
        items.unlink(missing_ok=True)
        return score(self, model, watch)

    monkeypatch.setattr(HellaSwag, "score", then_remove)
    run = train(config(text, items, "eval.hellaswag_every=2"), tmp_path / "run", quiet=True).run
    assert judged(run) == [2, 4, 6]


def test_a_classifier_is_refused_before_step_0(text, items, tmp_path):
    base = train(config(text, None), tmp_path / "base", quiet=True).run
    data = tmp_path / "labels.csv"
    data.write_text("text,label\n" + "fox,yes\njug,no\n" * 20, encoding="utf-8")
    from octavo.training.request import finetune_request

    words = [f"eval.hellaswag={json.dumps(str(items))}", "train.max_steps=1"]
    request = finetune_request([str(base), str(data)], words, False, False, True)
    with pytest.raises(ConfigError, match="write texts"):
        train(request.config, tmp_path / "labels", quiet=True)
