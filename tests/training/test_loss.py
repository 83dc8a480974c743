"""The loss in pieces is the loss: its value and every gradient, whatever is trained."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_kit import random_model

from octavo.linear import Linear
from octavo.model_config import ModelConfig
from octavo.training import memory
from octavo.training.loss import cross_entropy

TINY = dict(vocab_size=17, block_size=16, n_layer=2, n_head=2, d_model=16)
IDS = torch.randint(0, 17, (3, 16), generator=torch.Generator().manual_seed(5))


def make_model(**switches):
    return random_model(ModelConfig(**(TINY | switches)), 0)


def learned(model, targets, chunk=0):
    """The loss, and the gradient of all that is trained."""
    loss = cross_entropy(model, IDS[:, :-1], targets, chunk=chunk)
    (loss / 7).backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def some_targets():
    targets = IDS[:, 1:].clone()
    targets[0, 3:9] = -100
    targets[2] = -100
    return targets


@pytest.mark.parametrize("kind", ["exact", "a head of another kind", "frozen head", "frozen body"])
@pytest.mark.parametrize("chunk", [1, 7, 44, 45, 1000])
def test_a_loss_in_chunks_is_the_loss(chunk, kind):
    def made():
        model = make_model(tie_embeddings=False)
        if kind == "a head of another kind":
            model.lm_head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
            model.lm_head.weight.data = model.tok_emb.weight.data.clone()
        for name, p in model.named_parameters():
            in_head = name.startswith("lm_head")
            p.requires_grad = not (kind == "frozen head" and in_head) and not (
                kind == "frozen body" and not in_head
            )
        return model

    targets = some_targets()
    summed = F.cross_entropy(made()(IDS[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum")
    whole, wanted = learned(made(), targets)
    loss, gradients = learned(made(), targets, chunk)
    torch.testing.assert_close(whole, summed)
    torch.testing.assert_close(loss, whole)
    assert {n for n, g in gradients.items() if g is not None} == {
        n for n, g in wanted.items() if g is not None
    }
    for name, each in wanted.items():
        torch.testing.assert_close(gradients[name], each, atol=1e-5, rtol=1e-5)


def test_a_large_vocabulary_is_cut_by_itself(monkeypatch):
    """No tensor of all the logits is made, and nothing is kept of a piece but its gradients."""
    rows = []
    monkeypatch.setattr(memory, "LOGITS", 17 * 16)

    def spy(*given):
        rows.append(given[0].size(0))
        return product(*given)

    from octavo.training import loss as module

    product = module.product
    monkeypatch.setattr(module, "product", spy)
    cut = learned(make_model(), IDS[:, 1:])
    assert rows == [16, 16, 16, 16, 13, 13]  # forwards and the states' gradient, 45 rows in all
    monkeypatch.undo()
    whole = learned(make_model(), IDS[:, 1:])
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 8])
def test_under_autocast_and_without_gradients_it_is_the_loss_too(chunk):
    model = make_model()
    with torch.no_grad():
        exact = cross_entropy(model, IDS[:, :-1], IDS[:, 1:], chunk=chunk)
        with torch.autocast("cpu", torch.bfloat16):
            rough = cross_entropy(model, IDS[:, :-1], IDS[:, 1:], chunk=chunk)
    torch.testing.assert_close(exact, learned(make_model(), IDS[:, 1:])[0])
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)


def test_a_loss_small_enough_for_paper(monkeypatch):
    """Three tokens, three symbols: 1/2, 1/5 and 1/3 on the wanted ones, so ln(2 * 5 * 3)."""
    model = make_model(vocab_size=3, d_model=4, n_head=2, tie_embeddings=False)
    ln2, ln3 = math.log(2), math.log(3)
    states = torch.tensor([[[ln2, 0, 0, 0], [0, ln3, 0, 0], [0, 0, 0, 0.0]]])
    monkeypatch.setattr(model, "hidden", lambda idx, mask=None: states)
    model.lm_head.weight.data = torch.eye(3, 4)
    assert isinstance(model.lm_head, Linear)
    for chunk in (0, 1, 2):
        loss = cross_entropy(model, torch.zeros(1, 3), torch.tensor([[0, 0, 2]]), chunk=chunk)
        assert loss.item() == pytest.approx(math.log(30))


def test_nothing_to_predict_costs_nothing():
    for chunk in (0, 8):
        assert learned(make_model(), torch.full_like(IDS[:, 1:], -100), chunk)[0].item() == 0
