"""A plan's figures beside the run they foretell, and the remarks that save somebody a week."""

import dataclasses
import datetime
import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_kit import config_of, events

from octavo import linear
from octavo.adapting.assemble import assemble
from octavo.adapting.lora import trainable_parameters
from octavo.checkpoint import Run
from octavo.commands import plan as command
from octavo.config import load_config
from octavo.errors import DataError, OctavoError, ResourceError
from octavo.model.counts import flops_per_token
from octavo.model.gpt import GPT
from octavo.studies import plan as plan_module
from octavo.studies import plan_probe
from octavo.studies.plan import Plan, count_plan, make_plan, occasions, timed_plan
from octavo.studies.plan_probe import Probe, probe
from octavo.studies.plan_remarks import remarks_on
from octavo.text.batches import Batches
from octavo.training.loop import train
from octavo.training.loss import cross_entropy
from octavo.training.memory import ROOM, Conditions, training_memory, with_micro_batch
from octavo.training.request import finetune_request
from octavo.training.task import Task, prepare

CPU = torch.device("cpu")
TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells.\n" * 60
SMALL = (
    "model.block_size=16", "model.n_layer=2", "model.n_head=2", "model.d_model=16",
    "train.max_steps=20", "train.micro_batch_size=4", "eval.windows=4", "eval.every=5",
    "checkpoint.every=10", "log.sample_tokens=5", "log.sample_every=10",
)  # fmt: skip
PROBE = Probe(
    step_bytes=10**6, peak_bytes=2 * 10**6, start=2.0, step=0.5, validation=3.0, sample=0.25,
    save=0.125, end=1.0,
)  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sea.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def task_of(text, tmp_path, *settings):
    return prepare(config_of(text, *SMALL, *settings), "cpu", tmp_path / "run")


def of_many_tokens(tokens, *settings, val=True):
    """A task over so many tokens, none of which is ever read."""
    config = load_config(None, ["model.vocab_size=50304", "train.compile=false", *settings])
    batches = Batches(np.zeros(4000, np.uint16), config.model.block_size, 0)
    batches.windows = (tokens - 1) // config.model.block_size
    windows = np.zeros((4, config.model.block_size), np.int64)
    data = {"tokens": tokens, "val_tokens": 100}
    return Task(config, None, batches, (windows, windows) if val else None, data, {})


# Figures


def test_the_figures_are_the_runs(text, tmp_path):
    """What is counted before is what is there afterwards: parameters, tokens, bytes on the disk."""
    task = task_of(text, tmp_path)
    plan = count_plan(task, CPU, tmp_path)
    run = Run.open(train(task.config, tmp_path / "run", quiet=True).run)
    assert run.latest is not None
    saved = run.load(run.latest)
    own = {n: t.numel() for n, t in saved.model_tensors().items() if n != "lm_head.weight"}  # tied
    assert plan.parameters_total == sum(own.values())
    assert plan.parameters_embedding == own["tok_emb.weight"]
    assert saved.state["tokens"] == plan.tokens_in_all == 20 * plan.tokens_a_step
    bytes_there = sum(file.stat().st_size for file in run.latest.iterdir())
    assert plan.checkpoint_bytes == pytest.approx(bytes_there, abs=20_000)  # headers, settings
    kept = sum(f.stat().st_size for f in (run.path / "checkpoints").rglob("*.safetensors"))
    assert kept <= plan.disk_bytes


def test_adapters_train_a_part(text, tmp_path):
    task = task_of(text, tmp_path)
    weights = GPT(task.config.model).state_dict()
    base = Run.create(tmp_path / "base", task.config, task.tokenizer, {}, weights)
    request = finetune_request([str(base.path), str(text)], [], False, False, False)
    tuned = prepare(request.config, "cpu", tmp_path / "tuned")
    plan = count_plan(tuned, CPU, tmp_path)
    wanted = trainable_parameters(assemble(tuned.config, tuned.base))
    assert plan.parameters_trainable == wanted < plan.parameters_total
    assert plan.memory.gradients == 4 * wanted


RECIPES = {
    "nanogpt-char.yaml": [], "quickstart.yaml": [], "s2-tiny.yaml": [], "s3.yaml": [],
    "gpt2-124m.yaml": ["model.d_model=96"], "s0-arcane.yaml": ["model.d_model=96"],
    "s0-arcane-rope.yaml": ["model.d_model=96"], "s1.yaml": ["model.d_model=96"],
    "s2-small.yaml": ["model.d_model=64"], "s2-medium.yaml": ["model.d_model=64"],
    "s2-large.yaml": ["model.d_model=96"], "s2-gpt2.yaml": ["model.d_model=96"],
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_flops_are_pytorchs_within_two_percent(monkeypatch, root, recipe):
    """The recipes' shapes in small, forward and backward; attention counted whole, T x T."""
    small = ["model.block_size=48", "model.n_layer=2", "model.vocab_size=211", "model.dropout=0"]
    config = load_config(root / "configs" / recipe, [*small, *RECIPES[recipe]]).model
    model, ids = GPT(config), torch.zeros(2, 48, dtype=torch.long)
    monkeypatch.setattr(linear, "onednn_pays", lambda: False)  # whose products it does not count
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cross_entropy(model, ids, ids).backward()
    assert 3 * flops_per_token(config) * 96 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_occasions():
    assert occasions(0, 20, 5) == {5, 10, 15, 20}
    assert occasions(0, 19, 5) == {5, 10, 15, 19}
    assert occasions(10, 19, 5) == {15, 19}
    assert occasions(0, 20, 0) == {20}
    assert occasions(0, 3, 500) == {3}


def test_the_time_counts_what_the_loop_does(text, tmp_path):
    """20 steps, validated at 5, 10, 15 and 20, saved then too, sampled at 10 and 20."""
    task = task_of(text, tmp_path)
    plan = timed_plan(count_plan(task, CPU, tmp_path), task, PROBE, 0, prepared=0.5)
    assert plan.times == {
        "start": 2.5, "steps": 10.0, "validations": 12.0, "samples": 0.5, "saves": 0.5, "end": 1.0,
    }  # fmt: skip
    assert plan.seconds == 26.5
    assert plan.tokens_per_s == 128
    run = train(task.config, tmp_path / "run", quiet=True).run
    assert [len(events(run, kind)) for kind in ("eval", "save", "sample")] == [4, 4, 2]
    half = timed_plan(count_plan(task, CPU, tmp_path, 10), task, PROBE, 10, prepared=0.5)
    assert half.times["steps"] == 5.0
    assert half.times["validations"] == 6.0


# Remarks


def remarks(task, **changes):
    plan = dataclasses.replace(count_plan(task, CPU, Path()), fits=True, disk_bytes=0)
    return remarks_on(task, dataclasses.replace(plan, **changes))


def only(said, part):
    (sentence,) = [sentence for sentence in said if part in sentence]
    return sentence


S1 = ("model.block_size=1024", "train.max_steps=152587", "train.micro_batch_size=16")


def test_s1_sees_a_quarter_of_what_its_page_says():
    """ "152,587 steps (1 epoch through 10B tokens), batch 16, length 1,024": that is 2.5 B."""
    said = only(remarks(of_many_tokens(10_000_000_000, *S1)), "1,024 tokens x 152,587")
    assert said.startswith("16 rows x 1,024 tokens x 152,587 steps are 2.5 B tokens, 25% of")
    assert said.endswith("10 B: one epoch is train.max_steps=610352 or train.grad_accum=4")
    whole = of_many_tokens(10_000_000_000, *S1, "train.grad_accum=4")
    assert not [line for line in remarks(whole) if "rows x" in line]


REMARKS = [
    ("epochs without dropout", ["train.max_steps=20000"], {}),
    ("beyond 4 a text teaches less", ["train.max_steps=20000", "model.dropout=0.1"], {}),
    ("a smaller model would do", ["train.max_steps=300"], {}),
    ("the warmup of 500 steps", ["train.max_steps=400", "optim.warmup=500"], {}),
    ("saved at its end only", ["checkpoint.every=0", "eval.every=0"], {"seconds": 7200.0}),
    ("saved at its end only", ["checkpoint.every=9000", "eval.every=0"], {"seconds": 7200.0}),
    ("torch.compile costs more", ["train.compile=true"], {"seconds": 60.0}),
    ("HellaSwag takes is not counted", ["eval.hellaswag=download"], {}),
    ("4 GB and 1 GB are free: checkpoint.keep=1", [], dict(disk_bytes=4e9, disk_free_bytes=1e9)),
]  # fmt: skip


@pytest.mark.parametrize(("part", "settings", "changes"), REMARKS)
def test_what_looks_wrong_is_said(part, settings, changes):
    task = of_many_tokens(1_000_000, *settings)
    assert only(remarks(task, **changes), part)


def test_what_looks_right_is_not_spoken_of():
    task = of_many_tokens(100_000_000, "train.max_steps=12500", "model.vocab_size=1000")
    assert remarks(task, seconds=3600.0) == []
    assert only(remarks(of_many_tokens(10**6, val=False)), "no validation text")


def test_a_model_too_large_is_told_before_anything_is_allocated(tmp_path):
    """A trillion parameters: the plan is arithmetic, and says what is missing."""
    huge = ("model.n_layer=1000", "model.d_model=12288", "model.n_head=96", "model.block_size=16")
    task = of_many_tokens(10**6, *huge)
    started = time.monotonic()
    plan = make_plan(task, CPU, tmp_path)
    assert time.monotonic() - started < 5
    assert not plan.fits
    assert plan.measured is None
    assert plan.fitting == {}
    assert "no setting makes it fit" in plan.remarks[0]


def test_the_cheapest_settings_that_fit_are_named(monkeypatch, tmp_path):
    """A little less memory wants smaller passes, and there is an end to what can be saved."""
    task = of_many_tokens(10**6, "train.micro_batch_size=8", "eval.windows=1")
    need = count_plan(task, CPU, tmp_path).memory

    def said(free):
        monkeypatch.setattr(plan_module, "free_memory", lambda device: int(free))
        return make_plan(task, CPU, tmp_path).remarks[0]

    pairs = training_memory(with_micro_batch(task.config, 2), Conditions()).peak
    less = said(1.001 * pairs / ROOM)
    assert "train.micro_batch_size=2 train.grad_accum=4 makes the same step" in less
    one = need.weights + need.gradients + need.optimizer
    assert "no setting makes it fit" in said(one / 2)


def test_a_plan_without_the_text(tmp_path, capsys, monkeypatch):
    """S1's ten billion tokens need not be prepared to know what they will cost."""
    monkeypatch.chdir(tmp_path)
    found = json.loads(
        shown(capsys, "data.source=not/there", "model.vocab_size=99", "s1.yaml", json=True)
    )
    assert found["epochs"] == 0
    assert found["tokens_in_all"] == 152_587 * 65_536
    assert only(found["remarks"], "counted without the text")
    with pytest.raises(DataError):
        shown(capsys, "data.source=not/there", "quickstart.yaml")


# Measuring


def test_what_was_packed_is_what_the_run_does(text, tmp_path):
    """The child's small run, in this process: real rows, all of its parts, nothing left behind."""
    task = task_of(text, tmp_path, "data.separator=true", "data.mask_documents=true")
    folder = tmp_path / "packed"
    folder.mkdir()
    plan_probe._pack(task, folder)
    again = plan_probe._unpack(folder, load_config(folder / "config.yaml"))
    for one, other in zip(task.batches.rows(0, 8), again.batches.rows(0, 8), strict=True):
        assert np.array_equal(one, other)
    assert again.mask_id == task.mask_id is not None
    assert again.tokenizer.fingerprint == task.tokenizer.fingerprint
    found = plan_probe.measure(folder, 0.0, time.time())
    assert all(value > 0 for value in (found.step, found.validation, found.sample, found.save))


def test_parts_are_counted_in_full(text, tmp_path):
    """The child does four of eight passes and 40 of 400 tokens: its seconds count so many times."""
    task = task_of(text, tmp_path, "train.grad_accum=8", "log.sample_tokens=400")
    whole = plan_probe._in_full(PROBE, task)
    assert (whole.step, whole.sample, whole.validation) == (1.0, 2.5, 3.0)


def test_a_probe_leaves_nothing_behind_and_a_failure_is_one_line(text, tmp_path, monkeypatch):
    task = task_of(text, tmp_path)
    before = sorted(tmp_path.iterdir())
    broken = dataclasses.replace(task.config.train, device="cuda:77")
    broken = dataclasses.replace(task, config=dataclasses.replace(task.config, train=broken))
    with pytest.raises(OctavoError, match=r"two steps of this run failed: .*cuda:77"):
        probe(broken, tmp_path, 0.0)
    monkeypatch.setattr(
        plan_probe.subprocess, "run", lambda *a, **k: Namespace(returncode=-9, stderr="")
    )
    with pytest.raises(ResourceError, match="killed by signal 9"):
        probe(task, tmp_path, 0.0)
    assert sorted(tmp_path.iterdir()) == before


def test_a_spike_in_a_probe_can_be_told():
    """Its report asks where a row begins: a probe's rows begin nowhere in the text."""
    ids = np.arange(8).reshape(4, 2)
    rows = plan_probe._Rows(ids, ids, None, 4)
    assert rows.starts(3, 3).tolist() == [3, 0, 1]
    assert rows.rows(3, 2)[0].tolist() == [[6, 7], [0, 1]]


def test_a_probe_is_left_out_where_it_would_take_long(monkeypatch, tmp_path, text):
    """Forty seconds a row: nobody asked for that, but whoever asks gets it."""
    asked = []

    def measured(task, beside):
        asked.append(task)
        return PROBE

    monkeypatch.setattr(plan_module, "probe", measured)
    large = ("model.n_layer=24", "model.d_model=1024", "model.n_head=16", "model.block_size=1024")
    monkeypatch.setattr(plan_module, "free_memory", lambda device: 2**50)
    task = of_many_tokens(10**6, *large)
    assert make_plan(task, CPU, tmp_path).measured is None
    assert make_plan(task, CPU, tmp_path, probing=True).measured is PROBE
    small = task_of(text, tmp_path)
    assert make_plan(small, CPU, tmp_path, probing=False).measured is None
    assert len(asked) == 1
    plan = make_plan(small, CPU, tmp_path)
    assert len(asked) == 2
    ends = datetime.datetime.fromisoformat(plan.ends).timestamp()
    assert ends == pytest.approx(time.time() + plan.seconds, abs=5)


# The command


def shown(capsys, *words, json=False, probe=False, out=None):
    settings = [word for word in words if "=" in word]
    command.run(
        Namespace(words=[w for w in words if "=" not in w], out=out, probe=probe, json=json),
        settings,
    )
    return capsys.readouterr().out


def test_the_page_fits_eighty_columns_and_says_it_all(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(plan_module, "probe", lambda task, beside: PROBE)
    page = shown(capsys, str(text), *SMALL, probe=True)
    lines = [line for line in page.splitlines() if not line.startswith("! ")]  # wrapped where shown
    assert max(map(len, lines)) <= 80
    for group in ("model", "text", "memory", "disk", "time"):
        assert f"\n{group} " in f"\n{page}"
    for fact in ("1 MB", "128", "26 s", "micro-batch", "20 spend"):
        assert fact in page
    found = json.loads(shown(capsys, str(text), *SMALL, json=True))
    fields = {field.name for field in dataclasses.fields(Plan)}
    assert set(found) == fields
    assert found["measured"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sea.txt"]


def test_a_run_is_planned_from_where_it_stands(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(task_of(text, tmp_path).config, tmp_path / "runs" / "sea", quiet=True)
    found = json.loads(shown(capsys, "runs/sea", "train.max_steps=50", json=True))
    assert found["steps_left"] == 30


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min"), (4e5, "4.6 days"), (4e6, "46 days")],
)
def test_spans(seconds, words):
    assert command.span(seconds) == words
