"""`octavo grow`: a run becomes a larger one that computes the same, and training goes on."""

import dataclasses
import io
import types

import pytest
from command_kit import SEA, SMALL, figures, octavo, printed, sea_run

from octavo.adapting import grow as growing
from octavo.checkpoint import Run
from octavo.config import FinetuneConfig, LoraConfig
from octavo.errors import ConfigError
from octavo.language_model import load
from octavo.training.growing import grow_run
from octavo.training.task import score_validation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sea_run(tmp_path_factory.mktemp("grow"))


def test_a_larger_run_computes_the_same_and_trains_on(run, tmp_path, capsys):
    out = tmp_path / "larger"
    words = ["model.n_layer=3", "model.d_ff=80", "model.block_size=24", "optim.lr=5e-4"]
    said = printed(capsys, "grow", run, "--out", out, *words)
    assert "n layer" in said
    assert "1 -> 3" in said
    assert f"octavo train {out} --resume" in said
    old, new = load(run), load(out)
    assert new.config.n_layer == 3
    assert new.run.config.optim.lr == 5e-4
    ids = old.tokenizer.encode("She sells sea sh")
    assert abs(old.logits(ids) - new.logits(ids)).max() <= 1e-5
    assert Run.open(out).load().manifest.facts["grown_from"].endswith("step-00000006")
    assert octavo("train", out, "--resume", "--quiet") == 0
    trained = Run.open(out).load()
    assert trained.step == 6
    assert trained.optimizer_tensors()
    assert abs(old.logits(ids) - load(out).logits(ids)).max() > 1e-3


def test_where_the_function_changes_the_loss_is_said(run, tmp_path, capsys):
    out = tmp_path / "grouped"
    facts = figures(capsys, "grow", run, "--out", out, "model.n_kv_head=1")
    assert facts["computes_the_same"] is False
    before, after = score_validation(load(run)).loss, score_validation(load(out)).loss
    assert facts["loss_before"] == pytest.approx(before, rel=1e-6)
    assert facts["loss_after"] == pytest.approx(after, rel=1e-6)
    assert facts["change_in_loss"] == pytest.approx(after - before, abs=1e-6)


def test_padded_ids_and_text_from_standard_input_travel(tmp_path, monkeypatch, capsys):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(SEA.encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert octavo("train", "-", *SMALL, "--out", tmp_path / "piped", "--quiet") == 0
    words = ["model.vocab_size=20", "model.pad_vocab_to=1"]
    assert octavo("grow", tmp_path / "piped", "--out", tmp_path / "grown", *words) == 0
    assert octavo("train", tmp_path / "grown", "--resume", "--quiet") == 0
    assert load(tmp_path / "grown").config.vocab_size == 20
    assert "loss before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["model.n_layer=1"], 2, "nothing would grow"),
        (["model.d_model=32"], 2, "d_model cannot grow"),
        (["model.vocab_size=3"], 2, "smaller than the tokenizer's"),
        (["model.block_size=9999"], 3, "the text has"),
        (["model.n_layre=3"], 2, "did you mean model.n_layer"),
    ],
)
def test_what_cannot_be_leaves_nothing(run, tmp_path, capsys, words, code, message):
    assert octavo("grow", run, "--out", tmp_path / "new", *words) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_to_is_asked_and_nothing_is_overwritten(run, capsys):
    assert octavo("grow", run, "model.n_layer=2") == 2
    assert "--out RUN" in capsys.readouterr().err
    assert octavo("grow", run, "--out", run, "model.n_layer=2") == 2
    assert "is there already" in capsys.readouterr().err


def test_a_growth_that_fails_its_check_is_exit_8_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "_silent", lambda name, fresh, config: fresh)
    assert octavo("grow", run, "--out", tmp_path / "new", "model.n_layer=2") == 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lora=LoraConfig(rank=4)), "merge it first: octavo merge"),
        (dict(finetune=FinetuneConfig(labels=["a", "b"])), "a classifier cannot grow"),
    ],
)
def test_only_whole_language_models_grow(run, tmp_path, changes, message):
    lm = load(run)
    vars(lm.run)["config"] = dataclasses.replace(lm.run.config, **changes)
    with pytest.raises(ConfigError, match=message):
        grow_run(lm, tmp_path / "new", ["model.n_layer=2"])


def test_an_imported_model_grows_without_a_text(run, tmp_path):
    """It has weights and a tokenizer, and only what it came from in its data.json."""
    lm = load(run)
    imported = dataclasses.replace(lm.run.config.data, source=None)
    vars(lm.run)["config"] = dataclasses.replace(lm.run.config, data=imported)
    (tmp_path / "imported").mkdir()
    config = (run / "config.yaml").read_text(encoding="utf-8")
    config = config.replace(f"source: {run.parent / 'sea.txt'}", "source: null")
    for name, data in {"config.yaml": config, "data.json": "{}"}.items():
        (tmp_path / "imported" / name).write_text(data, encoding="utf-8")
    lm.run.path = tmp_path / "imported"
    facts = grow_run(lm, tmp_path / "new", ["model.n_kv_head=1"])
    assert facts["remarks"] == ["there is no validation text to say what the change costs"]
    assert load(tmp_path / "new").config.n_kv_head == 1
