"""What cannot be right is refused with one line and the documented code, and does no harm."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from command_kit import complaint
from hypothesis import example, given
from hypothesis import strategies as st
from run_kit import Canary
from training_kit import FOX, config_of, events, flip

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.errors import CheckpointError, ConfigError, OctavoError, ResourceError
from octavo.training import loop
from octavo.training.loop import train

SMALL = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "train.max_steps=4", "train.micro_batch_size=2", "eval.windows=4", "eval.every=2",
    "checkpoint.every=2", "log.every=1", "log.sample_every=0", "log.sample_tokens=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run and its text."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "fox.txt").write_text(FOX, encoding="utf-8")
    train(config(folder), folder / "run", quiet=True)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of both, to be spoilt."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "fox.txt", tmp_path / "fox.txt")
    return tmp_path


def config(folder, *settings):
    return config_of(folder / "fox.txt", *SMALL, *settings)


# ---- a damaged checkpoint


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(made, folder):
    """The error names it; from there the run ends as if nothing had been damaged."""
    run = Run.open(folder / "run")
    flip(run.latest / "optimizer.safetensors", -1)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        train(config(made), run.path, resume=True, quiet=True)
    assert caught.value.exit_code == 4
    older = run.folder / "step-00000002"
    assert caught.value.fix == f"use a sound one: {older}"
    train(config(made), older, resume=True, quiet=True)
    ends = [Run.open(path).load().manifest.files for path in (made / "run", run.path)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0][name] == ends[1][name]


@pytest.mark.parametrize("failpoint", ["", "logged-train:term"])
def test_no_run_says_that_it_is_saved_when_it_is_not(made, tmp_path, monkeypatch, failpoint):
    """Finished, or stopped by a signal: the disk that refuses its only save is an error."""

    def refuse(*words, **named):
        raise ResourceError("No space left on device")

    monkeypatch.setattr(Run, "save", refuse)
    monkeypatch.setenv("OCTAVO_FAILPOINT", failpoint)
    with pytest.raises(ResourceError, match="No space"):
        train(config(made, "checkpoint.every=0", "eval.every=0"), tmp_path / "run", quiet=True)
    assert '"end"' not in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")


# ---- settings of a run that goes on


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("optim.lr=0.5", r"optim\.lr 0\.001 -> 0\.5"),
        ("optim.schedule=constant", r"optim\.schedule cosine -> constant"),
        ("model.dropout=0.5", r"model\.dropout 0\.0 -> 0\.5"),
        ("model.d_model=32", r"model\.d_model 16 -> 32"),
        ("train.seed=1", r"train\.seed 1337 -> 1"),
        ("train.precision=bf16", r"train\.precision auto -> bf16"),
        ("train.micro_batch_size=4", r"rows a step 2 -> 4"),
        ("data.sampling=random", r"data\.sampling epoch -> random"),
        ("data.val_fraction=0.2", r"data\.val_fraction 0\.1 -> 0\.2"),
        ("lora.rank=2", r"lora\.rank 0 -> 2"),
    ],
)
def test_a_run_does_not_go_on_as_another_experiment(made, folder, setting, change):
    with pytest.raises(ConfigError, match=change) as caught:
        train(config(made, setting), folder / "run", resume=True, quiet=True)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "settings",
    [
        ["eval.every=3", "eval.windows=2"],
        ["checkpoint.every=1", "checkpoint.keep=5"],
        ["log.every=2", "log.sample_prompt=The"],
        ["train.micro_batch_size=1", "train.grad_accum=2"],
        ["train.patience=3", "train.max_bad_steps=2", "train.device=cpu"],
    ],
)
def test_what_changes_no_weight_may_change(made, folder, settings):
    more = config(made, "train.max_steps=5", *settings)
    assert train(more, folder / "run", resume=True, quiet=True).step == 5


# ---- numbers


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(made, tmp_path, monkeypatch):
    """The loss is sound here, and so is every other gradient."""
    plain = loop.build_learner

    def build(*words):
        learner = plain(*words)
        spoil = lambda gradient: gradient * (float("nan") if learner.progress.step == 2 else 1)  # noqa: E731
        learner.body.blocks[0].mlp.down_proj.weight.register_hook(spoil)
        return learner

    monkeypatch.setattr(loop, "build_learner", build)
    run = train(config(made), tmp_path / "run", quiet=True).run
    saved = Run.open(run).load()
    assert saved.state["skipped"] == 1
    assert all(value.isfinite().all() for value in saved.model_tensors().values())
    assert [event["step"] for event in events(run, "skip")] == [3]


def test_a_text_of_one_character_is_learned(tmp_path):
    (tmp_path / "fox.txt").write_text("a" * 1000, encoding="utf-8")
    result = train(config(tmp_path), tmp_path / "run", quiet=True)
    assert result.best_val_loss == pytest.approx(0, abs=1e-6)


# ---- code in disguise


def test_nothing_that_is_read_is_ever_run(folder, capsys):
    """Pickles under every name a command may open; PyTorch's own dcp.load runs the .metadata."""
    canary, run = folder / "canary", folder / "run"
    evil = pickle.dumps(Canary(canary))
    np.save(folder / "train.npy", np.array([Canary(canary)]), allow_pickle=True)
    torch.save({"model": Canary(canary), "model_args": {}}, folder / "ckpt.pt")
    (folder / "dcp").mkdir()
    for path in ("dcp/.metadata", "dcp/__0_0.distcp", "evil.txt", "meta.pkl", "pytorch_model.bin"):
        (folder / path).write_bytes(evil)
    (folder / "evil.yaml").write_text(f"model: !!python/object/apply:os.mkdir [{canary}]\n")
    newest = Run.open(run).latest
    for name in ("model.safetensors", "manifest.json", "state.json"):
        shutil.copytree(run, folder / name)
        (folder / name / newest.relative_to(run) / name).write_bytes(evil)
    shutil.copytree(run, folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").write_bytes(evil)
    expected = {
        ("train", folder / "train.npy"): 3,
        ("train", folder / "evil.txt"): 3,
        ("train", folder / "evil.yaml"): 2,
        ("data", "inspect", folder / "train.npy"): 3,
        ("data", "verify", folder / "train.npy"): 3,
        ("import", folder / "ckpt.pt", folder / "out"): 4,
        ("import", folder / "dcp", folder / "out"): 2,
        ("generate", folder / "model.safetensors", "--prompt", "The"): 4,
        ("generate", folder / "tokenizer", "--prompt", "The"): 3,
        ("train", folder / "state.json" / newest.relative_to(run), "train.max_steps=9"): 4,
        ("train", folder / "manifest.json" / newest.relative_to(run), "train.max_steps=9"): 4,
    }
    for words, code in expected.items():
        assert complaint(capsys, *words)[0] == code, words
        assert not canary.exists(), words
    assert not (folder / "out").exists()


# ---- names


@given(st.text(st.sampled_from("aé /.\0~$*\n\\\ud800") | st.characters(), max_size=12))
@example("../x")
@example("a\0b")
@example("x" * 300)
@example("x/" * 3000)
@example("\ud800")
def test_any_name_is_a_run_or_an_error(tmp_path_factory, name):
    home = tmp_path_factory.mktemp("names") / "a" / "b" / "c" / "d" / "e"
    try:
        assert Run.create(f"{home}/{name}", Config()).config == Config()
    except OctavoError as error:
        assert error.exit_code == 2, name  # noqa: PT017 - either will do
