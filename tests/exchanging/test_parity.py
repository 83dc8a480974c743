"""The gate: closed for a wrong weight, a wrong text, a wrong tokenizer; open for the same model."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from octavo.errors import ParityError
from octavo.exchanging import parity
from octavo.exchanging.parity import (
    LENGTH,
    ROWS,
    TOLERANCE,
    Stock,
    compare,
    compare_greedy,
    compare_logits,
    compare_tokenizers,
    import_transformers,
    random_rows,
)
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

CONFIG = ModelConfig(vocab_size=31, block_size=24, n_layer=2, n_head=2, d_model=16)


def model(nudge=0.0):
    torch.manual_seed(5)
    made = GPT(CONFIG).eval()
    for parameter in made.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.3
    made.tok_emb.weight.data[7] += nudge
    return made


class Theirs(nn.Module):
    """Any model of ours as transformers would show it; ``off`` ids are what it writes wrongly."""

    def __init__(self, inside, off=None, dropout=0.0):
        super().__init__()
        self.inside, self.off, self.dropout = inside, off, nn.Dropout(dropout)

    def forward(self, idx, use_cache):
        return SimpleNamespace(logits=self.dropout(self.inside(idx)))

    def generate(self, prompt, attention_mask, max_new_tokens, do_sample):
        assert not self.training
        text = prompt
        for number in range(max_new_tokens):
            likeliest = self.inside(text)[:, -1].argmax(1, keepdim=True)
            text = torch.cat([text, (likeliest + 1) % 31 if number == self.off else likeliest], 1)
        return text


def rows():
    return random_rows(31, 24)


def test_the_same_model_passes():
    found = compare(model(), Theirs(model()), rows(), "random ids", "a twin", 31)
    assert found.largest_difference == 0
    assert found.perplexity == found.perplexity_there > 1
    assert (found.tokens, found.greedy_tokens) == (ROWS * 24, 12)
    assert (found.against, found.text) == ("a twin", "random ids")


def test_a_wrong_weight_is_seen_with_its_size():
    with pytest.raises(ParityError, match=r"differ by 0\.\d+ of the largest, 0\.0001") as caught:
        compare(model(), Theirs(model(nudge=1.0)), rows(), "random ids", "a twin", 31)
    assert caught.value.exit_code == 8


def test_the_tolerance_lies_where_it_says():
    ours, x = model(), rows()[:, :-1]
    largest = max(ours(torch.from_numpy(row[None])).abs().max().item() for row in x)

    class Shifted(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, idx, use_cache):
            return SimpleNamespace(logits=ours(idx) + self.by * largest)

    assert compare_logits(ours, Stock(Shifted(0.9 * TOLERANCE)), x) > 0.8 * TOLERANCE
    for by in (1.2 * TOLERANCE, float("nan"), float("inf")):
        with pytest.raises(ParityError, match="the logits differ"):
            compare_logits(ours, Stock(Shifted(by)), x)


def test_dropout_of_theirs_stays_off():
    """Scoring put the module back into training mode, and its greedy text came out at random."""
    compare(model(), Theirs(model(), dropout=0.5), rows(), "random ids", "a twin", 31)


@pytest.mark.parametrize("off", [0, 5, 11])
def test_a_greedy_text_that_leaves_ours_is_seen(off):
    with pytest.raises(ParityError, match=rf"greedy texts differ; from token {off + 1} on"):
        compare_greedy(model(), Theirs(model(), off=off).eval(), rows()[:, :-1], 31)


def test_likeliest_tokens_that_tie_may_be_exchanged():
    ours = model()
    ours.lm_head.weight.data[:] = ours.lm_head.weight.data[:1]  # every logit is the same
    assert compare_greedy(ours, Theirs(ours, off=3).eval(), rows()[:, :-1], 31) == 12


def test_a_full_context_leaves_no_room_for_text():
    ours = GPT(ModelConfig(vocab_size=31, block_size=1, n_layer=1, n_head=1, d_model=8)).eval()
    assert compare_greedy(ours, None, np.ones((1, 1), dtype=np.int64), 31) == 0


class Other:
    """A tokenizer of transformers, of which one half is wrong."""

    def __init__(self, tokenizer, text="", ids=()):
        self.tokenizer, self.text, self.ids = tokenizer, text, list(ids)

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return self.tokenizer.decode(ids) + self.text

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return self.tokenizer.encode(text, special=True) + self.ids


def test_tokenizers_are_compared_both_ways():
    tokenizer = Tokenizer.byte(separator=True)
    ids = np.array([tokenizer.encode("żółw <|endoftext|> 🙂<|endoftext|>", special=True)])
    compare_tokenizers(tokenizer, Other(tokenizer), ids)
    with pytest.raises(ParityError, match="other texts"):
        compare_tokenizers(tokenizer, Other(tokenizer, text=" "), ids)
    with pytest.raises(ParityError, match="other ids"):
        compare_tokenizers(tokenizer, Other(tokenizer, ids=[1]), ids)


def test_random_rows_are_text_and_always_the_same():
    tokenizer = Tokenizer.byte(separator=True)
    drawn = random_rows(300, 1000, tokenizer)
    assert drawn.shape == (ROWS, LENGTH + 1)
    assert tokenizer.eot_id not in drawn
    assert drawn.max() < 256
    assert np.array_equal(drawn, random_rows(300, 1000, tokenizer))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert import_transformers() is None


def test_quiet_puts_everything_back():
    transformers = pytest.importorskip("transformers")
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with parity.quiet(transformers):
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
