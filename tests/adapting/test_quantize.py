"""Quantized weights are as near as they may be, and the model made of them is an ordinary one."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from model_kit import random_model

from octavo import packed
from octavo.adapting.lora import add_adapter, merge
from octavo.adapting.quantize import (
    FP16_MAX,
    bits,
    choose_storage,
    legal_groups,
    quantize,
    quantized,
    quantized_model,
    unpacked_model,
)
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, ConfigError, NonFiniteError
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import Sampling
from octavo.generating.writing import write
from octavo.model.gpt import GPT
from octavo.packed import Storage, dequantize
from octavo.training.loss import cross_entropy

SMALL = dict(vocab_size=19, block_size=16, n_layer=2, n_head=2, d_model=32, d_ff=48)
GPT2 = dict(position="learned", norm="layernorm", mlp="gelu_tanh", bias=True)


def make(**switches):
    return random_model(ModelConfig(**SMALL | switches), 3, noise=0.1)


def weights_of(model):
    """A model's weights as a checkpoint has them: tied ones once."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    return state


def numbers_of(model, precision):
    weights = weights_of(model)
    return dict(quantized(weights, choose_storage(weights, precision)[0]))


def with_dequantized(model, numbers):
    """An ordinary model whose weights are what the quantized ones stand for."""
    plain = GPT(model.config).eval()
    state = {name: torch.from_numpy(dequantize(*pair)) for name, pair in numbers.items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["tok_emb.weight"]
    plain.load_state_dict(state)
    return plain


IDS = torch.randint(0, 19, (2, 16), generator=torch.Generator().manual_seed(5))

magnitudes = st.sampled_from([1e-40, 1e-30, 1e-9, 1e-5, 1e-2, 1.0, 300.0, 4e5])
matrices = st.tuples(
    arrays(np.float32, (3, 96), elements=st.floats(-1, 1, width=32)),
    arrays(np.float32, (3, 1), elements=magnitudes),
)


def check_bound(w, storage):
    """No number moves by more than half its scale, but for scales below their type's normal range.

    In fp16 those are coarse: a step of 2^-24, half of it times what it is multiplied by.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no overflow, no division by zero
        values, scale = quantize(w, storage)
        found = dequantize(values, scale)
    assert np.isfinite(found).all()
    step = np.repeat(np.abs(scale.reshape(len(w), -1).astype(np.float64)), storage.group or 96, 1)
    tiny, lost = (2.0**-14, 8.5 * 2.0**-25) if storage.group else (2.0**-126, 127 * 2.0**-126)
    allowed = step / 2 + lost * (step < tiny)
    assert (np.abs(w.astype(np.float64) - found) <= allowed + 4e-7 * np.abs(w)).all()
    limits = (-8, 7) if storage.group else (-127, 127)
    assert limits[0] <= values.min() <= values.max() <= limits[1]


@settings(max_examples=150)
@given(matrices)
@pytest.mark.parametrize("group", [0, 16, 24, 32, 96])
def test_no_number_moves_by_more_than_half_a_scale(group, matrix):
    check_bound(matrix[0] * matrix[1], Storage("int4", group) if group else Storage("int8"))


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-38, -3e5, 0.3])
def test_constant_rows_come_back_as_they_were(group, value):
    """A row of zeros has a scale of zero, which nothing may be divided by."""
    w = np.full((2, 96), value, dtype=np.float32)
    check_bound(w, Storage("int4", group) if group else Storage("int8"))
    if abs(value) > 1e-4 or value == 0:
        kept = dequantize(*quantize(w, Storage("int4", group) if group else Storage("int8")))
        assert kept == pytest.approx(w, rel=2.0**-11)


def test_int8_gives_each_row_its_own_scale():
    w = np.ones((2, 8), dtype=np.float32) * [[1], [1000]]
    values, scale = quantize(w.astype(np.float32), Storage("int8"))
    assert values.tolist() == [[127] * 8] * 2
    assert scale == pytest.approx([1 / 127, 1000 / 127])


def test_the_search_beats_the_plain_scale_and_uses_the_longer_negative_side():
    w = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
    groups = w.reshape(-1, 32)
    scale = (np.abs(groups).max(1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    plain = np.rint(groups / scale) * scale
    found = dequantize(*quantize(w, Storage("int4", 32)))
    error = np.square(found - w).sum() / np.square(plain.reshape(w.shape) - w).sum()
    assert error < 0.75
    assert quantize(w, Storage("int4", 32))[0].min() == -8


def test_the_usual_group_is_32_and_odd_widths_have_their_own():
    assert legal_groups(768)[0] == legal_groups(64)[0] == 32
    assert legal_groups(33) == [33]
    assert legal_groups(7) == []
    assert legal_groups(131) == []  # a prime too large for one group
    assert bits(32) == 4.5
    for columns in range(1, 200):
        assert all(columns % group == 0 for group in legal_groups(columns))


def test_what_int4_cannot_hold_stays_int8_and_is_named():
    weights = {
        "odd.weight": np.ones((2, 7), np.float32),
        "huge.weight": np.full((2, 32), 1e6, np.float32),
        "good.weight": np.ones((2, 32), np.float32),
        "pos_emb.weight": np.ones((2, 32), np.float32),
        "norm.weight": np.ones(32, np.float32),
    }
    storages, remarks = choose_storage(weights, "int4")
    assert [storage.kind for storage in storages.values()] == [
        "int8",
        "int8",
        "int4",
        "fp32",
        "fp32",
    ]
    assert len(remarks) == 2
    assert "odd.weight stays int8: no group of 16 to 128 divides its 7 columns" in remarks[0]
    assert "huge.weight" in remarks[1]
    storages, remarks = choose_storage(weights, "fp16")
    assert storages["huge.weight"].kind == "fp32"
    assert "fp16" in remarks[0]
    assert np.float16(FP16_MAX) == np.finfo(np.float16).max


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", ["int8", "int4", "fp16", "auto"])
def test_weights_that_are_no_numbers_are_not_packed(value, precision):
    weights = {"a": np.ones((2, 32), np.float32), "b": np.array([1, value], np.float32)}
    with pytest.raises(NonFiniteError, match="b holds NaN or infinity; nothing was packed"):
        choose_storage(weights, precision)


def test_bfloat16_weights_are_read_number_for_number():
    tensor = torch.randn(4, 32).to(torch.bfloat16)
    raw = tensor.view(torch.uint16).numpy()
    for storage in (Storage("int8"), Storage("int4", 32), Storage("fp32")):
        wanted, found = quantize(tensor.float().numpy(), storage), quantize(raw, storage)
        assert dequantize(*wanted).tolist() == dequantize(*found).tolist()


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
@pytest.mark.parametrize(
    "switches", [{}, GPT2, dict(tie_embeddings=False), dict(qk_norm=True, n_kv_head=1)]
)
def test_quantized_layers_compute_what_the_dequantized_model_computes(precision, switches):
    model = make(**switches)
    numbers = numbers_of(model, precision)
    with torch.inference_mode():
        found = quantized_model(model.config, numbers)(IDS)
        wanted = with_dequantized(model, numbers)(IDS)
        unquantized = model(IDS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert 0 < (found - unquantized).abs().max() <= 0.5 * unquantized.abs().max()


def test_a_tied_head_and_embedding_share_their_numbers():
    model = quantized_model(make().config, numbers_of(make(), "int8"))
    assert model.lm_head.weight.data_ptr() == model.tok_emb.weight.data_ptr()


def test_the_numbers_of_another_model_are_refused():
    numbers = numbers_of(make(), "int8")
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.up_proj.weight is \(48, 32\)"):
        quantized_model(ModelConfig(**SMALL | dict(d_ff=64)), numbers)
    with pytest.raises(CheckpointError, match="not there"):
        quantized_model(ModelConfig(**SMALL | dict(n_layer=3)), numbers)


def packed_file(folder, model, precision):
    """A packed file of ``model`` in the run ``folder``, opened."""
    weights = weights_of(model)
    storages, _ = choose_storage(weights, precision)
    plan = {name: (storage, weights[name].shape) for name, storage in storages.items()}
    tied = '{"lm_head.weight": "tok_emb.weight"}' if model.config.tie_embeddings else "{}"
    facts = {"format": packed.FORMAT, "version": packed.VERSION, "precision": precision}
    facts |= {"group": "32", "tied": tied, "weights_sha256": "abc"}
    packed.write_packed(folder, plan, quantized(weights, storages), facts)
    return packed.open_packed(folder, precision, "abc")


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_a_file_gives_back_the_model_whose_weights_went_in(tmp_path, precision):
    model = make(**GPT2)
    file = packed_file(tmp_path, model, precision)
    with torch.inference_mode():
        wanted = quantized_model(model.config, numbers_of(model, precision))(IDS)
        assert torch.equal(unpacked_model(model.config, file)(IDS), wanted)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_adapters_learn_on_a_quantized_base_that_stands_still(precision):
    model = quantized_model(make().config, numbers_of(make(), precision))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(IDS)
    add_adapter(model, rank=2, targets=["q_proj", "down_proj"])
    with torch.no_grad():
        assert torch.equal(model(IDS), plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = cross_entropy(model, IDS[:, :-1], IDS[:, 1:])
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained[1::2])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    for name, tensor in before.items():
        moved = [found for found in after if found.replace(".base.", ".") == name]
        assert torch.equal(after[moved[0]], tensor)
    with pytest.raises(ConfigError, match="cannot be merged into QuantizedLinear"):
        merge(model)


def test_gradients_flow_through_a_quantized_layer_as_through_its_dequantized_twin():
    model = make(**GPT2)
    numbers = numbers_of(model, "int4")
    both = quantized_model(model.config, numbers), with_dequantized(model, numbers)
    gradients = []
    for each in both:
        cross_entropy(each, IDS[:, :-1], IDS[:, 1:]).backward()
        gradients.append(each.blocks[0].attn_norm.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_model_writes_with_a_cache_what_its_twin_writes_without(precision):
    """Its cache once took the type of the embedding: int8, in which keys and values are nothing."""
    model = make(n_kv_head=1)
    numbers = numbers_of(model, precision)
    written = []
    for each, use_cache in (
        (quantized_model(model.config, numbers), True),
        (with_dequantized(model, numbers), False),
    ):
        engine = TorchEngine(each, use_cache=use_cache)
        pieces = write(engine, None, [[1, 2, 3]], Sampling(temperature=0), 24)
        written.append([piece.id for piece in pieces])
    assert written[0] == written[1]
