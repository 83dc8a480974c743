"""What tests of training stand on: a text, small settings, what befalls a run, what it left."""

import itertools
import json
import os
from contextlib import contextmanager

import pytest
import torch

from octavo.checkpoint import Run
from octavo.config import load_config
from octavo.errors import Preempted
from octavo.training import learner as learner_module
from octavo.training.learner import optimizer_step
from octavo.training.loop import train

FOX = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs.\n" * 40
SMALL = (
    "model.block_size=16", "model.n_layer=2", "model.n_head=2", "model.d_model=16",
    "train.max_steps=8", "train.micro_batch_size=4", "optim.warmup=2", "optim.lr=1e-2",
    "eval.every=4", "eval.windows=8", "checkpoint.every=2", "checkpoint.keep=3",
    "log.every=1", "log.sample_every=4", "log.sample_tokens=5",
)  # fmt: skip


def config_of(source, *settings):
    """The configuration of a run on ``source``; of a setting given twice the last counts."""
    return load_config(None, [f"data.source={json.dumps(str(source))}", *settings])


def trained(text, out, *settings):
    """A run on this text, which is written beside it."""
    source = out.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    return train(config_of(source, *settings), out, quiet=True).run


# ---- what befalls a run


def before_steps(monkeypatch, act):
    """``act(n)`` happens as the ``n``-th optimizer step begins."""
    count = itertools.count(1)

    def step(*args, **more):
        act(next(count))
        return optimizer_step(*args, **more)

    monkeypatch.setattr("octavo.training.loop.optimizer_step", step)


class Killed(BaseException):
    """As good as kill -9: nothing may catch it."""


@contextmanager
def cut_at(step, number=None):
    """In the block the ``step``-th optimizer step is the last: killed, or sent the signal."""

    def cut(n):
        if n == step and number is None:
            raise Killed
        if n == step:
            os.kill(os.getpid(), number)

    ends = Killed if number is None else Preempted
    with pytest.MonkeyPatch.context() as patch:
        before_steps(patch, cut)
        with pytest.raises(ends) as ended:
            yield ended


def poison_loss(monkeypatch, at, factor=10.0):
    """The loss of these steps is ``factor`` times what it would be."""
    plain = learner_module.build_learner

    def build(*args):
        learner = plain(*args)
        loss = learner.loss
        learner.loss = lambda *args: (
            loss(*args) * (factor if learner.progress.step + 1 in at else 1.0)
        )
        return learner

    monkeypatch.setattr("octavo.training.loop.build_learner", build)


def flip(path, place, bit=1):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


# ---- what it left


def step_and_gradients(learner):
    """One step and the gradients that the optimizer saw in it."""
    seen = []
    hook = learner.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in learner.model.parameters())
    )
    step = optimizer_step(learner)
    hook.remove()
    return step, seen


def events(run, *kinds):
    """What a run has logged, or what of these kinds."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if not kinds or event["event"] in kinds]


def saved(run):
    """A run's newest checkpoint: its step, its weights and the optimizer's tensors."""
    opened = Run.open(run)
    newest = opened.load(opened.latest)
    return newest.step, {**newest.model_tensors(), **newest.optimizer_tensors()}


def assert_same_weights(one, other):
    """Two runs ended with the same, bit for bit."""
    (step, tensors), (other_step, others) = saved(one), saved(other)
    assert step == other_step
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name
