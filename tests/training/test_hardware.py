"""MFU is a share of a peak that is known, or is not shown at all."""

import pytest
import torch

from octavo.config import load_config
from octavo.model.counts import flops_per_token
from octavo.model.gpt import GPT
from octavo.training import hardware
from octavo.training.hardware import PEAKS, flops_a_token, peak_flops, peak_memory
from octavo.training.learner import choose_precision
from octavo.training.muon import multiplies_bf16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", (312, 19.5)),
        ("NVIDIA H100 PCIe", (756, 51)),
        ("NVIDIA H100 80GB HBM3", (989, 67)),
        ("NVIDIA L4", (121, 30.3)),
        ("NVIDIA L40S", (362, 91.6)),
        ("Tesla T4", (65, 8.1)),
        ("NVIDIA GeForce RTX 4090", (165, 82.6)),
        ("Something of next year", None),
    ],
)
def test_gpus_are_known_by_name_or_not_at_all(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        peak = peak_flops(CUDA, dtype)
        assert peak == (pytest.approx(tflops[i] * 1e12) if tflops else None)
    assert peak_flops(torch.device("mps"), torch.float32) is None


def test_no_name_hides_a_longer_one_behind_it():
    names = list(PEAKS)
    hidden = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]
    assert hidden == []


def test_a_cpu_is_measured_once_and_no_product_beats_its_peak_by_much():
    peak = peak_flops(CPU, torch.float32)
    assert peak is not None
    assert 1e9 < peak < 1e14
    assert hardware._measured.cache_info().currsize >= 1
    assert peak_flops(CPU, torch.float32) == peak


def test_a_token_costs_three_forward_passes_if_all_is_trained():
    config = load_config(None, ["model.vocab_size=50", "model.n_layer=2", "model.d_model=48"])
    model = GPT(config.model)
    assert flops_a_token(model, config, 16) == 3 * flops_per_token(config.model, 16)
    model.blocks[0].requires_grad_(False)
    assert flops_a_token(model, config, 16) is None, "how much of it is done is not known"


def test_memory_is_the_most_that_was_held_and_does_not_fall():
    held = torch.ones(50_000_000)
    most = peak_memory(CPU)
    assert 200e6 < most < 1e12
    del held
    assert peak_memory(CPU) >= most


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_that_a_gpu_only_imitates_is_not_chosen(monkeypatch, has_bf16):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bf16 or including_emulation,
    )
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert choose_precision("auto", CUDA) == expected
    assert multiplies_bf16("cuda") == has_bf16
    assert choose_precision("auto", CPU) == torch.float32
