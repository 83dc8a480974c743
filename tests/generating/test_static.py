"""The step of fixed shapes writes what the engine writes without it, recorded or not."""

import sys
import types

import pytest
import torch
from engine_kit import make_model

from octavo.errors import ConfigError
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import PRESETS, Sampling
from octavo.generating.static import flash_attention
from octavo.generating.writing import Slot, write
from octavo.model.attention import sdpa

PROMPTS = [[3], [1, 2, 3, 4, 5], [5, 4] * 12, list(range(9))]


def written(engine, sampling=PRESETS["greedy"], count=40):
    rows = [[] for _ in PROMPTS]
    for piece in write(engine, None, PROMPTS, sampling, count):
        rows[piece.row].append(piece.id)
    return rows


class Recorder:
    """Stands for a CUDA graph: one computation, replayed over the same tensors."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, step):
        self.recorded += 1
        out = step().clone()

        def replay():
            self.replayed += 1
            out.copy_(step())
            return out

        return replay


@pytest.mark.parametrize("position", ["learned", "rope", "both", "none"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_replayed_step_writes_the_same(position, slots):
    """Slots at rest take part: what they read must not be seen when their own token comes."""
    model = make_model(position=position, n_kv_head=1)
    sampled = Sampling(temperature=0.9, repetition_penalty=1.1, seed=4)
    for sampling in (PRESETS["greedy"], sampled):
        expected = written(TorchEngine(model, slots), sampling)
        recorder = Recorder()
        assert written(TorchEngine(model, slots, record=recorder), sampling) == expected
        assert recorder.recorded == 1
        assert recorder.replayed > 40


def test_a_row_whose_window_is_full_may_rest_while_another_goes_on():
    model, alone = make_model(), []
    for record in (None, Recorder()):
        engine = TorchEngine(model, 2, record=record)
        rows = [Slot(index, [1] * 15, 0, PRESETS["greedy"], 15) for index in range(2)]
        for stepped in (rows, rows, rows[1:], rows[1:], rows):
            for slot, ids in zip(stepped, engine.step(stepped), strict=True):
                slot.ids.extend(ids)
        alone.append([slot.ids for slot in rows])
    assert alone[0] == alone[1]


def test_a_step_can_be_compiled_whole():
    """No graph break: nothing in the step looks at a number on the device."""
    model = make_model()

    def compiled(step):
        return torch.compile(step, backend="eager", fullgraph=True)

    assert written(TorchEngine(model, 4, record=compiled)) == written(TorchEngine(model, 4))


def test_a_recorder_that_fails_is_left_alone_and_that_is_said_once(capsys):
    def broken(step):
        raise RuntimeError("no graphs on this driver\nand a long trace")

    model = make_model()
    engine = TorchEngine(model, 4, record=broken)
    assert written(engine) == written(engine) == written(TorchEngine(model, 4))
    said = "warning: the step cannot be recorded (no graphs on this driver); going on without it\n"
    assert capsys.readouterr().err == said


def test_an_unknown_id_is_named_before_it_is_read():
    engine = TorchEngine(make_model(), record=Recorder())
    with pytest.raises(ConfigError, match="no token 99"):
        engine.step([Slot(0, [99], 0, PRESETS["greedy"], 1)])


def qkv(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, generator=generator).to(dtype) for _ in range(3)]


def test_flash_attention_is_used_where_it_fits_and_left_alone_once_it_fails(monkeypatch, capsys):
    """fla: a kernel may import and still fail on the first call, on a card it was not built for."""
    calls = []

    def kernel(q, k, v, dropout_p, causal):
        calls.append(q.shape)
        if len(calls) > 2:
            raise RuntimeError("only supports Ampere GPUs or newer")
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return sdpa(q, k, v, None, dropout_p).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=kernel))
    attend, half = flash_attention(), qkv(torch.bfloat16)
    expected = sdpa(*half, None, 0.0)
    assert torch.equal(attend(*half, None, 0.0), expected)
    assert calls == [(2, 5, 3, 4)]
    attend(*qkv(torch.float32), None, 0.0)  # it takes half precision only
    attend(*half, torch.ones(5, 5, dtype=torch.bool), 0.0)  # and no mask
    assert len(calls) == 1
    for _ in range(3):
        assert torch.equal(attend(*half, None, 0.0), expected)
    assert len(calls) == 3  # right, failed, and not asked again
    assert capsys.readouterr().err.count("flash-attn does not work here (only supports Amp") == 1


def test_without_the_package_it_is_pytorchs(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert flash_attention() is sdpa
