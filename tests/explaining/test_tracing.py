"""Every microsecond belongs to one module, and backward to the module that made the node."""

import json

import pytest
import torch
from torch import nn

from octavo.errors import ResourceError
from octavo.explaining.tracing import named, trace
from octavo.linear import onednn_takes
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.training.loss import cross_entropy

CONFIG = ModelConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, d_model=32)
PRODUCT = (
    "mkldnn::_linear_pointwise"
    if onednn_takes(torch.empty(128, 32), torch.empty(32, 32))
    else "aten::mm"
)
IDS = torch.arange(4 * 32).view(4, 32) % 300


def seconds(times, module, phase):
    return times.modules.get((module, phase), 0)


def test_backward_belongs_to_the_module_whose_forward_it_is():
    """Only two of these have anything to do backward: what lies under a detached tensor has not."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.first, self.second = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.second(self.first(self.frozen(x).detach()))

    model, x = Three(), torch.randn(256, 64)
    times = trace(lambda: model(x).sum().backward(), model)
    for name in ("frozen", "first", "second"):
        assert seconds(times, name, "forward") > 0
    assert seconds(times, "frozen", "backward") == 0
    assert seconds(times, "first", "backward") > 0
    assert seconds(times, "second", "backward") > 0


def test_every_part_of_a_step_has_its_time():
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = named("loss", cross_entropy)

    def step():
        loss(model, IDS, IDS).backward()
        optimizer.step()

    step()
    times = trace(step, model)
    blocks = ["blocks.0", "blocks.1.attn", "blocks.0.attn.q_proj", "blocks.1.mlp.down_proj"]
    for module in ["tok_emb", "norm_f", "lm_head", "loss", *blocks]:
        assert seconds(times, module, "forward") > 0, module
        assert seconds(times, module, "backward") > 0, module
    assert seconds(times, "optimizer", "forward") > 0
    assert seconds(times, "optimizer", "backward") == 0
    assert times.operations[PRODUCT] > 0
    assert 0 < sum(times.operations.values()) < sum(times.modules.values())


def test_what_is_computed_again_in_the_backward_pass_is_backward():
    model = GPT(CONFIG).train()
    model.grad_checkpoint = True
    plain = trace(lambda: cross_entropy(model, IDS, IDS), model)
    both = trace(lambda: cross_entropy(model, IDS, IDS).backward(), model)
    name = "blocks.0.mlp.up_proj"
    assert seconds(plain, name, "backward") == 0
    assert seconds(both, name, "backward") > 0
    assert (
        not {module for module, _ in both.modules}
        - {"rest"}
        - {n for n, _ in model.named_modules()}
    )


def test_nothing_is_left_on_the_model():
    model = GPT(CONFIG)
    with pytest.raises(IndexError):
        trace(lambda: model(torch.tensor([[1_000]])), model)
    trace(lambda: model(IDS), model)
    for module in model.modules():
        assert "forward" not in vars(module)


def test_the_trace_is_one_that_chrome_opens(tmp_path):
    model = GPT(CONFIG)
    trace(lambda: model(IDS), model, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"octavo:blocks.0.attn", "octavo:lm_head", PRODUCT} <= names


def test_a_trace_that_cannot_be_written_is_an_error_for_people(tmp_path):
    model = GPT(CONFIG)
    with pytest.raises(ResourceError, match="cannot write"):
        trace(lambda: model(IDS), model, tmp_path / "absent" / "trace.json")
