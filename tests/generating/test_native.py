"""The native engine is the PyTorch engine, faster: equal logits, equal draws, equal bits."""

import ctypes
import dataclasses
import os
import threading

import numpy as np
import pytest
import torch
from engine_kit import (
    GREEDY,
    PROMPTS,
    VOCAB,
    make_model,
    make_slot,
    native_engine,
    native_model,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.adapting.quantize import choose_storage, is_matrix, quantize
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, ConfigError, ResourceError
from octavo.generating import native, native_structures
from octavo.generating.choosing import tell_once
from octavo.generating.engine import TorchEngine
from octavo.generating.native import NativeEngine, NativeModel, as_stored, rope_table
from octavo.generating.native_build import load_library
from octavo.generating.sampling import PRESETS, Sampling, pick
from octavo.model.counts import count_parameters, tensor_shapes
from octavo.model.gpt import GPT
from octavo.model.layers import rope_table as torch_rope_table
from octavo.model_config import RopeScaling
from octavo.packed import Storage, Stored, dequantize, pack

# The largest difference of a logit, as a share of the largest logit: in all, and a layer; derived
# in native.py.
FP32_BOUND = 1e-4
BOUNDS = {"fp16": 2**-9, "int8": 2**-9, "int4": 8 / 127}


def make_steady_model(seed, **config):
    """A model whose layers pass on a difference in their input about as large as it came."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**config)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def quantized(model, precision, rng=None):
    """The native model at this precision, and the PyTorch model with the same dequantized weights.

    With ``rng`` every matrix is kept in some other way, as `octavo quantize --to auto` may do.
    """
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    chosen, _ = choose_storage(weights, precision)
    stored, same = {}, {}
    for name, tensor in weights.items():
        storage = chosen[name]
        if rng is not None and is_matrix(name, tensor.shape) and "emb" not in name:
            kinds = {Storage("fp32"), Storage("fp16"), Storage("int8"), storage}
            storage = sorted(kinds)[rng.integers(len(kinds))]
        if name == "lm_head.weight" and model.config.tie_embeddings:
            storage = chosen["tok_emb.weight"]
        numbers = quantize(tensor, storage)
        stored[name] = Stored(storage, tensor.shape, *pack(*numbers))
        same[name] = torch.from_numpy(dequantize(*numbers).reshape(tensor.shape))
    reference = GPT(model.config).eval()
    reference.load_state_dict(same)
    return NativeModel(model.config, stored), reference


def instruction_sets():
    """Those that this processor has."""
    found = []
    for isa in ("avx512vnni", "avx512", "avx2", "neon", "scalar"):
        os.environ["OCTAVO_ISA"] = isa
        try:
            native_engine(make_model(), threads=1)
            found.append(isa)
        except ConfigError:
            pass
        finally:
            del os.environ["OCTAVO_ISA"]
    return found


@pytest.fixture(scope="module")
def isas():
    found = instruction_sets()
    assert "scalar" in found
    return found


configs = st.builds(
    dict,
    position=st.sampled_from(["learned", "rope", "both", "none"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    norm_position=st.sampled_from(["pre", "post", "sandwich"]),
    mlp=st.sampled_from(["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu"]),
    bias=st.booleans(),
    norm_bias=st.sampled_from([None, True, False]),
    qk_norm=st.booleans(),
    tie_embeddings=st.booleans(),
    n_head=st.just(6),
    n_kv_head=st.sampled_from([1, 2, 3, 6]),
    head_dim=st.sampled_from([2, 6, 16]),
    d_model=st.sampled_from([7, 16, 33, 48]),
    d_ff=st.sampled_from([5, 19, 32, 64]),
    vocab_size=st.sampled_from([VOCAB, 64]),
    block_size=st.sampled_from([23, 40]),
    n_layer=st.integers(1, 2),
)


def compare(reference, ours, ids, bound):
    """Hold logits (T, V) to PyTorch's: close, and the same greedy token where that is clear."""
    with torch.no_grad():
        wanted = reference(torch.tensor([ids]))[0].numpy()
    allowed = bound * np.abs(wanted).max()
    assert np.abs(ours - wanted).max() <= allowed
    second, first = np.sort(wanted, axis=1)[:, -2:].T
    clear = first - second > 2 * allowed
    assert (ours.argmax(1) == wanted.argmax(1))[clear].all()


@settings(max_examples=60)
@given(config=configs, seed=st.integers(0, 99), chunk=st.sampled_from([1, 3, 64]), data=st.data())
def test_fp32_logits_are_pytorchs(isas, config, seed, chunk, data):
    """Every switch of the model, on every instruction set, alone and in chunks."""
    model = make_model(seed, **config)
    ids = np.random.default_rng(seed).integers(0, VOCAB, 21).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_ISA", data.draw(st.sampled_from(isas)))
        engine = native_engine(model, threads=1 + seed % 2, chunk=chunk, vocab=VOCAB)
        compare(model, engine.logits(ids), ids, FP32_BOUND)


@settings(max_examples=90)
@given(
    config=configs,
    seed=st.integers(0, 99),
    precision=st.sampled_from(["fp16", "int8", "int4"]),
    mixed=st.booleans(),
    data=st.data(),
)
def test_packed_logits_are_those_of_the_dequantized_weights(
    isas, config, seed, precision, mixed, data
):
    config["d_model"] = data.draw(st.sampled_from([32, 48, 80]))
    config["d_ff"] = data.draw(st.sampled_from([32, 67, 80]))  # 67: no group divides it
    rng = np.random.default_rng(seed)
    model = make_steady_model(seed, **config)
    packed, reference = quantized(model, precision, rng if mixed else None)
    ids = rng.integers(0, VOCAB, 21).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_ISA", data.draw(st.sampled_from(isas)))
        engine = NativeEngine(packed, threads=1 + seed % 2, chunk=5)
        compare(reference, engine.logits(ids), ids, BOUNDS[precision] * config["n_layer"])


@pytest.mark.parametrize("scaling", [None, "linear", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_tables_are_pytorchs(scaling, theta):
    """An angle is frequency times position: one unit in the last place of a frequency is 1e-4 at
    position 2,000, which numpy's own fp32 powers differed by.
    """
    stretched = scaling and RopeScaling(type=scaling, factor=4.0, original_block_size=512)
    shape = {"vocab_size": 9, "block_size": 2048, "n_head": 1, "rope_theta": theta}
    config = ModelConfig(**shape, d_model=64, rope_scaling=stretched)
    theirs = torch_rope_table(config, torch.arange(2048))
    for ours, other in zip(rope_table(config), theirs, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, other.numpy(), atol=1e-5)


@given(config=configs)
def test_the_tensors_there_must_be_are_the_models(config):
    shapes = {name: tuple(t.shape) for name, t in make_model(**config).state_dict().items()}
    assert tensor_shapes(ModelConfig(**config)) == shapes


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_every_bit_is_the_same_alone_in_a_batch_in_chunks_and_with_any_threads(isas, precision):
    """Log-probabilities are compared as they are, not approximately."""
    model = make_model(d_model=48, n_head=3, d_ff=80, block_size=24, n_kv_head=1)
    weights = native_model(model) if precision == "fp32" else quantized(model, precision)[0]
    for isa in isas:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OCTAVO_ISA", isa)
            one = NativeEngine(weights, threads=1)
            alone = [written(one, [prompt], 30, logprobs=3) for prompt in PROMPTS]
            expected = tuple([parts[k][0] for parts in alone] for k in range(2))
            for chunk, threads, most in ((1, 2, 1), (4, 1, 9), (64, 2, 64)):
                many = NativeEngine(weights, len(PROMPTS), threads=threads, chunk=chunk)
                assert written(many, PROMPTS, 30, most=most, logprobs=3) == expected


@settings(max_examples=50)
@given(st.integers(0, 999), st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 9))
def test_a_draft_decides_how_much_a_step_returns_and_never_what(seed, lengths, most):
    """Drafts that are right for a while and then are not; bit for bit what is drawn without."""
    engine = DRAFTED
    text, tops = (rows[0] for rows in written(engine, [[1, 2, 3]], 24, logprobs=2))
    slot, rng = make_slot(0, [1, 2, 3], logprobs=2), np.random.default_rng(seed)
    got = []
    for length in lengths:
        at = len(slot.ids) - slot.prompt_length
        right = int(rng.integers(0, length + 1))
        wrong = rng.integers(0, VOCAB, length - right).tolist()
        slot.draft, slot.left = text[at : at + right] + wrong, 24 - at
        if not slot.left:
            break
        ids = engine.step([slot], most)[0]
        window = engine.model.config.block_size
        whole = len(slot.ids) + length < window and at + length < 24
        if whole and most > length:
            assert len(ids) >= min(right + 1, len(text) - at)
        slot.ids.extend(ids[: max(1, len(ids) - seed % 2)])  # the caller need not take all
        got += slot.top[: len(slot.ids) - slot.prompt_length - at]
    assert slot.ids[3:] == text[: len(slot.ids) - 3]
    assert got == tops[: len(got)]
    engine.release(0)


DRAFTED = None


@pytest.fixture(scope="module", autouse=True)
def drafted():
    """One engine for all the examples of a property."""
    global DRAFTED
    DRAFTED = native_engine(make_model(n_kv_head=1), threads=2)


def test_a_step_ends_where_its_first_row_does():
    engine = native_engine(make_model(block_size=64), 2, threads=1)
    ended, other = engine.step([make_slot(0, [1, 2], left=3), make_slot(1, [5])], 20)
    assert (len(ended), len(other)) == (3, 3)  # the free slot may be wanted by another row


def test_time_is_up_between_tokens_and_never_before_the_first(monkeypatch):
    monkeypatch.setattr(native, "SLICE", 0.0)
    model = make_model(block_size=64)
    engine = native_engine(model, 2, threads=1, chunk=4)
    slots = [make_slot(0, range(20)), make_slot(1, [1])]
    assert [len(ids) for ids in engine.step(slots, 20)] == [1, 1]
    expected = TorchEngine(model, 2).step(slots)
    assert engine.step(slots, 20) == expected


def test_another_thread_can_cancel_a_step():
    shape = {"d_model": 128, "n_layer": 4, "block_size": 2048, "n_head": 8}
    engine = native_engine(make_model(**shape), threads=1, chunk=2048)
    slot = make_slot(0, [1] * 2000)
    timer = threading.Timer(0.02, engine.cancel)
    timer.start()
    with pytest.raises(InterruptedError):
        engine.step([slot])
    timer.join()
    again = engine.step([slot])  # as if nothing had been
    assert again == NativeEngine(engine.model, threads=2).step([slot])


def test_a_cache_that_does_not_fit_is_refused_with_the_number(monkeypatch):
    monkeypatch.setattr(native, "available_memory", lambda: 3_000_000)
    engine = native_engine(make_model(block_size=2**16), threads=1)
    slot = make_slot(0, [1] * 4000)  # 2 layers x (key, value) x 16 numbers x 4 bytes a token
    assert engine.step([slot])
    with pytest.raises(ResourceError, match="these texts need 4 MB, 3 MB are free"):
        engine.step([make_slot(0, [1] * 15_000)])
    assert engine.step([slot])  # and goes on with what fits


def test_memory_and_cores_are_those_of_this_machine():
    assert 2**20 < native.available_memory() < 2**50
    assert 1 <= native.usable_cores() <= len(os.sched_getaffinity(0))


def test_more_threads_than_cores_are_warned_of_once(capsys):
    tell_once.cache_clear()
    many = 4 * native.usable_cores()
    assert [native.choose_threads(many, 1) for _ in range(3)] == [many] * 3
    assert capsys.readouterr().err.count("warning:") == 1


def test_a_small_model_gets_one_thread_and_a_large_one_every_core():
    assert native.choose_threads(None, 3_000_000) == 1
    assert native.choose_threads(None, 2**40) == native.usable_cores()
    model = make_model()
    assert native_model(model).bytes == 4 * count_parameters(model.config).total  # tied ones once


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OCTAVO_ISA", "sse9", "OCTAVO_ISA=sse9: no such"),
        ("OCTAVO_THREADS", "many", "OCTAVO_THREADS is 'many'"),
        ("OCTAVO_THREADS", "0", "OCTAVO_THREADS is 0; give a whole number of at least 1"),
    ],
)
def test_an_environment_that_means_nothing_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        native_engine(make_model(), threads=None)


def test_other_weights_than_the_configurations_are_refused():
    tensors = dict(native_model(make_model()).tensors)
    config = ModelConfig(vocab_size=VOCAB, block_size=16, n_layer=2, n_head=2, d_model=16)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.up_proj.weight is missing"):
        NativeModel(
            config, {n: t for n, t in tensors.items() if n != "blocks.1.mlp.up_proj.weight"}
        )
    with pytest.raises(CheckpointError, match="spare is left over"):
        NativeModel(config, {**tensors, "spare": tensors["norm_f.weight"]})
    with pytest.raises(CheckpointError, match=r"norm_f.weight has shape \(29, 16\), not \(16,\)"):
        NativeModel(config, {**tensors, "norm_f.weight": tensors["tok_emb.weight"]})


def test_half_precision_is_widened():
    stored = as_stored(np.array([1.5], np.float16))
    assert (stored.storage.kind, stored.values.dtype, stored.values[0]) == ("fp32", np.float32, 1.5)


# The sampler by itself.


def native_pick(logits, history, sampling, n=0, prompt_length=0):
    library = native_structures.declare(load_library())
    struct = native_structures.Sampling()
    for name in native_structures.SAMPLING:
        setattr(struct, name, getattr(sampling, name))
    logits, ids = np.asarray(logits, np.float32), np.array(history, np.int32)
    return library.octavo_pick(
        logits.ctypes.data, logits.size, ids.ctypes.data, ids.size,
        ctypes.addressof(struct), n, prompt_length,
    )  # fmt: skip


def off_or(name, *values):
    default = next(f.default for f in dataclasses.fields(Sampling) if f.name == name)
    return st.sampled_from([default, *values])


samplings = st.builds(
    Sampling,
    temperature=off_or("temperature", 0.0, 0.5, 1.3),
    top_k=off_or("top_k", 1, 5, 40, 2000),
    top_p=off_or("top_p", 0.0, 0.3, 0.9, 0.999),
    min_p=off_or("min_p", 0.01, 0.3, 1.0),
    typical_p=off_or("typical_p", 0.0, 0.3, 0.9),
    repetition_penalty=off_or("repetition_penalty", 0.7, 1.3),
    presence_penalty=off_or("presence_penalty", 0.5),
    frequency_penalty=off_or("frequency_penalty", 0.25),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=500)
@given(samplings, st.integers(0, 2**32), st.sampled_from([1, 2, 17, 300]), st.integers(0, 3))
def test_draws_are_those_of_the_python_sampler(sampling, seed, size, kind):
    """Ties, ruled-out ids, steep and flat distributions, penalties of padded ids."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(size) * [0.1, 1, 5, 2][kind]).astype(np.float32)
    if kind == 3:
        logits = np.round(logits)
        logits[rng.random(size) < 0.3] = -np.inf
        logits[rng.integers(size)] = 1
    history = rng.integers(0, size + 2, 9).tolist()
    expected = pick(logits, history, sampling, 2, len(history), 3)
    assert native_pick(logits, history, sampling, 2, 3) == expected


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary_is_cut_where_sorting_cuts_it(scale, p):
    """A flat distribution keeps tens of thousands of ids, and they are not sorted."""
    rng = np.random.default_rng(7)
    for seed in range(4):
        logits = (rng.standard_normal(50_257) * scale).astype(np.float32)
        if seed % 2:
            logits = np.round(logits, 1)  # many ties
        how = Sampling(top_p=p, seed=seed, temperature=0.8)
        assert native_pick(logits, [1], how) == pick(logits, [1], how, 0, 1)


@pytest.mark.parametrize("bad", [[0, np.nan], [np.nan] * 40, [0, np.inf], [-np.inf, -np.inf]])
@pytest.mark.parametrize("how", [GREEDY, Sampling(), PRESETS["nucleus"]])
def test_logits_that_are_not_finite_are_refused(bad, how):
    assert native_pick(bad, [], how) == -1
