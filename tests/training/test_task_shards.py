"""Training on prepared tokens is training on their text; documents can be kept apart."""

import json

import numpy as np
import pytest
import torch
from training_kit import (
    SMALL,
    assert_same_weights,
    config_of,
    cut_at,
    events,
    flip,
    step_and_gradients,
)

import octavo
from octavo.checkpoint import Run
from octavo.config import ModelConfig, load_config
from octavo.errors import ConfigError, DataError
from octavo.evaluating.perplexity import score_windows
from octavo.model.gpt import GPT
from octavo.text.batches import document_mask
from octavo.text.corpus import read_corpus, tokenize
from octavo.text.shards import write_manifest, write_shard
from octavo.text.tokenizer import Tokenizer
from octavo.training.display import Display
from octavo.training.learner import build_learner
from octavo.training.loop import train
from octavo.training.loss import cross_entropy
from octavo.training.task import prepare, score_validation


def config(source, *settings):
    return config_of(source, *SMALL, "train.max_steps=6", "eval.every=3", *settings)


def dataset(home, ids, tokenizer=None, parts=3, val=()):
    """``ids`` in ``parts`` shards of unequal size, and the ids ``val`` in one."""
    home.mkdir()
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, len(ids)), parts - 1, False))
    pieces = np.split(np.asarray(ids), cuts)
    shards = [write_shard(home / f"train-{n:05d}.npy", piece) for n, piece in enumerate(pieces)]
    shards += [write_shard(home / "val-00000.npy", np.asarray(val), "val")] if len(val) else []
    write_manifest(home, shards, tokenizer)
    return home


def ids_of(count=2000, vocab=50, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, count)


def data_of(run):
    return json.loads((run / "data.json").read_bytes())


@pytest.mark.parametrize("kind", ["prepared", "llm.c", "nanoGPT"])
def test_shards_train_the_model_that_their_text_trains(text, tmp_path, kind):
    corpus = read_corpus(str(text))
    tokenizer = Tokenizer.char(corpus.text)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = tokenize(corpus, tokenizer)
    cut = int(len(ids) * 0.9)
    home = tmp_path / "data"
    settings = [f"data.tokenizer={tmp_path / 'tokenizer.json'}"]
    if kind == "prepared":
        dataset(home, ids[:cut], tokenizer, val=ids[cut:])
        settings = []
    else:
        header = np.zeros(256, "<i4") if kind == "llm.c" else np.zeros(0, "<i4")
        home.mkdir()
        for name, part in (("fox_train_0", ids[:cut]), ("fox_val_0", ids[cut:])):
            header[:3] = (20240520, 1, len(part))[: len(header)]
            data = header.tobytes() + part.astype("<u2").tobytes()
            (home / f"{name}.bin").write_bytes(data)
    train(config(text), tmp_path / "one", quiet=True)
    train(config(home, *settings), tmp_path / "other", quiet=True)
    assert_same_weights(tmp_path / "one", tmp_path / "other")
    assert events(tmp_path / "one")[-1]["best_val_loss"] == pytest.approx(
        events(tmp_path / "other")[-1]["best_val_loss"]
    )
    last = events(tmp_path / "other", "eval")[-1]
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / np.log(2))
    assert (tmp_path / "other" / "samples.txt").exists()


def test_a_run_on_shards_goes_on_bit_for_bit(tmp_path):
    home = dataset(tmp_path / "data", ids_of(vocab=250), Tokenizer.byte(), val=ids_of(90))
    settings = ("model.dropout=0.1", "data.sampling=random")
    train(config(home, *settings), tmp_path / "whole", quiet=True)
    with cut_at(4):
        train(config(home, *settings), tmp_path / "cut", quiet=True)
    train(Run.open(tmp_path / "cut").config, tmp_path / "cut", resume=True, quiet=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_ids_without_a_tokenizer_train_a_model_of_ids(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", ids_of(vocab=50))
    run = train(config(tmp_path / "ids.npy"), tmp_path / "run").run
    said = capsys.readouterr().out
    assert "no tokenizer: the model takes and gives ids" in said
    assert "bits a byte" not in said
    assert not (run / "tokenizer.json").exists()
    assert not (run / "samples.txt").exists()
    assert all("val_bpb" not in event for event in events(run))
    assert data_of(run)["tokens"] + data_of(run)["val_tokens"] == 2000
    lm = octavo.load(run)
    assert lm.config.vocab_size == 50
    assert len(lm.generate_ids([[1, 2]], max_new_tokens=3)[0]) == 3
    with pytest.raises(ConfigError, match="no tokenizer"):
        lm.generate("text")
    best = min(event["val_loss"] for event in events(run, "eval"))
    assert score_validation(lm).loss == pytest.approx(best, rel=1e-5)
    train(config(tmp_path / "ids.npy"), run, resume=True, quiet=True)
    wide = prepare(config(tmp_path / "ids.npy", "model.vocab_size=64"), "cpu", tmp_path / "none")
    assert wide.config.model.vocab_size == 64


def test_what_a_run_learns_from_and_is_validated_on(tmp_path):
    """By name within the source, by a source of its own, or the last part of all."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, count in (("train_0", 500), ("train_1", 300), ("val_0", 100)):
        np.save(folder / f"{name}.npy", ids_of(count))
    np.save(tmp_path / "judge.npy", ids_of(70))
    train_0, val_0 = folder / "train_0.npy", folder / "val_0.npy"

    def counts(source, *settings):
        words = [*SMALL, f"data.source={json.dumps(source)}", *settings]
        data = prepare(load_config(None, words), "cpu", tmp_path / "none").data
        return data["tokens"], data["val_tokens"]

    assert counts(str(folder)) == counts(str(folder / "*.npy")) == (800, 100)
    assert counts([str(train_0), str(val_0)]) == (500, 100)
    assert counts(str(train_0)) == (450, 50)
    assert counts(str(train_0), "data.val_fraction=0") == (500, 0)
    assert counts(str(train_0), f"data.val_source={val_0}") == (500, 100)
    assert counts(str(train_0), f"data.val_source={folder}") == (500, 100)
    assert counts(str(folder), f"data.val_source={tmp_path / 'judge.npy'}") == (800, 70)
    with pytest.raises(ConfigError, match=r"train_0\.npy would be trained on and validated"):
        counts(str(folder), f"data.val_source={train_0}")


@pytest.mark.parametrize("which", ["train", "val", "foreign", "val_source"])
def test_a_run_does_not_go_on_with_other_tokens(tmp_path, which):
    val = tmp_path / "judge.npy"
    np.save(val, ids_of(90))
    if which == "foreign":
        home = tmp_path / "ids.npy"
        np.save(home, ids_of())
    else:
        home = dataset(tmp_path / "data", ids_of(), val=ids_of(90))
    settings = [f"data.val_source={val}"] if which == "val_source" else []
    run = train(config(home, *settings), tmp_path / "run", quiet=True).run
    if which == "foreign":
        np.save(home, ids_of(seed=1))
    elif which == "val_source":
        np.save(val, ids_of(90, seed=1))
    else:
        for path in [*home.iterdir()]:
            path.unlink()
        home.rmdir()
        dataset(home, ids_of(seed=which == "train"), val=ids_of(90, seed=which == "val"))
    with pytest.raises(DataError, match="has changed"):
        train(config(home, "train.max_steps=9", *settings), run, resume=True, quiet=True)


def refused(error, match, source, out, *settings):
    """`train` says ``match`` and makes no run."""
    with pytest.raises(error, match=match):
        train(config(source, *settings), out, quiet=True)
    assert not out.exists()


def test_a_wrong_tokenizer_is_refused_with_both_hashes(tmp_path):
    byte, separated = Tokenizer.byte(), Tokenizer.byte(separator=True)
    home, out = dataset(tmp_path / "data", ids_of(), byte), tmp_path / "run"
    separated.save(tmp_path / "other.json")
    both = f"{separated.fingerprint}.*{byte.fingerprint}"
    refused(DataError, both, home, out, f"data.tokenizer={tmp_path / 'other.json'}")
    prepare(config(home, "data.tokenizer=byte"), "cpu", out)
    with pytest.raises(DataError, match=both):  # the tokenizer of the run, or of its base
        prepare(config(home), "cpu", out, separated)
    (home / "tokenizer.json").unlink()
    assert prepare(config(home, "data.tokenizer=byte"), "cpu", out).tokenizer is not None
    match = f"{separated.fingerprint}.*{byte.fingerprint}"
    refused(DataError, match, home, out, "data.tokenizer=byte", "data.separator=true")
    refused(ConfigError, "learned from a text", home, out, "data.tokenizer=bpe")
    refused(ConfigError, "did you mean gpt2", home, out, "data.tokenizer=gpt-2")


def test_an_id_outside_the_vocabulary_is_refused_before_the_first_step(tmp_path):
    out = tmp_path / "run"
    for name in ("train", "val"):
        np.save(tmp_path / f"{name}.npy", np.append(ids_of(), 300 if name == "val" else 7))
    for source, settings in (
        (tmp_path, ["data.tokenizer=byte"]),
        (tmp_path, ["model.vocab_size=300"]),
        (dataset(tmp_path / "data", np.append(ids_of(), 300)), ["data.tokenizer=byte"]),
    ):
        refused(DataError, "the id 300, the vocabulary has the ids 0 to", source, out, *settings)


def test_a_damaged_shard_is_refused_before_the_first_step(tmp_path):
    home = dataset(tmp_path / "data", ids_of())
    flip(home / "train-00001.npy", -1)
    refused(DataError, r"train-00001\.npy is damaged in bytes 0 to", home, tmp_path / "run")


def test_a_shard_shorter_than_the_context_names_both_numbers(tmp_path):
    np.save(tmp_path / "train.npy", ids_of(18))
    refused(DataError, "= 17 tokens, the text has 16", tmp_path / "train.npy", tmp_path / "run")


DOCUMENTS = ([5, 6, 7, 8, 0], [9, 10, 0], [11, 12, 13, 14, 15, 16, 17, 0], [18, 19, 20, 21])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=30, block_size=20, n_layer=2, n_head=2, d_model=16))


def packed():
    """The documents one after the other (1, 20), and their targets, as `Batches` gives them."""
    row = np.concatenate(DOCUMENTS)
    x, y = row[None], np.append(row[1:], 22)[None]
    return x, np.where(x == 0, -100, y)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_a_packed_document_has_the_logits_it_has_alone(position):
    torch.manual_seed(0)
    small = ModelConfig(
        vocab_size=30, block_size=20, n_layer=2, n_head=2, d_model=16, position=position
    )
    model, (x, _) = GPT(small).eval(), packed()
    together = model(torch.from_numpy(x), mask=torch.from_numpy(document_mask(x, 0)))[0]
    alone = torch.cat([model(torch.tensor([ids]))[0] for ids in DOCUMENTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(model(torch.from_numpy(x))[0], alone, atol=1e-3)


def test_a_packed_row_has_the_gradients_of_its_documents(model):
    def gradients(rows):
        model.zero_grad()
        nats = sum(cross_entropy(model, *row) for row in rows)
        nats.backward()
        return nats.item(), [p.grad.clone() for p in model.parameters()]

    x, y = packed()
    tensors = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(document_mask(x, 0))
    together = gradients([tensors])
    ends = np.cumsum([len(ids) for ids in DOCUMENTS])
    alone = gradients(
        [
            (torch.tensor([ids]), torch.from_numpy(y[:, end - len(ids) : end]))
            for ids, end in zip(DOCUMENTS, ends, strict=True)
        ]
    )
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    for ours, theirs in zip(together[1], alone[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_validation_keeps_documents_apart(model):
    x, y = packed()
    together = score_windows(model, x, y, eot_id=0)
    alone = [
        score_windows(model, np.array([ids]), np.array([[*ids[1:], 22 if ids[-1] else -100]]))
        for ids in DOCUMENTS
    ]
    assert together.tokens == sum(score.tokens for score in alone) == 17
    assert together.nats == pytest.approx(sum(score.nats for score in alone), rel=1e-6)


def test_training_keeps_documents_apart_also_in_several_micro_batches(tmp_path):
    ids = ids_of(2000, vocab=250)
    ids[::7] = 256  # the end-of-text token of the bytes
    home = dataset(tmp_path / "data", ids, Tokenizer.byte(separator=True))

    def step(*settings):
        masked = config(home, "data.mask_documents=true", *settings)
        task = prepare(masked, "cpu", tmp_path / "none")
        learner = build_learner(task, torch.device("cpu"), Display(quiet=True))
        return learner, *step_and_gradients(learner)

    learner, whole, gradients = step("train.micro_batch_size=8")
    _, parts, others = step("train.micro_batch_size=2", "train.grad_accum=4")
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    fresh = build_learner(learner.task, torch.device("cpu"), Display(quiet=True))
    x, y = learner.task.batches.rows(0, 8)
    assert (y[x == 256] == -100).all()
    score = score_windows(fresh.model, x, y, eot_id=256)
    assert score.tokens == int((x != 256).sum())
    assert whole.loss == pytest.approx(score.loss, rel=1e-5)
    assert whole.loss != pytest.approx(score_windows(fresh.model, x, y).loss, rel=1e-5)


def test_a_masked_run_is_validated_and_judged_alike(tmp_path):
    ids = ids_of(2000, vocab=250)
    ids[::7] = 256
    home = dataset(tmp_path / "data", ids, Tokenizer.byte(separator=True))
    run = train(config(home, "data.mask_documents=true"), tmp_path / "run", quiet=True).run
    best = min(event["val_loss"] for event in events(run, "eval"))
    assert score_validation(octavo.load(run)).loss == pytest.approx(best, rel=1e-5)


def test_documents_without_ends_cannot_be_kept_apart(text, tmp_path):
    np.save(tmp_path / "ids.npy", ids_of())
    for source in (text, tmp_path / "ids.npy"):
        refused(ConfigError, "end-of-text", source, tmp_path / "run", "data.mask_documents=true")
