"""An adapter begins as nothing, learns while the base stands still, and merges into it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_kit import perturb
from torch import nn

from octavo.adapting.lora import (
    LoRALinear,
    adapted_layers,
    add_adapter,
    merge,
    trainable_parameters,
    unmerge,
    use_adapters,
)
from octavo.adapting.surgery import linear_layers, swap_linear
from octavo.config import ModelConfig, OptimConfig
from octavo.errors import ConfigError
from octavo.linear import Linear
from octavo.model.gpt import GPT
from octavo.training.loss import cross_entropy
from octavo.training.optim import build_optimizer, set_lr

SMALL = dict(vocab_size=17, block_size=16, n_layer=2, n_head=4, n_kv_head=2, d_model=16, d_ff=24)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "up_proj", "gate_proj", "down_proj")


@pytest.fixture
def ids():
    return torch.randint(0, 17, (3, 16), generator=torch.Generator().manual_seed(5))


def make_base():
    torch.manual_seed(1)
    return perturb(GPT(ModelConfig(**SMALL, bias=True))).eval()


@pytest.fixture
def model():
    return make_base()


def near(given, wanted, tolerance=1e-5):
    return (given - wanted).abs().max() <= tolerance * wanted.abs().max()


class Packed(nn.Module):
    """A stand-in for a quantized layer: int8 buffers, no parameter but the bias."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        scale = base.weight.detach().abs().amax() / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_queries_and_keys_of_gpt2_at_rank_8_are_294912_numbers():
    shape = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, d_model=768)
    with torch.device("meta"):
        model = GPT(ModelConfig(**shape, position="learned", norm="layernorm", mlp="gelu_tanh"))
        total = sum(p.numel() for p in model.parameters())
        names = add_adapter(model, rank=8, targets=["q_proj", "k_proj"])
    assert len(names) == 24
    assert trainable_parameters(model) == 294_912
    assert sum(p.numel() for p in model.parameters()) == total + 294_912


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(model, ids, dtype):
    model.to(dtype)
    before = model(ids)
    add_adapter(model, rank=4, targets=ALL)
    assert model(ids).dtype == dtype
    assert torch.equal(model(ids), before)
    add_adapter(model, "second", rank=2, targets=["q_proj"])
    assert torch.equal(model(ids), before)


def test_an_adapted_layer_computes_what_the_paper_says(model):
    layer = dict(linear_layers(model))["blocks.1.mlp.up_proj"]
    add_adapter(model, rank=3, alpha=7.0, targets=["blocks.1.mlp.up_proj"])
    perturb(model, only="lora_")
    adapted = model.blocks[1].mlp.up_proj
    A, B = adapted.lora_A["default"], adapted.lora_B["default"]
    assert A.shape == (3, 16)
    assert B.shape == (24, 3)
    x = torch.randn(2, 5, 16)
    weight = layer.weight + 7.0 / 3 * B @ A
    assert near(adapted(x), x @ weight.T + layer.bias, 1e-6)


def test_targets_are_the_layers_named_and_no_others(model):
    names = add_adapter(model, rank=2, targets=["k_proj", "blocks.1.attn.o_proj"])
    assert names == ["blocks.0.attn.k_proj", "blocks.1.attn.k_proj", "blocks.1.attn.o_proj"]
    adapted = [n for n, layer in linear_layers(model) if isinstance(layer, LoRALinear)]
    assert adapted == names
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{n}.lora_{kind}.default" for n in names for kind in "AB"]


def test_a_target_that_matches_nothing_lists_what_there_is(model):
    before = dict(linear_layers(model))
    for targets in (["q_proj", "c_attn"], ["proj"], ["attn"], ["10.attn.q_proj"]):
        with pytest.raises(ConfigError, match=rf"called {targets[-1]}; there are: q_proj, k_proj,"):
            add_adapter(model, rank=2, targets=targets)
    with pytest.raises(ConfigError, match="is a target"):
        add_adapter(model, targets=[])
    assert dict(linear_layers(model)) == before  # q_proj too has been left alone
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_that_does_not_fit_is_refused_before_anything_is_changed(model, rank):
    before = dict(linear_layers(model))
    with pytest.raises(ConfigError, match=r"does not fit blocks\.0\.attn\.k_proj; it is 8 x 16"):
        add_adapter(model, rank=rank, targets=["k_proj", "o_proj"])
    assert dict(linear_layers(model)) == before
    add_adapter(model, rank=8, targets=["k_proj", "o_proj"])


def test_names_that_cannot_be(model):
    add_adapter(model, "voice-2", rank=2)
    with pytest.raises(ConfigError, match="has an adapter 'voice-2' already"):
        add_adapter(model, "voice-2", rank=2)
    for name in ("", "a.b", "pop", "keys", "training", "../x"):
        with pytest.raises(ConfigError, match="cannot be called"):
            add_adapter(model, name, rank=2)
    with pytest.raises(ConfigError, match="no adapter 'voice'; it has: voice-2"):
        use_adapters(model, {"voice": 1.0})
    with pytest.raises(ConfigError, match="no adapter 'default'; add one"):
        adapted_layers(GPT(ModelConfig(**SMALL)), "default")


def test_a_head_that_is_also_the_embedding_is_refused(model):
    with pytest.raises(ConfigError, match="shares its matrix with the token embedding"):
        add_adapter(model, rank=2, targets=["q_proj", "lm_head"])
    untied = GPT(ModelConfig(**SMALL, tie_embeddings=False))
    assert add_adapter(untied, rank=2, targets=["lm_head"]) == ["lm_head"]


def test_only_adapters_are_trained_and_the_base_stands_still(model, ids):
    base = copy.deepcopy(model.state_dict())
    add_adapter(model, rank=4, targets=ALL)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    set_lr(optimizer, 1e-2)
    for _ in range(3):
        cross_entropy(model, ids, ids.roll(-1)).backward()
        assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    adapters = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert {id(p) for p in optimizer.state} == adapters
    assert len(adapters) == 2 * 7 * 2
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    assert all(p.any() for n, p in model.named_parameters() if "lora_" in n)


def test_several_adapters_are_switched_and_added_by_weight(model, ids):
    base = copy.deepcopy(model)
    add_adapter(model, "a", rank=2, alpha=4.0, targets=["q_proj", "v_proj"])
    add_adapter(model, "b", rank=3, alpha=1.0, targets=["v_proj", "down_proj"])
    perturb(model, only="lora_")

    def by_hand(weights):
        """The base with the adapters' products added to its matrices."""
        summed = copy.deepcopy(base)
        layers = dict(linear_layers(summed))
        with torch.no_grad():
            for name, weight in weights.items():
                scale = {"a": 4 / 2, "b": 1 / 3}[name]
                for path, layer in adapted_layers(model, name).items():
                    product = layer.lora_B[name] @ layer.lora_A[name]
                    layers[path].weight += weight * scale * product
        return summed(ids)

    for weights in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": -2.0}, {"b": 3.0, "a": 1.0}):
        use_adapters(model, weights)
        assert near(model(ids), by_hand(weights))
        assert not near(model(ids), base(ids), 1e-3)
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(weights)
    use_adapters(model, {})
    assert torch.equal(model(ids), base(ids))
    assert trainable_parameters(model) == 0


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.25, "b": 2.0}, {}])
def test_merging_keeps_the_logits_and_unmerging_gives_back_every_bit(model, ids, weights):
    add_adapter(model, "a", rank=2, targets=ALL)
    add_adapter(model, "b", rank=4, alpha=3.0, targets=["o_proj"])
    perturb(model, only="lora_")
    use_adapters(model, weights)
    adapted, state = model(ids), copy.deepcopy(model.state_dict())
    plain = GPT(model.config)
    assert merge(model) is model
    assert all(type(layer) is Linear for _, layer in linear_layers(model))
    assert near(model(ids), adapted)
    plain.load_state_dict(model.state_dict())  # a plain model in every name and shape
    assert torch.equal(plain.eval()(ids), model(ids))
    assert unmerge(model) is model
    assert torch.equal(model(ids), adapted)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_merging_what_is_not_adapted_is_an_error(model):
    for step in (merge, unmerge):
        with pytest.raises(ConfigError, match="no linear layer is "):
            step(model)


def test_a_linear_layer_of_another_class_merges_into_its_class(model, ids):
    class Loud(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    def loud(layer):
        other = Loud(layer.in_features, layer.out_features)
        other.load_state_dict(layer.state_dict())
        return other

    swap_linear(model, lambda name, _: name.endswith("v_proj"), loud)
    before = model(ids)
    add_adapter(model, rank=2, targets=["v_proj"])
    assert torch.equal(model(ids), before)
    assert type(merge(model).blocks[0].attn.v_proj) is Loud
    assert torch.equal(model(ids), before)


def test_a_quantized_layer_can_be_adapted_but_not_merged_into(model, ids):
    swap_linear(model, lambda name, _: name.endswith("q_proj"), Packed)
    before = model(ids)
    add_adapter(model, rank=4, targets=["q_proj", "v_proj"])
    assert torch.equal(model(ids), before)
    cross_entropy(model, ids, ids.roll(-1)).backward()
    adapted = [layer for _, layer in linear_layers(model) if isinstance(layer, LoRALinear)]
    assert len(adapted) == 4
    assert all(layer.base.bias.grad is None for layer in adapted)
    assert all(layer.lora_B["default"].grad.any() for layer in adapted)
    perturb(model, only="lora_")
    assert not near(model(ids), before, 1e-3)
    layers = dict(linear_layers(model))
    with pytest.raises(ConfigError, match=r"cannot be merged into Packed; .*quantize the result"):
        merge(model)
    assert dict(linear_layers(model)) == layers  # v_proj, which could be, is not merged either


def test_dropout_of_the_adapter_acts_in_training_only(model, ids):
    add_adapter(model, rank=4, dropout=0.5, targets=ALL)
    perturb(model, only="lora_")
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.set_dropout(0.0)  # anneals the model's own rate, not the adapter's
    assert not torch.equal(model(ids), model(ids))
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model(ids))
    assert torch.equal(*draws)


def test_dropout_falls_on_what_the_adapter_reads_and_not_on_the_base(model):
    add_adapter(model, rank=4, dropout=0.5, targets=["q_proj"])
    layer = model.blocks[0].attn.q_proj.train()
    x = torch.randn(6, 16)
    assert torch.equal(layer(x), layer.base(x))  # B is zero: whatever fell, the base did not
    perturb(layer, only="lora_").train()
    torch.manual_seed(3)
    given = layer(x) - layer.base(x)
    torch.manual_seed(3)
    wanted = F.dropout(x, 0.5) @ layer.lora_A["default"].T @ layer.lora_B["default"].T * 4.0
    assert near(given, wanted)


def test_autocast_trains_adapters_in_full_precision(model, ids):
    add_adapter(model.to(torch.bfloat16), rank=2)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy(model, ids, ids.roll(-1)).backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def test_a_trained_model_learns_a_shifted_text_by_its_adapters_alone():
    """Counting in steps of one is learnt by the base; in steps of three by the adapter."""
    config = ModelConfig(vocab_size=17, block_size=12, n_layer=1, n_head=2, d_model=24, d_ff=32)
    torch.manual_seed(0)
    model = GPT(config)

    def rows(stride):
        starts = torch.arange(17)[:, None]
        return (starts + stride * torch.arange(13)) % 17

    def loss_on(stride):
        text = rows(stride)
        return cross_entropy(model, text[:, :-1], text[:, 1:]) / text[:, 1:].numel()

    def learn(stride, steps):
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.0))
        for _ in range(steps):
            loss_on(stride).backward()
            optimizer.step()
            optimizer.zero_grad()

    learn(1, 60)
    assert loss_on(1) < 0.3
    before = loss_on(3).item()
    base = copy.deepcopy(model.state_dict())
    add_adapter(model, rank=8, targets=ALL)
    learn(3, 60)
    assert before > 2.0
    assert loss_on(3) < 0.5
    after = {name.replace(".base.", "."): t for name, t in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    use_adapters(model, {})
    assert loss_on(1) < 0.3
    assert loss_on(3).item() == before
