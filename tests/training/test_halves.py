"""Two halves of a step, side by side, are the step."""

import multiprocessing
import signal
import threading

import pytest
import torch
from training_kit import (
    SMALL,
    assert_same_weights,
    config_of,
    cut_at,
    step_and_gradients,
    trained,
)

from octavo.training import learner as learner_module
from octavo.training.display import Display
from octavo.training.halves import FEWEST, goes_in_halves, side_by_side
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.loop import train
from octavo.training.task import prepare

CPU = torch.device("cpu")
LARGE = (*SMALL, "train.micro_batch_size=16")  # as many tokens as are halved


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def learner_of(text, tmp_path, *settings):
    task = prepare(config_of(text, *LARGE, *settings), "cpu", tmp_path / "none")
    return build_learner(task, CPU, Display(quiet=True))


def halved(text, tmp_path, *settings):
    learner = learner_of(text, tmp_path, *settings)
    assert learner.halves
    return learner


def whole(text, tmp_path, *settings):
    learner = learner_of(text, tmp_path, *settings)
    learner.halves = False
    return learner


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("train.grad_accum=3", "model.tie_embeddings=false", "model.bias=true"),
        ("train.grad_checkpoint=true", "model.qk_norm=true", "model.n_kv_head=1"),
        ("data.separator=true", "data.mask_documents=true", "train.loss_chunk=24"),
        ("data.sampling=random", "model.position=learned", "model.mlp=gelu"),
    ],
)
def test_halves_leave_the_gradients_of_the_whole(text, tmp_path, settings):
    (step, gradients), (expected, whole_ones) = map(
        step_and_gradients, (made(text, tmp_path, *settings) for made in (halved, whole))
    )
    assert step.loss == pytest.approx(expected.loss, rel=1e-6)
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for a, b in zip(gradients, whole_ones, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_of_unequal_halves_every_token_counts_once(text, tmp_path):
    """Records that end early leave more to learn in one half than in the other."""
    losses = []
    for made in (halved, whole):
        learner = made(text, tmp_path)
        plain = learner.task.batches.rows

        def rows(first, count, plain=plain):
            x, y = plain(first, count)
            y[: count // 2, 2:] = -100
            return x, y

        object.__setattr__(learner.task.batches, "rows", rows)
        losses.append([optimizer_step(learner).loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_muon_takes_half_of_the_matrices_beside_the_other_half(text, tmp_path):
    settings = ("optim.name=muon", "model.n_layer=3", "train.precision=fp32")
    ours, expected = (made(text, tmp_path, *settings) for made in (halved, whole))
    for _ in range(3):
        assert optimizer_step(ours).loss == pytest.approx(optimizer_step(expected).loss, rel=1e-4)
    assert ours.optimizer.halves
    assert not expected.optimizer.halves


def test_in_two_bytes_halves_are_close_to_the_whole(text, tmp_path):
    losses = [
        [optimizer_step(learner).loss for _ in range(4)]
        for learner in (made(text, tmp_path, "train.precision=bf16") for made in (halved, whole))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_frozen_weights_have_no_gradient_in_either_half(text, tmp_path):
    base = trained(text.read_text(), tmp_path / "base", *SMALL)
    losses = []
    for made in (halved, whole):
        learner = made(text, tmp_path, f"finetune.base={base}", "lora.rank=2")
        losses.append([optimizer_step(learner).loss for _ in range(3)])
        assert learner.model.tok_emb.weight.grad is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resumed_run_in_halves_is_the_uninterrupted_one_bitwise(text, tmp_path):
    settings = config_of(text, *LARGE, "optim.name=muon", "train.grad_accum=2")
    train(settings, tmp_path / "whole", quiet=True)
    with cut_at(5, signal.SIGINT):
        train(settings, tmp_path / "cut", quiet=True)
    train(settings, tmp_path / "cut", resume=True, quiet=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_each_half_has_half_of_the_threads(text, tmp_path):
    torch.set_num_threads(4)
    learner = halved(text, tmp_path)
    seen, loss = {}, learner.loss

    def watched(model, x, *rest):
        seen[threading.get_ident()] = (len(x), torch.get_num_threads())
        return loss(model, x, *rest)

    learner.loss = watched
    optimizer_step(learner)
    assert list(seen.values()) == [(8, 2), (8, 2)]
    assert torch.get_num_threads() == 4


def test_an_odd_thread_leaves_the_step_whole(text, tmp_path):
    torch.set_num_threads(3)
    learner = halved(text, tmp_path)
    seen, loss = [], learner.loss

    def watched(model, x, *rest):
        seen.append((len(x), torch.get_num_threads()))
        return loss(model, x, *rest)

    learner.loss = watched
    optimizer_step(learner)
    assert seen == [(16, 3)]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", []),
        ("cpu", ["model.dropout=0.1"]),
        ("cpu", ["lora.rank=2", "lora.dropout=0.1", "finetune.base=x"]),
        ("cpu", ["train.compile=true"]),
        ("cpu", ["train.micro_batch_size=17"]),
        ("cpu", [f"train.micro_batch_size={FEWEST // 16 - 2}"]),
    ],
)
def test_what_is_not_halved(text, device, words):
    assert goes_in_halves(config_of(text, *LARGE), "cpu", 16)
    assert not goes_in_halves(config_of(text, *LARGE, *words), device, 16)


@pytest.mark.parametrize("where", ["here", "beside"])
def test_an_error_in_either_half_is_raised_when_both_have_ended(where):
    ended, other_may_end = [], threading.Event()

    def fails():
        other_may_end.set()
        raise MemoryError(where)

    def lasts():
        other_may_end.wait(10)
        ended.append(True)

    halves = (fails, lasts) if where == "here" else (lasts, fails)
    with pytest.raises(MemoryError, match=where):
        side_by_side(*halves)
    assert ended == [True]


def test_a_half_that_is_not_finite_keeps_the_step_from_being_taken(text, tmp_path):
    learner = halved(text, tmp_path)
    loss, calls = learner.loss, []

    def poisoned(*given):
        calls.append(threading.current_thread() is threading.main_thread())
        return loss(*given) * (1.0 if calls[-1] else float("nan"))

    learner.loss = poisoned
    before = [p.clone() for p in learner.model.parameters()]
    assert not optimizer_step(learner).taken
    assert sorted(calls) == [False, True]
    for then, now in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(then, now)


def test_a_fork_has_a_second_thread_of_its_own():
    """Its parent's does not exist there; waiting for it would last forever."""
    assert side_by_side(lambda: 1, lambda: 2) == (1, 2)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(side_by_side(lambda: 3, lambda: 4)))
    child.start()
    assert answers.get(timeout=30) == (3, 4)
    child.join()


def test_learner_module_halves_what_it_is_asked_to(text, tmp_path, monkeypatch):
    """Without this the tests above would compare the whole with itself."""
    seen = []
    plain = learner_module.side_by_side
    monkeypatch.setattr(
        learner_module, "side_by_side", lambda *both: seen.append(1) or plain(*both)
    )
    optimizer_step(halved(text, tmp_path, "train.grad_accum=2"))
    optimizer_step(whole(text, tmp_path))
    assert len(seen) == 2
