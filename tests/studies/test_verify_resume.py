"""`verify-resume` passes on what resumes exactly, and would not pass on what does not."""

import json

import pytest
from command_kit import octavo

from octavo.config import load_config
from octavo.errors import ConfigError, DataError, OctavoError
from octavo.studies import verify_resume as module
from octavo.studies.verify_resume import RESULT, Verdict, shorten, verify_resume

TINY = [
    "model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.block_size=16",
    "model.dropout=0.1", "train.micro_batch_size=2", "eval.windows=4", "log.sample_tokens=2",
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be, that is the question.\n" * 30, encoding="utf-8")
    return load_config(None, [f"data.source={text}", *TINY])


@pytest.mark.long
def test_a_killed_run_is_the_undisturbed_one_and_a_tampered_one_is_not(
    config, tmp_path, monkeypatch
):
    """Dropout is on and the kill falls between two saves: batches and masks must come again."""
    verdict = verify_resume(config, tmp_path / "a", steps=12, seed=3)
    assert verdict.same
    assert verdict.first_difference is None
    assert verdict.undisturbed == verdict.resumed
    assert {"model.safetensors", "optimizer.safetensors"} == set(verdict.resumed)
    assert 1 <= verdict.killed_at < 12
    assert verdict.resumed_from <= verdict.killed_at
    stored = json.loads((tmp_path / "a" / "resumed" / RESULT).read_text(encoding="utf-8"))
    assert stored["same"] is True

    train = module._train

    def with_another_seed(recipe, out, *more):
        if more:  # what goes on is another run: its random numbers are keyed otherwise
            text = (out / "config.yaml").read_text(encoding="utf-8")
            (out / "config.yaml").write_text(text.replace("seed: 1337", "seed: 1"), "utf-8")
            text = recipe.read_text(encoding="utf-8")
            recipe.write_text(text.replace("seed: 1337", "seed: 1"), encoding="utf-8")
        train(recipe, out, *more)

    monkeypatch.setattr(module, "_train", with_another_seed)
    verdict = verify_resume(config, tmp_path / "b", steps=12, seed=3)
    assert not verdict.same
    assert verdict.first_difference == verdict.resumed_from + 1


def test_the_shortened_configuration_changes_nothing_that_is_learned(config):
    short = shorten(config, 20)
    assert (short.train.max_steps, short.checkpoint.every, short.log.every) == (20, 5, 1)
    assert short.model == config.model
    assert short.optim == config.optim
    assert short.data == config.data


def test_what_ends_a_run_by_itself_is_told_as_it_was(tmp_path):
    config = load_config(None, [f"data.source={tmp_path / 'nothing.txt'}", *TINY])
    with pytest.raises(OctavoError, match=r"nothing\.txt") as caught:
        verify_resume(config, tmp_path / "out", steps=5)
    assert caught.value.exit_code == DataError.exit_code


def test_what_cannot_be_killed_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="2 steps leave nothing to kill"):
        verify_resume(config, tmp_path / "out", steps=2)
    piped = load_config(None, ['data.source="-"'])
    with pytest.raises(ConfigError, match="standard input is read only once"):
        verify_resume(piped, tmp_path / "out", steps=5)


@pytest.mark.parametrize(("first", "code"), [(None, 0), (7, 8)])
def test_the_verdict_is_the_exit_code(config, tmp_path, monkeypatch, capsys, first, code):
    hashes = {"model.safetensors": "5b6ba8028a2e2dea"}
    verdict = Verdict(first is None, 9, 6, 24, first, hashes, hashes, 1.5)
    monkeypatch.setattr(module, "verify_resume", lambda *_: verdict)
    words = [config.data.source, "--out", tmp_path / "out", "--json"]
    assert octavo("verify-resume", *words) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["undisturbed"] == hashes
    assert ("resumed from 6, the run is another from step 7 on" in err) == (code == 8)
