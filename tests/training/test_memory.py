"""The memory that is predicted, beside what autograd keeps and what a process grows by."""

import json
import multiprocessing
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from octavo.config import load_config
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.studies.plan import count_plan
from octavo.studies.plan_probe import STEPS, Growth
from octavo.training.display import Display
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.loss import cross_entropy
from octavo.training.memory import (
    Conditions,
    arrangements,
    kept_by_block,
    kept_outside_blocks,
    largest_fitting,
    training_memory,
    with_micro_batch,
)
from octavo.training.task import prepare

CPU = torch.device("cpu")
SHAPE = dict(vocab_size=96, block_size=64, n_layer=3, n_head=4, d_model=64)
SWITCHES = [
    dict(),
    dict(mlp="gelu", norm="layernorm", bias=True, position="learned"),
    dict(mlp="relu", n_kv_head=1),
    dict(mlp="relu2", n_kv_head=2, head_dim=24),
    dict(mlp="geglu", qk_norm=True),
    dict(norm_position="post"),
    dict(norm_position="sandwich", mlp="silu"),
    dict(norm_position="sandwich", norm="layernorm"),
    dict(dropout=0.1),
    dict(dropout=0.1, mlp="gelu_tanh", norm="layernorm", n_kv_head=2),
    dict(tie_embeddings=False, d_ff=320),
]


def kept_bytes(model, ids, half=False):
    """Bytes of all that autograd keeps of a forward pass, the model's own numbers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), ids]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        loss = cross_entropy(model, ids, ids)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def predicted_bytes(config, tokens, half=False):
    conditions = Conditions(half=half)
    a_token = config.n_layer * kept_by_block(config, config.block_size, conditions)
    a_token += kept_outside_blocks(config, conditions) + 4 * config.vocab_size
    return tokens * a_token


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_activations_are_what_autograd_keeps(switches):
    config = ModelConfig(**(SHAPE | switches))
    ids = torch.randint(0, 96, (8, 64))
    found = kept_bytes(GPT(config).train(), ids)
    assert predicted_bytes(config, ids.numel()) == pytest.approx(found, rel=0.03)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm on heads in bf16 is not fused
@pytest.mark.parametrize("switches", SWITCHES[:6], ids=str)
def test_activations_in_two_bytes(switches):
    config = ModelConfig(**(SHAPE | switches))
    ids = torch.randint(0, 96, (32, 64))
    found = kept_bytes(GPT(config).train(), ids, half=True)
    copies = 2 * sum(p.numel() for p in GPT(config).parameters() if p.dim() == 2)
    assert predicted_bytes(config, ids.numel(), half=True) + copies == pytest.approx(
        found, rel=0.03
    )


def run_config(text, *settings):
    return load_config(None, [f"data.source={json.dumps(str(text))}", *settings])


def memory(*settings, **conditions):
    config = load_config(None, ["model.vocab_size=1000", *settings])
    return training_memory(config, Conditions(**conditions))


def test_halves_keep_the_gradients_of_earlier_passes_apart():
    few = ("train.micro_batch_size=2", "model.block_size=128", "model.d_model=768")
    assert memory(*few, even=True) == memory(*few)
    few += ("train.grad_accum=2",)
    whole, halves = memory(*few), memory(*few, even=True)
    assert halves.step > whole.step
    assert halves.step == pytest.approx(whole.step, rel=0.25)
    few += ("model.dropout=0.1",)
    assert memory(*few, even=True) == memory(*few)


def test_each_saving_saves():
    whole = memory("train.micro_batch_size=16")
    assert memory("train.micro_batch_size=8", "train.grad_accum=2").step < whole.step
    assert memory("train.micro_batch_size=16", "train.grad_checkpoint=true").step < whole.step / 2
    chunked = memory("train.micro_batch_size=16", "train.loss_chunk=128")
    assert chunked.logits == whole.logits / 48
    large = ["model.vocab_size=50000", "train.micro_batch_size=16"]
    assert memory(*large).logits < memory(*large, "train.loss_chunk=1024").logits
    assert memory("train.micro_batch_size=16", half=True, device="cuda").step < 0.7 * whole.step
    assert memory("train.micro_batch_size=16", "optim.name=muon").optimizer < whole.optimizer
    few = memory("train.micro_batch_size=16", trainable=10_000)
    assert few.gradients == 40_000
    assert few.optimizer == 80_000


def test_arrangements_make_the_same_step():
    config = load_config(None, ["train.micro_batch_size=6", "train.grad_accum=2"])
    found = [(c.train.micro_batch_size, c.train.grad_accum) for c in arrangements(config)]
    assert found == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]


def test_the_largest_micro_batch_that_fits():
    """What fits is found by the formula itself: one row more than fits does not."""
    config = load_config(None, ["model.vocab_size=500", "train.micro_batch_size=64"])
    half = training_memory(with_micro_batch(config, 16), Conditions()).peak
    fitting = largest_fitting(config, Conditions(), half)
    assert fitting is not None
    assert (fitting.train.micro_batch_size, fitting.train.grad_accum) == (16, 4)
    assert largest_fitting(config, Conditions(), 1e6) is None


SMALL = ("model.n_layer=2", "model.n_head=4", "model.d_model=128", "model.block_size=128")
MEASURED = {
    "wide, few tokens": (
        "model.n_layer=2", "model.n_head=8", "model.d_model=512", "model.block_size=64",
        "train.micro_batch_size=2",
    ),
    "so many that the logits are cut": (
        *SMALL, "model.vocab_size=32768", "train.micro_batch_size=8",
    ),
    "many tokens in the vocabulary": (
        *SMALL, "model.vocab_size=8192", "train.micro_batch_size=8",
    ),
    "characters": (*SMALL, "model.n_layer=4", "train.micro_batch_size=16"),
    "logits in chunks": (
        *SMALL, "model.vocab_size=8192", "train.micro_batch_size=8", "train.loss_chunk=128",
    ),
    "dropout": (
        *SMALL, "model.block_size=256", "model.dropout=0.1", "train.micro_batch_size=4",
    ),
    "GPT-2, accumulated": (
        *SMALL, "model.n_layer=3", "model.d_model=256", "model.position=learned",
        "model.norm=layernorm", "model.mlp=gelu", "model.bias=true", "train.micro_batch_size=8",
        "train.grad_accum=2",
    ),
    "checkpointed": (
        *SMALL, "model.n_layer=8", "train.grad_checkpoint=true", "train.micro_batch_size=16",
    ),
    "muon, untied": (
        *SMALL, "model.n_layer=4", "model.d_model=256", "model.block_size=64",
        "optim.name=muon", "model.tie_embeddings=false", "train.micro_batch_size=4",
    ),
    "two bytes": (*SMALL, "train.precision=bf16", "train.micro_batch_size=16"),
    "multi-query, deep": (
        *SMALL, "model.n_layer=8", "model.block_size=64", "model.n_kv_head=1",
        "train.micro_batch_size=16",
    ),
}  # fmt: skip


def two_steps_need(tell, config, run, threads):
    """Tell how many bytes, in this process."""
    torch.set_num_threads(threads)
    task = prepare(config, "cpu", run)
    memory = Growth(task.config, CPU)
    learner = build_learner(task, CPU, Display(quiet=True))
    for _ in range(STEPS):
        optimizer_step(learner)
    tell.send(memory.needed())


def measured_over_predicted(tmp_path, settings, threads=1):
    """Of two steps in a new process, which has PyTorch and nothing to allocate again."""
    text = tmp_path / "words.txt"
    words = (f"{number * 7919 % 100_003:x}" for number in range(20_000))
    text.write_text(" ".join(words), encoding="utf-8")
    config = run_config(
        text, "data.tokenizer=char", "eval.windows=8", f"train.threads={threads}", *settings
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["octavo.studies.plan_probe"])
    ours, theirs = context.Pipe()
    given = (theirs, config, tmp_path / "run", threads)
    child = context.Process(target=two_steps_need, args=given)
    child.start()
    theirs.close()  # so that a child that fails is not waited for
    found = ours.recv()
    child.join()
    task = prepare(config, "cpu", tmp_path / "run")
    return found / count_plan(task, CPU, tmp_path).memory.step


linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is Linux's")


@linux
@pytest.mark.parametrize("name", list(MEASURED)[:2])
def test_a_process_grows_by_what_was_predicted(tmp_path, name):
    found = measured_over_predicted(tmp_path, MEASURED[name])
    assert found == pytest.approx(1, abs=0.15)


@linux
def test_a_process_that_trains_in_halves_grows_by_what_was_predicted(tmp_path, monkeypatch):
    sizes = ["model.n_layer=4", "model.d_model=384", "train.micro_batch_size=8", "optim.name=muon"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the plan's; a machine may have one
    found = measured_over_predicted(tmp_path, [*SMALL, *sizes], threads=2)
    assert found == pytest.approx(1, abs=0.15)


@linux
@pytest.mark.long
@pytest.mark.parametrize("name", list(MEASURED)[2:])
def test_processes_grow_by_what_was_predicted(tmp_path, name):
    found = measured_over_predicted(tmp_path, MEASURED[name])
    assert found == pytest.approx(1, abs=0.15)
