"""The Python face: what `octavo.load` gives equals the model inside it."""

import numpy as np
import pytest
import torch
from training_kit import trained

import octavo
from octavo.errors import ConfigError
from octavo.language_model import LanguageModel, make_sampling, start_ids
from octavo.text.tokenizer import Tokenizer

TEXT = "All work and no play makes Jack a dull boy. " * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = [
        "model.block_size=16", "model.n_layer=2", "model.n_head=2", "model.d_model=32",
        "train.max_steps=60", "train.micro_batch_size=8", "optim.lr=1e-2",
        "eval.every=30", "eval.windows=4", "log.sample_every=0",
    ]  # fmt: skip
    return trained(TEXT, tmp_path_factory.mktemp("runs") / "jack", *settings)


@pytest.fixture(scope="module")
def lm(run):
    return octavo.load(run)


def test_logits_are_the_models_own_in_numpy(lm):
    ids = lm.tokenizer.encode("All work")
    logits = lm.logits(ids)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (8, lm.config.vocab_size)
    with torch.no_grad():
        assert np.array_equal(logits, lm.model(torch.tensor([ids]))[0].numpy())
    with pytest.raises(ConfigError, match="17 ids do not fit"):
        lm.logits([0] * 17)


def test_stream_equals_generate_and_continues_the_prompt(lm):
    settings = {"max_new_tokens": 40, "temperature": 0.7, "seed": 5}
    whole = lm.generate("All work", **settings)
    assert "".join(lm.stream("All work", **settings)) == whole
    assert len(whole) == 40
    assert lm.generate("All work", max_new_tokens=9, temperature=0) == " and no p"


def test_a_batch_of_unequal_prompts_equals_one_by_one(lm):
    prompts = ["A", "All work and no play makes Jack", "dull boy", "All w"]
    together = lm.generate(prompts, max_new_tokens=30, seed=3)
    assert together == [lm.generate(prompt, max_new_tokens=30, seed=3) for prompt in prompts]


def test_copies_differ_and_the_first_is_the_one_alone(lm):
    copies = lm.generate("All", n=3, max_new_tokens=20, temperature=1.5)
    assert len(set(copies)) == 3
    assert copies[0] == lm.generate("All", max_new_tokens=20, temperature=1.5)


def test_ids_in_ids_out(lm):
    ids = lm.tokenizer.encode("All work")
    (new,) = lm.generate_ids([ids], max_new_tokens=12, temperature=0)
    assert lm.tokenizer.decode(new) == lm.generate("All work", max_new_tokens=12, temperature=0)


def test_score_is_the_text_under_the_logits(lm):
    text = "All work and no"
    ids = lm.tokenizer.encode(text)
    logits = torch.tensor(lm.logits(ids)).double().log_softmax(-1)
    expected = -sum(logits[t, ids[t + 1]].item() for t in range(len(ids) - 1))
    score = lm.score(text)
    assert score.nats == pytest.approx(expected, rel=1e-6)
    assert (score.tokens, score.bytes) == (14, 14)
    assert lm.score(TEXT).loss < 1.0  # longer than the context, and learnt by heart
    with pytest.raises(ConfigError, match="two tokens"):
        lm.score("A")


def test_a_checkpoint_is_a_run_too(run, lm):
    pinned = octavo.load(next((run / "checkpoints").glob("step-*60")))
    ids = lm.tokenizer.encode("All work")
    assert np.array_equal(pinned.logits(ids), lm.logits(ids))


def test_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no run"):
        octavo.load(tmp_path / "nowhere")


def test_presets_and_what_wins_over_them():
    assert make_sampling("conservative").top_k == 40
    assert make_sampling("nucleus", top_p=0.5).top_p == 0.5
    assert make_sampling("nucleus", top_p=0.5).temperature == 0.8
    with pytest.raises(ConfigError, match="known: conservative, nucleus, greedy"):
        make_sampling("wild")
    with pytest.raises(ConfigError, match="unknown sampling setting 'topk'"):
        make_sampling(topk=3)


def test_where_a_text_without_a_prompt_begins():
    with_separator = Tokenizer.char("ab\n", separator=True)
    assert start_ids(with_separator, None) == [with_separator.eot_id]
    plain = Tokenizer.char("ab\n")
    assert start_ids(plain, None) == plain.encode("\n")
    assert start_ids(Tokenizer.char("ab"), None) == [0]
    with pytest.raises(ConfigError, match="prompt is empty"):
        start_ids(plain, "")


def test_a_model_without_tokenizer_takes_and_gives_ids():
    config = octavo.ModelConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, d_model=8)
    lm = LanguageModel(config, None, model=octavo.GPT(config))
    assert [len(row) for row in lm.generate_ids([[1, 2], [3]], max_new_tokens=4)] == [4, 4]
    with pytest.raises(ConfigError, match="takes and gives ids"):
        lm.generate("hello")
