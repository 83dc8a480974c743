"""A tiny GPT with no parameter at its default, so that a dropped or exchanged one shows."""

import pytest
import torch
from model_kit import random_model

from octavo.model_config import ModelConfig

TINY = dict(vocab_size=17, block_size=16, n_layer=2, n_head=4, d_model=16, d_ff=24)


@pytest.fixture
def make_model():
    def make(seed=0, **switches):
        return random_model(ModelConfig(**(TINY | switches)), seed)

    return make


@pytest.fixture
def ids():
    return torch.randint(0, 17, (3, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def assert_near():
    """Equal to 1e-5 of the largest value."""

    def check(given, wanted, tolerance=1e-5):
        assert given.shape == wanted.shape
        assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()

    return check
