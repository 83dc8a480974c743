"""A run's draft: trained by the same loop, resumed like any run, used without being asked for."""

import pytest
from command_kit import figures
from command_kit import octavo as type_in
from training_kit import FOX, config_of

import octavo
from octavo.checkpoint import Run
from octavo.config import ModelConfig, load_config
from octavo.errors import ConfigError, DataError
from octavo.model.counts import flops_per_token
from octavo.training.draft import draft_config, draft_model, train_draft
from octavo.training.loop import train

SETTINGS = [
    "model.block_size=32", "model.n_layer=4", "model.n_head=4", "model.d_model=32",
    "model.dropout=0.1", "train.max_steps=12", "train.micro_batch_size=8", "optim.lr=1e-2",
    "eval.every=0", "eval.windows=4", "checkpoint.every=0", "log.sample_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(FOX, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run with a draft, both trained by the command."""
    out = tmp_path_factory.mktemp("runs") / "fox"
    assert type_in("train", text, "--draft", "--quiet", "--out", out, *SETTINGS) == 0
    return out


@pytest.mark.parametrize(
    "shape",
    [
        {"vocab_size": 65},
        {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "d_model": 768, "block_size": 1024},
        {"vocab_size": 32000, "n_layer": 24, "n_head": 16, "n_kv_head": 4, "d_model": 1024},
        {"vocab_size": 300, "n_layer": 8, "n_head": 8, "n_kv_head": 1, "d_model": 128},
        {"vocab_size": 300, "n_head": 6, "d_model": 96, "head_dim": 64, "position": "learned"},
    ],
)
def test_a_draft_computes_about_a_tenth(shape):
    model = ModelConfig(**shape, dropout=0.2)
    draft = draft_model(model)
    share = flops_per_token(draft) / flops_per_token(model)
    assert 0.04 < share <= 0.1
    assert draft.dropout == 0
    for same in ("vocab_size", "pad_vocab_to", "block_size", "head_dim", "position", "mlp"):
        assert getattr(draft, same) == getattr(model, same)


def test_the_smallest_model_has_a_draft_too():
    model = ModelConfig(vocab_size=9, n_layer=1, n_head=1, d_model=8, block_size=8)
    assert draft_model(model) == model


def test_train_with_draft_makes_both_and_generate_uses_it(run):
    """S2's advanced.speculative_sampling: a draft is trained and is the run's default."""
    assert Run.open(run).config.train.draft
    draft = Run.open(run / "draft")
    assert draft.tokenizer.fingerprint == Run.open(run).tokenizer.fingerprint
    assert draft.load().step == 12
    assert not draft.config.train.draft
    plain, drafted = octavo.load(run, speculate="off"), octavo.load(run)
    assert plain.draft is None
    assert drafted.draft.home == run / "draft"
    for settings in ({"preset": "greedy"}, {"seed": 3}, {"n": 3, "repetition_penalty": 1.2}):
        expected = plain.generate("The ", 100, **settings)
        assert drafted.generate("The ", 100, **settings) == expected
        assert octavo.load(run, speculate="lookup").generate("The ", 100, **settings) == expected
    assert drafted.pace.tokens == 500


def test_a_draft_learns_what_its_model_learns(run):
    texts = [octavo.load(path).score(FOX[:1000]).loss for path in (run, run / "draft")]
    assert texts[1] < 3.0  # of 3.4 for guessing among 30 characters


def test_speculation_is_reported(run, capsys):
    typed = ["generate", run, "--prompt", "The ", "--preset", "greedy", "--speculate"]
    assert type_in(*typed, "off") == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    for how in ("lookup", "auto", run / "draft"):
        assert type_in(*typed, how) == 0
        shown = capsys.readouterr()
        assert shown.out == plain.out
        assert "tokens/s" in shown.err
        assert shown.err.count("\n") == 1
    shown = figures(capsys, *typed, "auto")
    assert shown["speculation"]["tokens"] == 200
    assert {"acceptance", "tokens_per_s", "drafted"} <= set(shown["speculation"])


def test_a_draft_is_resumed_and_a_finished_one_left_alone(text, tmp_path):
    out = tmp_path / "fox"
    train(config_of(text, *SETTINGS), out, quiet=True)
    config = draft_config(Run.open(out))
    whole = train(config, tmp_path / "whole", quiet=True)
    Run.create(
        out / "draft",
        Run.open(whole.run).config,
        Run.open(out).tokenizer,
        {"data.json": (whole.run / "data.json").read_bytes()},
    )  # killed before its first step
    assert octavo.load(out).draft is None  # there is nothing to use yet
    typed = ["train", out, "--draft", "--quiet"]
    assert type_in(*typed) == 0
    weights = [
        Run.open(path).load().manifest.files["model.safetensors"]["sha256"]
        for path in (whole.run, out / "draft")
    ]
    assert weights[0] == weights[1]
    saved = sorted((out / "draft" / "checkpoints").iterdir())
    assert type_in(*typed) == 0
    assert sorted((out / "draft" / "checkpoints").iterdir()) == saved


def test_text_from_standard_input_serves_the_draft_too(tmp_path, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FOX.encode())))
    out = tmp_path / "piped"
    train(config_of("-", *SETTINGS, "train.max_steps=1"), out, quiet=True)
    assert train_draft(out, quiet=True).step == 1


def test_what_cannot_draft_is_refused(run, text, tmp_path):
    other = config_of(text, *SETTINGS, "data.tokenizer=byte", "train.max_steps=1")
    train(other, tmp_path / "bytes", quiet=True)
    with pytest.raises(DataError, match=r"the draft's tokenizer has the SHA-256 .*, the model's "):
        octavo.load(run, speculate=str(tmp_path / "bytes"))
    with pytest.raises(
        ConfigError, match=r"there is no draft .*nowhere; give off, lookup, auto or a run"
    ):
        octavo.load(run, speculate=str(tmp_path / "nowhere"))
    config = Run.open(run).config
    imported = Run.create(tmp_path / "imported", load_config(None, ["model.vocab_size=9"]))
    assert config.data.source is not None
    with pytest.raises(ConfigError, match="did not learn from a text"):
        draft_config(imported)
