"""Training beside its peers: what must agree first, how sure a ratio is, what a record becomes."""

import argparse
import copy
import functools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import first_step
import peers
import record
import train
import train_peers

from octavo.model.counts import flops_per_token

SHAPE = train_peers.Shape(2, 2, 16, 8, rows=2, steps=2)


class FusedGPT:
    """nanoGPT's parameters under its names, q, k and v as one; our model computes with them."""

    def __init__(self, ours: nn.Module, wrong: float = 0.0) -> None:
        named = peers.renamed(dict(ours.named_parameters()), peers.NANOGPT)
        self.tensors = {n: nn.Parameter(t.detach().clone()) for n, t in named.items()}
        self.ours = copy.deepcopy(ours)
        if wrong:
            worst = self.tensors["transformer.h.1.ln_2.weight"]
            worst.register_hook(lambda gradient: gradient * (1 + wrong))

    def named_parameters(self) -> Any:
        return self.tensors.items()

    def parameters(self) -> list[Tensor]:
        return list(self.tensors.values())

    def zero_grad(self, set_to_none: bool) -> None:
        for tensor in self.parameters():
            tensor.grad = None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        ours = {theirs: name for name, theirs in peers.NANOGPT.items()}
        weights = {}
        for name, tensor in self.tensors.items():
            _, layer, module = re.fullmatch(
                r"(transformer\.h\.(\d+)\.)?(.+)\.weight", name
            ).groups()
            within = f"blocks.{layer}." if layer else ""
            if ours[module] == "attn.qkv":
                for part, of in zip("qkv", tensor.chunk(3), strict=True):
                    weights[f"{within}attn.{part}_proj.weight"] = of
            else:
                weights[f"{within}{ours[module]}.weight"] = tensor
        logits = torch.func.functional_call(self.ours, weights, (x,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def fused(wrong: float, ours: nn.Module) -> train_peers.Rival:
    model = FusedGPT(ours, wrong)
    return train_peers.Rival(model, train_peers.plain_adamw(model), model.loss, peers.NANOGPT)


def answers(wrong: float) -> dict[str, Any]:
    rival = train_peers.rival_work(SHAPE, False, "json", functools.partial(fused, wrong))
    return {"octavo": train_peers.octavo_work(SHAPE, False).answer, "nanoGPT": rival.answer}


def test_the_same_model_in_other_hands_agrees_and_is_timed():
    """A step of ours is the step of a plain script: loss for loss, gradient for gradient."""
    seen: dict[str, Any] = {}
    found = answers(0.0)
    train.agree(seen, "cpu", found)
    assert seen == found
    assert seen["nanoGPT"]["gap"] < 1e-5
    assert seen["octavo"]["losses"] == pytest.approx(seen["nanoGPT"]["losses"], rel=1e-6)
    assert train_peers.octavo_work(SHAPE, True).round() > 0


def test_a_peer_whose_gradient_differs_in_one_parameter_is_not_timed():
    """A thousandth in one small vector: the losses of ten steps would hardly show it."""
    with pytest.raises(SystemExit, match=r"a gradient of nanoGPT is 0\.001"):
        train.agree({}, "cpu", answers(0.001))


def test_a_peer_whose_loss_differs_is_not_timed():
    ours = {"losses": [2.0, 1.5], "gap": 0.0}
    with pytest.raises(SystemExit, match=r"loss 1\.6 of nanoGPT at step 1"):
        train.agree({}, "cpu", {"octavo": ours, "nanoGPT": ours | {"losses": [2.0, 1.6]}})


def test_shares_of_the_matrix_product_count_three_forward_passes():
    seen = {
        who: {"losses": [1.0], "memory": most} for who, most in (("octavo", 9), ("nanoGPT", 10))
    }
    figures = {"octavo": [3e6, 3e6], "nanoGPT": [2e6, 2e6], train.WITNESS: [100.0, 200.0]}
    rows = train.derived(SHAPE, seen, [("octavo", "nanoGPT")], figures)
    of = {row["what"]: (row["low"], row["high"]) for row in rows}
    cost = 3 * flops_per_token(train_peers.model_config(SHAPE, rotary=False)) / 1e9
    assert of["octavo, share of the matrix product"] == (3e6 * cost / 200, 3e6 * cost / 100)
    assert of["fewest milliseconds of a step"] == pytest.approx((80 * cost, 160 * cost))
    assert of["octavo / nanoGPT, memory"] == (0.9, 0.9)


def test_tables_are_made_of_their_shapes_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """10,000 steps of 32 rows of 128 characters at 4,096 tokens a second are 10,000 seconds."""

    def measured(name: str, on: str) -> dict[str, Any]:
        rates = {"value": 4096.0, "low": 2048.0, "high": 8192.0}
        names = (train.ROTARY, train.WRITING)
        results = [{"what": who, "unit": "tokens/s"} | rates for who in names]
        results += [{"what": f"{who}, memory", "unit": "MB"} | rates for who in names]
        rivals = ("95 % interval", "memory")
        results += [{"what": f"octavo / nanoGPT, {of}", "unit": "×"} | rates for of in rivals]
        assert on == record.processor()
        return {"versions": {}, "rounds": 10, "threads": 2, "noisy": False, "results": results}

    monkeypatch.setattr(train, "newest", measured)
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    for make in (train.presets, train.ratios):
        make(argparse.Namespace(record=True))
    written = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.iterdir())]
    assert [of["name"] for of in written] == [
        "presets-sizes", "presets-times", "train-ratios",
    ]  # fmt: skip
    sizes, times, ratios = ({row["what"]: row for row in of["results"]} for of in written)
    assert sizes["tiny: parameters"]["value"] == 861_440
    assert list(ratios)[:3] == ["char: tokens/s", "char: memory", "seed-char: tokens/s"]
    assert ratios["124m: memory"]["low"] == 2048.0
    assert sizes["large: memory of training, 1 row"]["value"] == 4096.0
    hours = times["tiny: 10,000 steps of 32 rows"]
    assert [3600 * hours[key] for key in ("low", "value", "high")] == [5000, 10_000, 20_000]


def test_a_command_is_timed_until_its_first_step_and_then_ended(tmp_path: Path):
    written = tmp_path / "log"
    program = f"import time; time.sleep(0.3); open({str(written)!r}, 'w').write('a step'); "
    command = first_step.Command(
        [sys.executable, "-c", program + "time.sleep(60)"], tmp_path, written, "step"
    )
    started = time.monotonic()
    assert 0.3 < first_step.seconds(command, tmp_path, tmp_path) < 20
    assert time.monotonic() - started < 20


def test_a_command_that_ends_before_its_first_step_is_refused(tmp_path: Path):
    words = [sys.executable, "-c", "print('no such setting')"]
    command = first_step.Command(words, tmp_path, tmp_path / "log", "step")
    with pytest.raises(SystemExit, match="no such setting"):
        first_step.seconds(command, tmp_path, tmp_path)
