"""Longer contexts: the same tokens at every length, and each stretching the one it is named for."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from octavo.errors import DataError
from octavo.evaluating.lengths import PLAIN, STRETCHED, measure_lengths
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig, RopeScaling

SMALL = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16)
TOKENS = np.random.default_rng(0).integers(0, 11, 200)


def model(**changes: object) -> GPT:
    """Weights large enough that positions matter."""
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(SMALL, n_kv_head=0, head_dim=0, d_ff=0, **changes)).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(5)
    return gpt


def perplexity(gpt: GPT, length: int, ends: np.ndarray) -> float:
    """The last half of 8 tokens before each end, after ``length`` in all, by the logits."""
    window = torch.from_numpy(TOKENS[ends[:, None] + np.arange(-length, 1)])
    with torch.inference_mode():
        logprobs = gpt(window[:, :-1])[:, -4:].double().log_softmax(-1)
    return (-logprobs.gather(2, window[:, -4:, None])).mean().exp().item()


@pytest.mark.parametrize("length", [8, 12, 16, 32])
def test_every_length_scores_the_same_tokens(length):
    gpt, ends = model(), np.unique(np.linspace(32, 199, 10, dtype=int))
    found = measure_lengths(gpt, TOKENS, windows=10)
    assert found.tokens == 4 * len(ends)
    assert found.perplexity[PLAIN][length] == pytest.approx(perplexity(gpt, length, ends), rel=1e-5)


@pytest.mark.parametrize("way", STRETCHED)
def test_a_stretched_model_is_the_one_built_with_that_scaling(way):
    gpt, ends = model(), np.unique(np.linspace(32, 199, 10, dtype=int))
    found = measure_lengths(gpt, TOKENS, windows=10).perplexity
    scaling = RopeScaling(type=way, factor=2.0, original_block_size=8)
    built = model(block_size=16, rope_scaling=scaling)
    built.load_state_dict(gpt.state_dict())
    assert found[way][16] == pytest.approx(perplexity(built, 16, ends), rel=1e-5)
    assert found[way][16] != pytest.approx(found[PLAIN][16], rel=1e-3)
    assert 8 not in found[way]  # at its own length nothing is stretched


def test_the_model_is_left_as_it_was():
    gpt = model()
    before = gpt(torch.from_numpy(TOKENS[None, :8]))
    measure_lengths(gpt, TOKENS, windows=4)
    assert torch.equal(gpt(torch.from_numpy(TOKENS[None, :8])), before)
    assert gpt.config.rope_scaling is None


def test_learned_positions_end_where_they_were_learned():
    found = measure_lengths(model(position="learned"), TOKENS, windows=4)
    assert list(found.perplexity[PLAIN]) == [8]
    assert "learned positions end at 8" in found.remarks[0]


def test_a_model_without_positions_has_nothing_to_stretch():
    found = measure_lengths(model(position="none"), TOKENS, windows=4)
    assert list(found.perplexity) == [PLAIN]
    assert list(found.perplexity[PLAIN]) == [8, 12, 16, 32]


def test_a_short_text_leaves_lengths_out_and_says_so():
    found = measure_lengths(model(), TOKENS[:17], windows=4)
    assert list(found.perplexity[PLAIN]) == [8, 12, 16]
    assert found.remarks == ["the text ends before 4 contexts"]
    assert all(math.isfinite(value) for value in found.perplexity["yarn"].values())


def test_a_text_shorter_than_the_context_is_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"8 tokens long and the text only 8"):
        measure_lengths(model(), TOKENS[:8])
