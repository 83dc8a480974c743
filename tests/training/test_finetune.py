"""Fine-tuning is the same loop: what is frozen stays, what is saved is enough, merged is equal."""

import json
import shutil

import numpy as np
import pytest
import torch
from training_kit import assert_same_weights, cut_at, events, trained

import octavo
from octavo.checkpoint import Run
from octavo.config import load_config
from octavo.errors import CheckpointError, ConfigError, DataError, ParityError
from octavo.training import merging
from octavo.training.loop import train
from octavo.training.merging import merge_run
from octavo.training.request import finetune_request
from octavo.training.task import judge_validation

TEXT = "the cat sat on the mat and the dog sat on the log. " * 60
OTHER = (
    "a dog and a log, a cat and a mat: so many, so many! ".replace("y", "t").replace("!", ".") * 40
)
SMALL = [
    "model.block_size=24", "model.n_layer=2", "model.n_head=2", "model.d_model=16",
    "train.max_steps=30", "train.micro_batch_size=8", "optim.lr=1e-2", "eval.every=10",
    "eval.windows=8", "log.sample_every=0", "log.sample_tokens=4", "data.tokenizer=byte",
]  # fmt: skip
QUICK = ["train.max_steps=12", "eval.every=4", "checkpoint.every=4", "log.sample_every=0",
         "log.sample_tokens=4", "eval.windows=8", "lora.rank=4", "optim.lr=3e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "other.txt").write_text(OTHER, encoding="utf-8")
    trained(TEXT, folder / "base", *SMALL)
    return folder


def tune(folder, out, *settings, data="other.txt", resume=False, **kinds):
    kinds = {"train_all": False, "head_only": False, "labels": False} | kinds
    words = [str(folder / "base"), str(folder / data)]
    request = finetune_request(words, [*QUICK, *settings], **kinds)
    return train(request.config, out, resume=resume, quiet=True)


def weights(run):
    opened = Run.open(run)
    return opened.load(opened.latest).model_arrays()


def test_an_adapter_learns_while_its_base_stands_still(folder, tmp_path):
    before = weights(folder / "base")
    tune(folder, tmp_path / "tuned", "train.max_steps=60")
    saved = weights(tmp_path / "tuned")
    assert all(".lora_" in name for name in saved)
    assert sum(value.size for value in saved.values()) == 4 * 4 * (16 + 16) * 2
    base, tuned = octavo.load(folder / "base"), octavo.load(tmp_path / "tuned")
    assert tuned.score(OTHER).loss < base.score(OTHER).loss - 0.05
    for name, value in tuned.model.state_dict().items():
        plain = name.replace(".base.", ".")
        if ".lora_" not in name and plain in before:
            assert np.array_equal(value.numpy(), before[plain]), name


def test_only_adapters_have_gradients_and_optimizer_state(folder, tmp_path):
    tune(folder, tmp_path / "tuned")
    opened = Run.open(tmp_path / "tuned")
    state = opened.load(opened.latest).optimizer_tensors()
    assert state
    assert all(".lora_" in name for name in state)


def test_step_0_is_the_base_bit_for_bit(folder, tmp_path):
    tune(folder, tmp_path / "tuned", "train.max_steps=0")
    base, tuned = octavo.load(folder / "base"), octavo.load(tmp_path / "tuned")
    ids = list(b"the cat sat")
    assert np.array_equal(base.logits(ids), tuned.logits(ids))


@pytest.mark.parametrize("settings", [("lora.dropout=0.1",), ("model.dropout=0.1",)])
def test_a_resumed_adapter_equals_an_undisturbed_one(folder, tmp_path, settings):
    tune(folder, tmp_path / "whole", *settings)
    with cut_at(7):
        tune(folder, tmp_path / "cut", *settings)
    tune(folder, tmp_path / "cut", *settings, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_merged_equals_unmerged_and_is_a_plain_run(folder, tmp_path):
    tune(folder, tmp_path / "tuned")
    tuned = octavo.load(tmp_path / "tuned")
    ids = list(b"a dog and a log")
    apart = tuned.logits(ids)
    facts = merge_run(tuned, tmp_path / "merged")
    merged = octavo.load(tmp_path / "merged")
    assert weights(tmp_path / "merged").keys() == weights(folder / "base").keys()
    assert np.abs(merged.logits(ids) - apart).max() <= 1e-5 * np.abs(apart).max()
    assert facts["largest_change_of_a_logit"] <= 1e-5
    # It can be trained on like any run.
    config = load_config(tmp_path / "merged" / "config.yaml", ["train.max_steps=2"])
    assert train(config, tmp_path / "merged", resume=True, quiet=True).step == 2


def test_a_merge_that_changes_logits_is_refused(folder, tmp_path, monkeypatch):
    tune(folder, tmp_path / "tuned")
    plain = merging.merge

    def spoilt(model):
        plain(model)
        with torch.no_grad():
            model.blocks[0].attn.q_proj.weight += 0.1

    monkeypatch.setattr(merging, "merge", spoilt)
    with pytest.raises(ParityError):
        merge_run(octavo.load(tmp_path / "tuned"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_every_weight_can_be_tuned_instead(folder, tmp_path):
    tune(folder, tmp_path / "all", "lora.rank=0", "optim.lr=1e-3", train_all=True)
    assert weights(tmp_path / "all").keys() == weights(folder / "base").keys()
    shutil.move(folder / "base", folder / "away")
    try:
        octavo.load(tmp_path / "all").generate("the", max_new_tokens=3)  # needs no base
    finally:
        shutil.move(folder / "away", folder / "base")


def test_a_base_is_found_where_it_went_and_no_other_is_taken(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    words = [str(tmp_path / "base"), str(folder / "other.txt")]
    request = finetune_request(words, QUICK, train_all=False, head_only=False, labels=False)
    train(request.config, tmp_path / "tuned", quiet=True)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ConfigError, match="--base"):
        octavo.load(tmp_path / "tuned")
    lm = octavo.load(tmp_path / "tuned", base=tmp_path / "moved")
    assert len(lm.generate("the", max_new_tokens=3)) == 3
    tune(folder, tmp_path / "stranger", "lora.rank=0", train_all=True)
    with pytest.raises(CheckpointError, match=r"SHA-256 \w{64}; .* has \w{64}"):
        octavo.load(tmp_path / "tuned", base=tmp_path / "stranger")


def test_completions_are_learned_and_prompts_are_not(folder, tmp_path):
    lines = [
        {"prompt": f"{'the ' * (n % 3)}{animal} ", "completion": place}
        for n in range(20)
        for animal, place in (("cat", "on the mat."), ("dog", "on the log."))
    ]
    (folder / "places.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = ("train.max_steps=150", "eval.every=50", "optim.lr=1e-2", "lora.rank=0")
    result = tune(folder, tmp_path / "tuned", *settings, data="places.jsonl", train_all=True)
    assert result.best_val_loss < 0.1  # of the completions; the prompts cannot be foreseen
    assert Run.open(tmp_path / "tuned").config.data.kind == "completion"
    lm = octavo.load(tmp_path / "tuned")
    assert lm.generate("the cat ", max_new_tokens=11, temperature=0) == "on the mat."
    assert lm.generate("the dog ", max_new_tokens=11, temperature=0) == "on the log."


def test_conversations_keep_their_template(folder, tmp_path):
    talk = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a cat"}]
    }
    (folder / "talk.jsonl").write_text("\n".join([json.dumps(talk)] * 20), encoding="utf-8")
    tune(folder, tmp_path / "tuned", data="talk.jsonl")
    assert Run.open(tmp_path / "tuned").config.data.kind == "chat"
    kept = json.loads((tmp_path / "tuned" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "Assistant" in kept["chat_template"]


@pytest.mark.parametrize("how", ["adapters", "head", "all"])
def test_a_classifier_learns_a_toy_task(folder, tmp_path, how):
    draw = np.random.default_rng(0)
    rows = ["text,label"]
    for _ in range(160):
        animal = draw.choice(["cat", "dog"])
        words = draw.choice(["the", "sat", "on", "and", "log"], 3)
        rows.append(f"{' '.join(words)} {animal},{'feline' if animal == 'cat' else 'canine'}")
    (folder / "animals.csv").write_text("\n".join(rows), encoding="utf-8")
    settings = ["train.max_steps=120", "eval.every=60", "data.val_fraction=0.25"]
    settings += ["lora.rank=4"] if how == "adapters" else ["lora.rank=0"]
    settings += ["optim.lr=1e-2"] if how == "all" else []
    kinds = {"labels": True, "head_only": how == "head", "train_all": how == "all"}
    tune(folder, tmp_path / "tuned", *settings, data="animals.csv", **kinds)
    last = events(tmp_path / "tuned", "eval")[-1]
    assert last["val_accuracy"] > 0.95
    assert last["val_macro_f1"] > 0.95
    assert (tmp_path / "tuned" / "confusion.png").stat().st_size > 0
    saved = weights(tmp_path / "tuned")
    if how == "head":
        assert set(saved) == {"head.weight", "head.bias"}
    lm = octavo.load(tmp_path / "tuned")
    assert [found.label for found in lm.classify(["the cat", "a dog"])] == ["feline", "canine"]
    with pytest.raises(ConfigError, match="does not write"):
        lm.generate("the")
    assert judge_validation(lm).accuracy == last["val_accuracy"]


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        (["lora.targets=[query]"], ConfigError, "q_proj"),
        (["lora.rank=17"], ConfigError, "1 to 16"),
        (["model.n_layer=3"], ConfigError, "base's"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_written(
    folder, tmp_path, settings, kind, said
):
    with pytest.raises(kind, match=said):
        tune(folder, tmp_path / "tuned", *settings)
    assert not (tmp_path / "tuned").exists()


def test_one_label_is_none(folder, tmp_path):
    (folder / "same.csv").write_text("text,label\na,x\nb,x\n", encoding="utf-8")
    with pytest.raises(DataError, match="'x'"):
        tune(folder, tmp_path / "tuned", data="same.csv", labels=True)


def test_adapters_without_a_base_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="octavo finetune"):
        trained(TEXT, tmp_path / "run", *SMALL, "lora.rank=4")
