"""Each piece of the mini transformer's troubleshooting is a rule: it speaks where it would help."""

import dataclasses
import inspect
import json
import re

import pytest

from octavo.checkpoint import Run
from octavo.config import load_config
from octavo.studies import doctor_rules
from octavo.studies.doctor import Machine, RunFacts, examine_machine, examine_run
from octavo.studies.doctor_rules import diagnose, repeated
from octavo.training.memory import Conditions, training_memory

MACHINE = Machine(
    device="cpu", device_name="a processor", torch="2.13.0", threads=2, cores=2, load=0.1,
    instructions="AVX2", gflops=100.0, half="bf16", half_gain=0.8, compiler="g++",
    compile_problem="", native_problem="", unused_gpu=False, memory_total=2**34,
    memory_free=2**33, disk_free=2**40,
)  # fmt: skip
GPU = dataclasses.replace(MACHINE, device="cuda", half_gain=8.0)
OLD_GPU = dataclasses.replace(GPU, half="fp16")
FALLING = [(step, 4.0 - 0.02 * step) for step in range(100)]
STUCK = [(step, 4.0) for step in range(100)]


def facts(*settings, **changes):
    config = load_config(None, ["model.vocab_size=100", "optim.lr=1e-3", *settings])
    base = RunFacts(
        path="runs/x",
        config=config,
        conditions=Conditions(),
        parameters=10_000_000,
        tokens_in_text=10_000_000,
        tokens_seen=20_000_000,
        seconds=100.0,
        losses=FALLING,
        validations=[(33, 3.4), (66, 3.0), (99, 2.99)],
        skipped=0,
        sample="She sells sea shells by the sea shore and the sea is blue.",
        finished=True,
    )
    return dataclasses.replace(base, **changes)


def with_memory(share, run, of="peak", machine=MACHINE):
    """A machine with so much of the memory that a run needs."""
    need = getattr(training_memory(run.config, run.conditions), of)
    return dataclasses.replace(machine, memory_free=int(share * need))


SPIKE = [*FALLING[:60], (60, 3.9), *FALLING[61:]]
RISING_FIRST = [(0, 4.0), (2, 5.0), (4, 6.0), (6, 5.0), *FALLING[8:]]
WORSE = [(20, 2.0), (50, 2.1), (99, 2.3)]
FLAT = [(30, 2.1), (60, 2.1), (99, 2.1)]
ROUND = "the cat sat on the mat and " * 8
LONG = ("model.block_size=4096", "model.n_layer=2", "model.d_model=64", "model.n_head=4")
WIDE = ("model.d_model=2048", "model.n_head=16", "model.n_layer=12", "train.micro_batch_size=1")
FULL = dict(
    parameters=1_000_000,
    validations=FLAT,
    losses=[(s, 2.1) for s in range(100)],
    tokens_seen=200_000_000,
)

# The page's words, the rule, the machine, the run, and what it says.
BULLETS = [
    ("Reduce `batch_size`", "smaller_batches", 0.5, facts(), "micro_batch_size=8"),
    (
        "Reduce `block_size`",
        "shorter_context",
        0.6,
        facts(*LONG, "train.micro_batch_size=1", "eval.windows=1"),
        "model.block_size=2048",
    ),
    ("Reduce `d_model` or `n_layer`", "smaller_model", 0.3, facts(*WIDE), "smaller model.d_model"),
    (
        "Enable gradient checkpointing",
        "gradient_checkpointing",
        0.6,
        facts("model.n_layer=12", "eval.windows=1"),
        "train.grad_checkpoint=true",
    ),
    (
        "Use mixed precision training",
        "half_precision_memory",
        (0.85, GPU),
        facts("eval.windows=1", conditions=Conditions("cuda")),
        "train.precision=bf16",
    ),
    (
        "Check learning rate (try 1e-4 to 1e-3)",
        "learning_rate",
        None,
        facts("optim.lr=0.1", losses=STUCK),
        "optim.lr=0.001",
    ),
    (
        "Check learning rate: too high",
        "learning_rate",
        None,
        facts("optim.lr=6e-3", losses=SPIKE),
        "optim.lr=0.002",
    ),
    (
        "Increase warmup iterations",
        "longer_warmup",
        None,
        facts("optim.warmup=0", "train.max_steps=100", losses=RISING_FIRST),
        "optim.warmup=0.1",
    ),
    (
        "Check data quality",
        "check_data",
        None,
        facts("data.source=my.txt", losses=STUCK),
        "octavo data inspect my.txt",
    ),
    (
        "Reduce dropout",
        "less_dropout",
        None,
        facts("model.dropout=0.5", losses=STUCK),
        "model.dropout=0.1",
    ),
    (
        "Try smaller model first",
        "smaller_model_first",
        None,
        facts(parameters=50_000_000, losses=STUCK),
        "quickstart.yaml",
    ),
    (
        "Train longer",
        "train_longer",
        None,
        facts(validations=[(50, 3.0), (99, 2.5)]),
        "train.max_steps=4000",
    ),
    (
        "Use more data",
        "more_text",
        None,
        facts(validations=WORSE, tokens_in_text=50_000),
        "more text",
    ),
    ("Increase model size", "larger_model", None, facts(**FULL), "octavo grow runs/x"),
    ("Adjust temperature/top-k/top-p", "sampling", None, facts(sample=ROUND), "--temperature"),
    (
        "Check for overfitting (train vs val loss)",
        "overfitting",
        None,
        facts(validations=WORSE),
        "train.patience",
    ),
    (
        "Increase batch size",
        "larger_batches",
        None,
        facts("train.micro_batch_size=2", "train.grad_accum=8", "model.block_size=64"),
        "micro_batch_size=16 train.grad_accum=1",
    ),
    (
        "Enable model compilation (`compile: true`)",
        "compilation",
        None,
        facts("train.compile=false", seconds=9000.0),
        "train.compile=true",
    ),
    ("Use mixed precision", "half_precision_speed", (None, GPU), facts(), "train.precision=bf16"),
    (
        "Use mixed precision on an old GPU",
        "half_precision_speed",
        (None, OLD_GPU),
        facts(),
        "train.precision=fp16",
    ),
    (
        "Enable FlashAttention",
        "flash_attention",
        None,
        facts("model.dropout=0.1", "model.block_size=256"),
        "model.dropout=0",
    ),
    (
        "Enable FlashAttention on a GPU",
        "flash_attention",
        (None, GPU),
        facts(),
        "train.precision=bf16",
    ),
    (
        "Use Multi-Query Attention",
        "multi_query",
        None,
        facts(*LONG, parameters=300_000),
        "n_kv_head=1",
    ),
]


@pytest.mark.parametrize(
    ("bullet", "rule", "on", "run", "advice"), BULLETS, ids=lambda v: str(v)[:30]
)
def test_each_bullet_is_a_rule_that_speaks_where_it_helps(bullet, rule, on, run, advice):
    share, machine = on if isinstance(on, tuple) else (on, MACHINE)
    if share:
        machine = with_memory(share, run, machine=machine)
    found = {finding.rule: finding for finding in diagnose(machine, run)}
    assert rule in found, f"{bullet}: found {list(found)}"
    assert advice in found[rule].fix


def test_a_healthy_run_hears_nothing():
    assert diagnose(MACHINE, facts()) == []


def test_advice_about_memory_fits_what_it_names():
    """One that would not help is not given: a GPU's precision on a CPU, a context that is short."""
    run = facts()
    machine = with_memory(0.5, run)
    (first, *_) = diagnose(machine, run)
    assert first.rule == "smaller_batches"
    sizes = dict(word.split("=") for word in first.fix.split() if "=" in word)
    train = dataclasses.replace(
        run.config.train,
        micro_batch_size=int(sizes["train.micro_batch_size"]),
        grad_accum=int(sizes["train.grad_accum"]),
    )
    fixed = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    assert not any(f.rule == "smaller_batches" for f in diagnose(machine, fixed))
    assert train.batch_size == run.config.train.batch_size


MACHINES = [
    ("disk_full", dict(disk_free=10**9), False),
    ("disk_full", dict(disk_free=10**7), True),
    ("memory_full", dict(memory_free=5 * 10**8), False),
    ("memory_full", dict(memory_free=10**8), True),
    ("gpu_unused", dict(unused_gpu=True), False),
    ("too_many_threads", dict(threads=8), False),
    ("too_few_threads", dict(threads=1), False),
    ("busy", dict(load=3.0), False),
    ("no_native_engine", dict(native_problem="there is no C++ compiler"), False),
]


@pytest.mark.parametrize(("rule", "changes", "blocks"), MACHINES)
def test_rules_about_the_machine(rule, changes, blocks):
    (finding,) = diagnose(dataclasses.replace(MACHINE, **changes))
    assert (finding.rule, finding.blocks) == (rule, blocks)


def test_what_blocks_comes_first():
    machine = dataclasses.replace(MACHINE, disk_free=10**7)
    found = diagnose(machine, facts(validations=WORSE))
    assert [finding.rule for finding in found] == ["disk_full", "overfitting"]


def test_every_rule_is_tested():
    rules = set(re.findall(r'Finding\(\s*"(\w+)"', inspect.getsource(doctor_rules)))
    assert rules == {bullet[1] for bullet in BULLETS} | {rule for rule, _, _ in MACHINES}


def test_repetition():
    assert repeated(ROUND) > 0.8
    assert repeated("one two three four five six seven eight nine ten eleven twelve") == 0
    assert repeated("") == repeated("word " * 5) == 0


def test_this_machine(tmp_path):
    machine = examine_machine(tmp_path)
    assert machine.gflops > 0
    assert 0 < machine.memory_free <= machine.memory_total
    assert machine.threads >= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from training_kit import trained

    text = "She sells sea shells by the sea shore. " * 60
    settings = [
        "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
        "train.max_steps=20", "log.every=1", "eval.every=10", "eval.windows=4",
        "log.sample_tokens=5",
    ]  # fmt: skip
    return trained(text, tmp_path_factory.mktemp("runs") / "sea", *settings)


def test_a_runs_facts_are_its_metrics(run):
    found = examine_run(Run.open(run))
    assert found.finished
    assert [step for step, _ in found.losses] == list(range(1, 21))
    assert [step for step, _ in found.validations] == [10, 20]
    assert found.tokens_seen == 20 * 32 * 16
    assert found.tokens_in_text > 2000
    assert found.parameters > 0


def test_a_torn_last_line_and_a_run_that_never_began(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    assert examine_run(Run.open(copy)).losses == []
    metrics = (run / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(metrics[: metrics.rindex(b'"reason"')])
    assert len(examine_run(Run.open(copy)).losses) == 20
    assert not examine_run(Run.open(copy)).finished


def test_the_command(run, capsys, monkeypatch, tmp_path):
    from argparse import Namespace

    from octavo.commands import doctor
    from octavo.errors import ConfigError, ResourceError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    doctor.run(Namespace(words=[str(run)], json=False), [])
    page = capsys.readouterr().out
    assert "finished" in page
    assert "do this: " in page or "nothing is in the way" in page
    doctor.run(Namespace(words=[], json=True), [])
    found = json.loads(capsys.readouterr().out)
    assert found["run"] is None
    assert found["machine"]["cores"] >= 1
    with pytest.raises(ConfigError):
        doctor.run(Namespace(words=["a", "b"], json=False), [])
    full = dataclasses.replace(MACHINE, disk_free=10**7)
    monkeypatch.setattr("octavo.studies.doctor.examine_machine", lambda folder: full)
    with pytest.raises(ResourceError):
        doctor.run(Namespace(words=[], json=True), [])
