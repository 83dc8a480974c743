"""The gate: closed for a wrong weight, a wrong text, a wrong tokenizer; open for the same model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_kit import random_model
from torch import nn

from octavo.errors import ParityError
from octavo.exchanging.parity import (
    LENGTH,
    ROWS,
    TOLERANCE,
    Reader,
    compare,
    compare_greedy,
    compare_tokenizers,
    logits_of,
    random_rows,
    reader_of,
    texts_of,
)
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer
from octavo.training.loss import cross_entropy

CONFIG = ModelConfig(vocab_size=31, block_size=24, n_layer=2, n_head=2, d_model=16)


def model(nudge=0.0):
    made = random_model(CONFIG, 5)
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


TWINS = SimpleNamespace(__name__="twins", __version__="9.9")


def texts():
    return texts_of(random_rows(31, 24))


def test_the_same_model_passes():
    theirs = reader_of(TWINS, Theirs(model()))
    found = compare(logits_of(model()), theirs, texts())
    assert theirs.name == "twins 9.9"
    assert found.difference == 0
    assert found.perplexity == found.perplexity_there
    nats = cross_entropy(model(), texts()[:, :-1], texts()[:, 1:])
    assert found.perplexity == pytest.approx((nats / (ROWS * 24)).exp().item(), rel=1e-5)
    assert compare_greedy(model(), Theirs(model()).eval(), texts()[0], 31, "twins") == 16


def test_a_wrong_weight_is_seen_with_its_size():
    words = r"logits of twins 9.9 differ by \d\S* of the largest, 0\.0001 is allowed; on 96 tokens"
    with pytest.raises(ParityError, match=words) as caught:
        compare(logits_of(model()), reader_of(TWINS, Theirs(model(nudge=1.0))), texts())
    assert caught.value.exit_code == 8


def test_another_perplexity_is_seen_where_logits_pass():
    """What is rounded roughly may differ much in its logits, but not be much worse by it."""
    ours = logits_of(model())
    sharper = Reader("a sharper twin", lambda ids: 12 * ours(ids), 0.6)
    with pytest.raises(ParityError, match="a sharper twin finds a perplexity of"):
        compare(lambda ids: 8 * ours(ids), sharper, texts())


def test_ids_that_nobody_writes_count_in_the_perplexity_only():
    ours = logits_of(model())

    def padded(logit):
        return lambda ids: F.pad(ours(ids), (0, 1), value=logit)

    assert compare(padded(-90.0), Reader("a twin", padded(-100.0)), texts(), 31).difference == 0
    with pytest.raises(ParityError, match="the logits of a twin differ"):
        compare(padded(-90.0), Reader("a twin", padded(-100.0)), texts())
    with pytest.raises(ParityError, match="perplexity"):
        compare(padded(-90.0), Reader("a twin", padded(90.0)), texts(), 31)


def test_the_tolerance_lies_where_it_says():
    ours = logits_of(model())
    largest = max(ours(text[:-1]).abs().max().item() for text in texts())

    def shifted(by):
        return Reader("a twin", lambda ids: ours(ids) + by * largest)

    assert compare(ours, shifted(0.9 * TOLERANCE), texts()).difference > 0.8 * TOLERANCE
    for by in (1.2 * TOLERANCE, float("nan"), float("inf")):
        with pytest.raises(ParityError, match="the logits of a twin differ"):
            compare(ours, shifted(by), texts())


def test_one_text_of_nonsense_is_enough():
    """Python's max overlooks a NaN that does not come first."""
    ours, last = logits_of(model()), texts()[-1]

    def spoilt(ids):
        return ours(ids) * (float("nan") if torch.equal(ids, last[:-1]) else 1.0)

    with pytest.raises(ParityError, match="differ by nan"):
        compare(ours, Reader("a twin", spoilt), texts())


def test_dropout_of_theirs_stays_off():
    """Scoring put the module back into training mode, and its greedy text came out at random."""
    compare(logits_of(model()), reader_of(TWINS, Theirs(model(), dropout=0.5)), texts())


@pytest.mark.parametrize("off", [0, 5, 15])
def test_a_greedy_text_that_leaves_ours_is_seen(off):
    with pytest.raises(ParityError, match=rf"twins writes another .* from token {off + 1} on"):
        compare_greedy(model(), Theirs(model(), off=off).eval(), texts()[0], 31, "twins")


def test_likeliest_tokens_that_tie_may_be_exchanged():
    ours = model()
    ours.lm_head.weight.data[:] = ours.lm_head.weight.data[:1]  # every logit is the same
    assert compare_greedy(ours, Theirs(ours, off=3).eval(), texts()[0], 31, "twins") == 16


def test_a_full_context_leaves_no_room_for_text():
    ours = GPT(ModelConfig(vocab_size=31, block_size=1, n_layer=1, n_head=1, d_model=8)).eval()
    assert compare_greedy(ours, None, torch.ones(2, dtype=torch.int64), 31, "twins") == 0


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
