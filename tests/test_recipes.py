"""The recipes in configs/: what each says of itself is true, and each trains."""

import dataclasses
import re
from pathlib import Path

import pytest

from octavo.config import Config, load_config
from octavo.model.counts import count_parameters
from octavo.training.loop import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
CHARACTERS, GPT2 = 65, 50257  # Tiny Shakespeare's symbols; GPT-2's tokens
# The counts of the seed projects' models, as their arithmetic has them, not as their pages do.
PARAMETERS = {
    "gpt2-124m": 124_475_904,
    "s0-arcane": 124_439_808,
    "s0-arcane-rope": 123_653_376,
    "s1": 123_587_328,
    "s2-tiny": 861_440,
    "s2-small": 4_836_864,
    "s2-medium": 38_581_248,
    "s2-large": 169_956_864,
    "s2-gpt2": 123_551_232,
    "s3": 820_096,
}


def parameters(config: Config, vocabulary: int = CHARACTERS) -> int:
    size = config.model.vocab_size or vocabulary
    padded = -(-size // config.model.pad_vocab_to) * config.model.pad_vocab_to
    return count_parameters(dataclasses.replace(config.model, vocab_size=padded)).total


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_has_the_size_its_comment_names(name):
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config(path)
    tokens = GPT2 if config.data.tokenizer == "gpt2" else CHARACTERS
    assert parameters(config, tokens) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in path.read_text(encoding="utf-8")


def test_layout_alone_sets_s3_apart_from_gpt2():
    config = load_config(next(path for path in CONFIGS if path.stem == "s3"))
    plain = dataclasses.replace(config.model, norm_position="pre", vocab_size=CHARACTERS)
    assert count_parameters(plain).total == 818_048  # what transformers' GPT2Config counts
    assert parameters(config) - 818_048 == 2 * config.model.n_layer * 2 * config.model.d_model


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_steps_times_tokens_are_what_the_comment_says(path):
    """One seed project's 152,587 steps of 16 rows were a quarter of the epoch it claimed."""
    config, text = load_config(path), path.read_text(encoding="utf-8")
    tokens_a_step = config.train.batch_size * config.model.block_size
    if said := re.search(r"x ([\d,]+) tokens = ([\d.]+) B", text):
        assert tokens_a_step == int(said[1].replace(",", ""))
        assert round(tokens_a_step * config.train.max_steps / 1e9, 1) == float(said[2])


def test_s0_with_and_without_rope_differ_in_nothing_else():
    rope, plain = (load_config(p) for p in CONFIGS if p.stem.startswith("s0-"))
    assert dataclasses.replace(plain.model, position="rope") == rope.model
    assert dataclasses.replace(plain, model=rope.model) == rope


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_trains_and_learns_at_a_reduced_size(path, tmp_path):
    """All its switches, schedule and optimizer; only widths, lengths and the text are smaller."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    settings = [
        f"data.source={text}", "data.tokenizer=byte", "model.vocab_size=0", "model.block_size=16",
        "model.n_layer=2", "model.n_head=2", "model.d_model=32", "train.max_steps=4",
        "train.micro_batch_size=2", "optim.warmup=1", "optim.lr=1e-2", "eval.every=0",
        "eval.windows=8", "eval.hellaswag=null", "eval.hellaswag_every=0", "checkpoint.every=0",
        "log.every=1", "log.sample_every=0", "log.sample_tokens=4", "train.grad_accum=2",
    ]  # fmt: skip
    config = load_config(path, settings)
    result = train(config, tmp_path / "run", quiet=True)
    untrained = 5.55  # nats, of 256 bytes and an end-of-text token
    assert result.step == 4
    assert result.best_val_loss is not None
    assert result.best_val_loss < untrained
