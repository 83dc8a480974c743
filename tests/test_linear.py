"""oneDNN's products are PyTorch's own, forwards and backwards, wherever they are used."""

import pytest
import torch
from torch import nn

from octavo import linear
from octavo.linear import Linear, product

CAN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=["no oneDNN", *(["Zen 4", "Zen 5"] if CAN else [])])
def pays(request, monkeypatch):
    """Whether oneDNN is used."""
    monkeypatch.setattr(linear, "onednn_pays", lambda: request.param != "no oneDNN")
    monkeypatch.setattr(linear, "amd_family", lambda: 26 if request.param == "Zen 5" else 25)
    monkeypatch.setattr(linear, "LARGE", 0)
    return request.param != "no oneDNN"


def twins(bias, width=24, out=40):
    torch.manual_seed(0)
    ours, theirs = Linear(width, out, bias=bias), nn.Linear(width, out, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (3, 7, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["", "input", "weight", "bias"])
def test_it_is_pytorchs_linear_layer(pays, shape, bias, frozen):
    results = []
    for layer in twins(bias):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        x.requires_grad = frozen != "input"
        for name, parameter in layer.named_parameters():
            parameter.requires_grad = frozen != name
        y = layer(x)
        (y * y).sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad if bias else None])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_product_of_views_is_the_product(pays):
    x, weight = torch.randn(9, 12).t(), torch.randn(9, 20).t()
    torch.testing.assert_close(product(x, weight), x @ weight.t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["no gradients", "autocast", "double", "compiling"])
def test_elsewhere_it_is_pytorchs_to_the_bit(pays, monkeypatch, how):
    """Where it does not pay, or could not be traced."""
    ours, theirs = twins(bias=True)
    x = torch.randn(5, 24)
    if how == "double":
        ours, theirs, x = ours.double(), theirs.double(), x.double()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: how == "compiling")
    with (
        torch.set_grad_enabled(how != "no gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
    ):
        assert torch.equal(ours(x), theirs(x))


def test_a_zen_4_takes_onednn_for_large_products_alone(monkeypatch):
    monkeypatch.setattr(linear, "onednn_pays", lambda: True)
    small, large, weight = torch.empty(15, 1024), torch.empty(1024, 1024), torch.empty(64, 1024)
    for family, expected in ((25, [False, True]), (26, [True, True])):
        monkeypatch.setattr(linear, "amd_family", lambda family=family: family)
        assert [linear.onednn_takes(x, weight) for x in (small, large)] == expected
    assert not linear.onednn_takes(large.double(), weight.double())
