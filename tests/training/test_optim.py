"""Schedules by golden values, parameter groups, and the optimizer's state there and back."""

import math

import pytest
import torch

from octavo.config import ModelConfig, OptimConfig
from octavo.model.gpt import GPT
from octavo.training.optim import (
    build_optimizer,
    dropout_at,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    warmup_steps,
)

TINY = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "d_model": 8}


def test_the_seed_schedule_has_its_golden_values():
    # 6e-4 to 6e-5 over 152,587 steps with 6 % of warmup, cosine.
    config = OptimConfig(lr=6e-4, warmup=0.06, min_lr_ratio=0.1, schedule="cosine")
    steps, warmup = 152_587, 9_155
    assert warmup_steps(config, steps) == warmup
    assert lr_at(0, config, steps) == pytest.approx(6e-4 / warmup)
    assert lr_at(warmup - 1, config, steps) == 6e-4
    assert lr_at(warmup, config, steps) == 6e-4
    middle = warmup + (steps - warmup) // 2
    assert lr_at(middle, config, steps) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-4)
    assert lr_at(steps, config, steps) == pytest.approx(6e-5)
    assert lr_at(10 * steps, config, steps) == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625]),
        ("cosine", [0.5, 1.0] + [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(4)]),
        ("trapezoid", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_begin_as_they_should(schedule, expected):
    config = OptimConfig(lr=1.0, warmup=2, schedule=schedule, min_lr_ratio=0.0, cooldown=0.4)
    assert [lr_at(step, config, 10) for step in range(6)] == pytest.approx(expected)


def test_trapezoid_falls_in_its_cooldown():
    config = OptimConfig(lr=1.0, warmup=0, schedule="trapezoid", min_lr_ratio=0.0, cooldown=0.4)
    rates = [lr_at(step, config, 10) for step in range(11)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_dropout_anneals_by_hundredths():
    values = [dropout_at(step, 0.2, 0.0, 5) for step in range(5)]
    assert values == [0.2, 0.15, 0.1, 0.05, 0.0]
    assert dropout_at(3, 0.2, None, 5) == 0.2


def test_only_matrices_decay():
    model = GPT(ModelConfig(**TINY, norm="layernorm", bias=True, position="learned"))
    decayed, plain = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    counted = sum(p.numel() for group in (decayed, plain) for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters())


def test_one_step_is_adamw_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    config = OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    optimizer = build_optimizer(model, config)
    model.weight.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    # The first bias-corrected step is lr * sign(gradient), after decay by lr * weight_decay.
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_survives_the_round_trip(name):
    def trained(steps, optimizer, model):
        for step in range(steps):
            torch.manual_seed(step)
            model(torch.randint(11, (2, 8))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    torch.manual_seed(0)
    first = GPT(ModelConfig(**TINY))
    optimizer = build_optimizer(first, OptimConfig(name=name))
    trained(3, optimizer, first)
    second = GPT(ModelConfig(**TINY))
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, OptimConfig(name=name))
    load_optimizer_tensors(other, second, optimizer_tensors(optimizer, first))
    for mine, theirs in zip(trained(2, optimizer, first), trained(2, other, second), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_loaded_state_lies_where_pytorch_puts_its_own(fused):
    # A GPU's fused step counts there; "meta" stands for a device that is not the CPU.
    model, elsewhere = (torch.nn.Linear(2, 2, device=device) for device in ("cpu", "meta"))
    trained, other = (build_optimizer(of, OptimConfig()) for of in (model, elsewhere))
    model(torch.ones(2)).sum().backward()
    trained.step()
    other.defaults["fused"] = fused
    load_optimizer_tensors(other, elsewhere, optimizer_tensors(trained, model))
    ours = {name: t.device for name, t in optimizer_tensors(other, elsewhere).items()}
    state = trained.state_dict()
    for group in state["param_groups"]:
        group["fused"] = fused
    other.load_state_dict(state)
    theirs = {name: t.device for name, t in optimizer_tensors(other, elsewhere).items()}
    assert ours == theirs
    assert ours["weight.step"].type == ("meta" if fused else "cpu")
