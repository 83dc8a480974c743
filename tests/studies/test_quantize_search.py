"""What quantization costs is measured right, and the search for a mix keeps to its bound."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from model_kit import random_model
from training_kit import trained

import octavo
from octavo.adapting.quantize import load_quantized, quantized, quantized_model
from octavo.checkpoint import Run
from octavo.config import ModelConfig
from octavo.errors import ParityError
from octavo.evaluating.perplexity import score_windows
from octavo.packed import Storage, open_packed
from octavo.studies import quantize_cost
from octavo.studies.quantize_cost import Judge, Windows, tokens_per_second, windows_for
from octavo.studies.quantize_search import (
    INT8,
    MOST_UNITS,
    Mix,
    ladder,
    order_steps,
    quantize_run,
    search,
    units,
)

SMALL = dict(vocab_size=23, block_size=16, n_layer=2, n_head=2, d_model=32, d_ff=96)
WORDS = ["she", "sells", "sea", "shells", "by", "the", "shore", "and", "that", "are"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """How fast it writes, and by which engine, is not what is tested here."""
    monkeypatch.setattr(quantize_cost, "SPEED_TOKENS", 3)
    monkeypatch.setenv("OCTAVO_ENGINE", "torch")


def make(seed, **switches):
    return random_model(ModelConfig(**SMALL | switches), seed, noise=0.1)


def windows(eot_id=None, own=False):
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 23, (2, 12, 16))
    y[3, :9] = -100
    return Windows("", x, y, own=own, eot_id=eot_id)


def test_a_model_costs_nothing_against_itself():
    judge = Judge(make(1), windows())
    cost = judge.cost(make(1))
    assert cost.kl == pytest.approx(0, abs=1e-7)
    assert cost.rise == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("eot_id", [None, 4])
@pytest.mark.parametrize(("batch", "logits"), [(4096, 1 << 25), (32, 23 * 5)])
def test_loss_and_divergence_are_those_of_the_definition(eot_id, batch, logits, monkeypatch):
    monkeypatch.setattr(quantize_cost, "BATCH_TOKENS", batch)
    monkeypatch.setattr(quantize_cost, "LOGITS", logits)
    one, other, on = make(1), make(2), windows(eot_id)
    cost = Judge(one, on).cost(other)
    scores = [score_windows(model, on.x, on.y, eot_id=eot_id).loss for model in (one, other)]
    assert cost.loss == pytest.approx(scores[1], rel=1e-5)
    assert cost.rise == pytest.approx(math.exp(scores[1] - scores[0]) - 1, rel=1e-4)
    if eot_id is None:
        with torch.inference_mode():
            x, counted = torch.from_numpy(on.x), torch.from_numpy(on.y != -100)
            p, q = one(x).softmax(-1), other(x).softmax(-1)
        divergence = (p * (p / q).log()).sum(-1)[counted]
        assert cost.kl == pytest.approx(divergence.mean().item(), rel=1e-4)


def test_on_its_own_words_perplexity_rises_by_the_divergence():
    cost = Judge(make(1), windows(own=True)).cost(make(2))
    assert cost.rise == pytest.approx(math.expm1(cost.kl))


def test_units_are_few_whatever_the_depth():
    for layers in (1, 2, 4, 12, 36, 100):
        parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj")
        names = [f"blocks.{i}.{part}.weight" for i in range(layers) for part in parts]
        found = units(["tok_emb.weight", *names, "lm_head.weight"])
        assert len(found) <= MOST_UNITS
        together = [name for unit in found.values() for name in unit]
        assert sorted(together) == sorted(["tok_emb.weight", *names, "lm_head.weight"])
    assert list(units(["blocks.0.attn.q_proj.weight"])) == ["blocks.0.attn.q_proj"]


@pytest.mark.parametrize("columns", [32, 33, 48, 96, 100, 768])
def test_every_step_of_a_ladder_is_smaller(columns):
    sizes = [storage.bytes((64, columns)) for storage in ladder(columns)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that has learnt something, so that it has something to lose; odd widths in it."""
    text = " ".join(np.random.default_rng(0).choice(WORDS, 6000).tolist())
    settings = [
        "model.block_size=32", "model.n_layer=2", "model.n_head=2", "model.d_model=36",
        "model.d_ff=80", "train.max_steps=60", "train.micro_batch_size=16", "optim.lr=1e-2",
        "eval.windows=16",
    ]  # fmt: skip
    return trained(text, tmp_path_factory.mktemp("search") / "sea", *settings)


@pytest.fixture(scope="module")
def parts(run):
    lm = octavo.load(run, device="cpu")
    weights = {name: tensor.numpy() for name, tensor in lm.model.state_dict().items()}
    del weights["lm_head.weight"]
    return lm, weights, Judge(lm.model, windows_for(lm, None))


def test_a_mix_computes_what_a_model_quantized_at_once_computes(parts):
    lm, weights, judge = parts
    mix = Mix(lm.config, weights)
    steps = [("tok_emb", 1), ("blocks.1.mlp.down_proj", 2), ("blocks.0.attn.q_proj", 1)]
    mix.at(steps[:1])
    found = judge.cost(mix.at(steps))
    assert sum(kept.kind == "int4" for kept in mix.storages.values()) == 3
    fresh = quantized_model(lm.config, dict(quantized(weights, mix.storages)))
    assert judge.cost(fresh) == found
    assert judge.cost(mix.at([])) == judge.cost(Mix(lm.config, weights).model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_does_not_follow_the_embedding(tied):
    model = make(1, tie_embeddings=tied)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    mix = Mix(model.config, weights)
    found = mix.at([("tok_emb", 1)])
    fresh = quantized_model(model.config, dict(quantized(weights, mix.storages)))
    assert torch.equal(found.lm_head.weight, fresh.lm_head.weight)
    assert torch.equal(found.tok_emb.weight, fresh.tok_emb.weight)
    assert torch.equal(found.lm_head.weight, found.tok_emb.weight) is tied


class Sketch:
    """Of a mix: two units of one tensor each, with three steps down."""

    def __init__(self, sizes, errors):
        self.units, self.ladders = {"a": ["a"], "b": ["b"]}, {"a": range(4), "b": range(4)}
        self.bytes = lambda unit, level: sizes[level]
        self.error = lambda unit, level: errors[level]


def test_the_least_harm_a_byte_goes_first():
    sketch = Sketch([80, 40, 38, 37], [0, 8, 9, 10])
    steps = order_steps(sketch, {"a": 8.0, "b": 1.0})
    assert steps == [("b", 1), ("b", 2), ("b", 3), ("a", 1), ("a", 2), ("a", 3)]
    steps = order_steps(sketch, {"a": 8.0, "b": 6.0})
    assert steps == [("b", 1), ("a", 1), ("b", 2), ("a", 2), ("b", 3), ("a", 3)]


def test_a_cheap_step_waits_for_the_dearer_one_before_it():
    """Otherwise a unit would first be taken to its last level and then back up."""
    steps = order_steps(Sketch([80, 79, 40, 39], [0, 8, 9, 9.1]), {"a": 1.0, "b": 1.5})
    assert steps == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]


@pytest.mark.parametrize("bound", [0.002, 0.01, 0.05, 10.0])
def test_the_mix_keeps_to_the_bound_and_more_freedom_is_never_larger(parts, bound):
    lm, weights, judge = parts
    found = {}
    for allowed in (bound, 2 * bound):
        mix = Mix(lm.config, weights)
        chosen, _ = search(mix, judge, allowed)
        assert judge.cost(mix.at([])).rise <= allowed
        storages = mix.storages | chosen
        model = quantized_model(lm.config, dict(quantized(weights, storages)))
        assert judge.cost(model).rise <= allowed
        found[allowed] = sum(kept.bytes(weights[name].shape) for name, kept in storages.items())
    assert found[2 * bound] <= found[bound]
    if bound == 10.0:
        assert all(kept.kind == "int4" for kept in chosen.values())


def test_the_search_measures_no_more_than_42_times(parts, monkeypatch):
    lm, weights, judge = parts
    calls = []
    plain = Judge.cost
    monkeypatch.setattr(Judge, "cost", lambda *a, **k: calls.append(1) or plain(*a, **k))
    search(Mix(lm.config, weights), judge, 0.01)
    assert len(calls) <= 42


def test_what_stays_at_int8_is_named_with_its_price(parts):
    lm, weights, judge = parts
    least = judge.cost(Mix(lm.config, weights).at([])).rise
    chosen, remarks = search(Mix(lm.config, weights), judge, max(least, 0) + 1e-6)
    stayed = [name for name, kept in chosen.items() if kept == INT8]
    assert stayed
    assert len(remarks) == len(stayed)
    assert "stays int8: at int4 it alone adds" in remarks[0]


def test_where_int8_is_too_much_auto_refuses(parts):
    lm, weights, judge = parts
    with pytest.raises(ParityError, match=r"int8 alone raises perplexity by .*; -1.00% is allowed"):
        search(Mix(lm.config, weights), judge, -0.01)


def test_auto_packs_the_mix_it_found_and_the_same_one_again(run):
    first = quantize_run(run, "auto", bound=0.01)
    opened = open_packed(run, "auto", first["weights_sha256"])
    kinds = {stored.storage.kind for stored in opened.tensors.values()}
    data = opened.path.read_bytes()
    assert kinds >= {"int4", "fp32"}
    assert first["perplexity"]["rises_percent"] <= 1.0
    assert quantize_run(run, "auto", bound=0.01)["perplexity"] == first["perplexity"]
    assert opened.path.read_bytes() == data


def test_a_text_of_ones_own_is_measured_on(run, tmp_path):
    (tmp_path / "mine.txt").write_text("the shells are by the shore " * 9, encoding="utf-8")
    lm = octavo.load(run, device="cpu")
    found = windows_for(lm, str(tmp_path / "mine.txt"))
    assert found.tokens == 28 * 9 - 1
    loss = Judge(lm.model, found).loss
    text = (tmp_path / "mine.txt").read_text(encoding="utf-8")
    assert loss == pytest.approx(lm.score(text, stride=32).loss, rel=1e-5)


def test_a_long_text_is_measured_in_places_spread_over_it(monkeypatch):
    monkeypatch.setattr(quantize_cost, "TOKENS", 64)
    x = np.arange(100)[:, None] + np.zeros((1, 16), dtype=np.int64)
    assert quantize_cost._spread(Windows("", x, x)).x[:, 0].tolist() == [0, 33, 66, 99]


def test_without_a_text_the_model_writes_its_own(run, tmp_path):
    """Its validation text is gone: divergence is what can still be measured, and it is said."""
    moved = shutil.copytree(run, tmp_path / "moved")
    config = (moved / "config.yaml").read_text(encoding="utf-8")
    (moved / "config.yaml").write_text(config.replace("sea.txt", "gone.txt"), encoding="utf-8")
    lm = octavo.load(moved, device="cpu")
    own = windows_for(lm, None)
    assert own.own
    assert "what the model itself writes" in own.name
    assert own.tokens == quantize_cost.OWN_ROWS * 32
    assert (own.x[:, 1:] == own.y[:, :-1]).all()
    assert len({tuple(row) for row in own.y.tolist()}) > 8
    facts = quantize_run(moved, "int8")
    assert "perplexity" not in facts
    assert 0 < facts["kl_nats_per_token"] < 0.01


def test_speeds_are_of_each_model_in_turns():
    class Slow:
        def __init__(self, tokens):
            self.tokens = tokens

        def generate_ids(self, prompts, count, temperature):
            assert temperature == 0
            return [[1] * self.tokens]

    speeds = tokens_per_second({"a": Slow(3), "b": Slow(9)})
    assert speeds.keys() == {"a", "b"}


def test_the_model_packed_is_the_one_measured(run):
    facts = quantize_run(run, "int4")
    lm = octavo.load(run, device="cpu")
    cost = Judge(lm.model, windows_for(lm, None)).cost(load_quantized(Run.open(run), "int4"))
    assert facts["kl_nats_per_token"] == cost.kl
    assert facts["perplexity"]["after"] == pytest.approx(math.exp(cost.loss))
    said = json.loads((run / "packed" / "int4.json").read_text(encoding="utf-8"))
    assert said["kl_nats_per_token"] == cost.kl
    assert said["file"]["sha256"]


def test_odd_widths_are_packed_in_groups_that_divide_them(run):
    facts = quantize_run(run, "int4")
    opened = open_packed(run, "int4", facts["weights_sha256"])
    groups = {stored.storage.group for stored in opened.tensors.values()} - {0}
    assert groups == {36, 40}
    assert opened.tensors["tok_emb.weight"].storage == Storage("int4", 36)
