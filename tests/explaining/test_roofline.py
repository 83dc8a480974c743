"""What a part must compute and move, and what its time says about it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from octavo import linear
from octavo.explaining.roofline import Machine, Work, measure_machine, products, training_work
from octavo.model.counts import count_parameters, flops_per_token
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.training.loss import cross_entropy

SHAPE = dict(vocab_size=61, block_size=48, n_layer=2, n_head=4, d_model=32)
SWITCHES = [
    dict(mlp="gelu", norm="layernorm"),
    dict(n_kv_head=1, qk_norm=True),
    dict(n_kv_head=2, bias=True, mlp="geglu", tie_embeddings=False),
    dict(norm_position="sandwich", position="both", n_layer=3, head_dim=12),
]


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_parts_operations_are_pytorchs_own(monkeypatch, switches):
    config = ModelConfig(**(SHAPE | switches))
    model, ids = GPT(config), torch.zeros(2, 48, dtype=torch.long)
    # The counter knows matrix products, but not the CPU's fused attention.
    monkeypatch.setattr(linear, "onednn_pays", lambda: False)  # whose products it does not count
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cross_entropy(model, ids, ids).backward()
    work = training_work(config, (2, 48), passes=1, trained=count_parameters(config).total)
    total = sum(part.flops for part in work.values())
    assert total == 3 * 2 * 48 * flops_per_token(config)
    assert total == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_bytes_of_a_matrix_are_its_own_and_what_goes_in_and_out():
    config = ModelConfig(**SHAPE, mlp="gelu")
    one, many = (products(config, tokens, 1, 48)["head"].bytes for tokens in (1, 101))
    assert one == 4 * (61 * 32 + 61 + 32)
    assert many - one == 4 * 100 * (61 + 32)
    again = products(config, 101, 3, 48)["head"]
    assert again.bytes == many + 2 * 4 * 61 * 32, "each pass reads the weights again"
    assert again.flops == 2 * 101 * 61 * 32
    halved = products(config, 101, 3, 48, number=2)["head"]
    assert halved.bytes == again.bytes / 2


def test_a_token_that_looks_back_reads_every_key():
    config = ModelConfig(**SHAPE, n_kv_head=2)
    shared, alone = (products(config, 5, 5, 40, keys)["attention"] for keys in (1, 40))
    kv = 2 * config.head_dim
    assert alone.bytes - shared.bytes == 4 * 5 * 2 * 2 * kv * 39
    assert alone.flops == shared.flops


def test_frozen_weights_need_two_products_and_little_optimizer():
    config = ModelConfig(**SHAPE)
    whole = training_work(config, (2, 48), 1, trained=10_000)
    frozen = training_work(config, (2, 48), 1, trained=100, times=2)
    assert frozen["mlp"].flops * 3 == whole["mlp"].flops * 2
    assert frozen["optimizer"].bytes * 100 == whole["optimizer"].bytes == 280_000


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(flops=1000, bytes=1), 11, "compute"),
        (Work(flops=1000, bytes=1000), 110, "memory"),
        (Work(flops=1000, bytes=1), 100, "overhead"),
        (Work(), 1, "overhead"),
        (Work(flops=0, bytes=1000), 90, "memory"),  # faster than its roof: it was in a cache
    ],
)
def test_what_holds_a_part_up(work, seconds, bound):
    machine = Machine("cpu", flops=100, bandwidth=10)
    assert machine.ridge == 10
    assert machine.bound(work, seconds) == bound


def test_the_machine_is_measured_in_about_a_second(monkeypatch):
    monkeypatch.setattr("octavo.explaining.roofline.MEASURE_SECONDS", 0.01)
    monkeypatch.setitem(measure_machine.__globals__["SIZES"], "cpu", (64, 1 << 12))
    machine = measure_machine(torch.device("cpu"))
    assert machine.device == "cpu"
    assert machine.flops > 1e6
    assert machine.bandwidth > 1e6
