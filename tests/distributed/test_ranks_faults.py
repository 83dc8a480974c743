"""Ranks that die, hang, fail or cannot write: nobody waits forever, nothing is lost, said once."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from crew import SMALL, Crew, config, together, wait_for_step
from training_kit import assert_same_weights, saved
from work import aloud, failing, run

from octavo.checkpoint import Run

TIMES = int(os.environ.get("OCTAVO_FAULTS", "1"))  # `make faults` asks for more
LONG = ("train.max_steps=100000", "eval.every=0", "checkpoint.every=1000")


@pytest.mark.parametrize(
    ("size", "killed", "parallel"),
    [
        (2, 1, "ddp"),
        pytest.param(2, 0, "fsdp", marks=pytest.mark.long),
        pytest.param(4, 2, "ddp", marks=pytest.mark.long),
    ],
)
def test_when_a_rank_is_killed_the_others_leave(texts, tmp_path, size, killed, parallel):
    settings = config(texts, *LONG, f"train.parallel={parallel}")
    crew = Crew(tmp_path, size, run, settings, tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    crew.send(killed, signal.SIGKILL)
    assert crew.join(10) == [-9 if rank == killed else 7 for rank in range(size)]
    assert re.findall("error: .*", crew.errors()) == [
        line for line in crew.errors().splitlines() if "lost another one" in line
    ]
    assert crew.errors().count("error:") == 1


def test_a_rank_that_hangs_is_not_waited_for(texts, tmp_path):
    environment = {rank: {"OCTAVO_TIMEOUT": "2"} for rank in range(2)}
    crew = Crew(tmp_path, 2, run, config(texts, *LONG), tmp_path / "run", env=environment)
    wait_for_step(tmp_path / "run", 3)
    crew.send(1, signal.SIGSTOP)
    crew.processes[0].join(10)
    assert crew.join(0) == [7, None]
    assert crew.errors().count("error:") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_of_one_rank_is_said_once_by_itself(texts, tmp_path, rank):
    crew = Crew(tmp_path, 2, failing, config(texts), tmp_path / "run", 3, rank)
    assert crew.join() == [1 if rank == r else 7 for r in range(2)]
    assert re.findall("error: .*", crew.errors()) == ["error: the moon was full"]


def test_an_error_of_all_is_said_once(texts, tmp_path):
    settings = config(texts, "train.micro_batch_size=3", "train.grad_accum=1")
    crew = Crew(tmp_path, 2, run, settings, tmp_path / "run")
    assert crew.join() == [2, 2]
    assert crew.errors().count("error:") == 1
    assert "3 rows cannot be shared equally among 2" in crew.errors()
    assert not (tmp_path / "run").exists()


POINTS = {
    "ddp": ["optimizer.safetensors-unsynced", "manifest.json-synced"],
    "fsdp": ["optimizer-0-of-2.safetensors-unsynced", "optimizer-1-of-2.safetensors-synced",
             "optimizer.index.json-synced", "manifest.json-synced", "best.json-replaced"],
}  # fmt: skip
KILLS = [
    pytest.param(kind, point, marks=[] if "1-of-2" in point else [pytest.mark.long])
    for kind, points in POINTS.items()
    for point in points
]


@pytest.mark.parametrize(("parallel", "point"), KILLS)
def test_a_rank_killed_in_a_save_loses_nothing(texts, tmp_path, parallel, point):
    """Every rank takes up the step that rank 0 finds whole, and the end is as if undisturbed."""
    settings = config(texts, f"train.parallel={parallel}", "model.dropout=0.1")
    together(tmp_path, 2, run, settings, tmp_path / "whole")
    env = {rank: {"OCTAVO_FAILPOINT": point} for rank in range(2)}
    codes = Crew(tmp_path, 2, run, settings, tmp_path / "run", env=env).join()
    assert sorted(codes) == [7, 137], codes
    assert not list(Run.open(tmp_path / "run").damaged)
    together(tmp_path, 2, run, settings, tmp_path / "run", True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.long
@pytest.mark.timeout(300 * TIMES)
def test_ranks_killed_at_random_lose_nothing(texts, tmp_path):
    """A rank killed ten times in steps and saves: the end is as if undisturbed, bit for bit."""
    settings = config(
        texts, f"train.max_steps={30 * TIMES + 10}", "checkpoint.every=1", "model.dropout=0.1"
    )
    together(tmp_path, 2, run, settings, tmp_path / "whole")
    draw, out = random.Random(1337), tmp_path / "run"
    for trial in range(10 * TIMES):
        crew = Crew(tmp_path, 2, run, settings, out, trial > 0)
        wait_for_step(out, 3 * trial + 3)
        time.sleep(draw.uniform(0, 0.05))
        crew.send(killed := draw.randrange(2), signal.SIGKILL)
        assert crew.join(10)[1 - killed] == 7, crew.errors()
    together(tmp_path, 2, run, settings, out, True)
    assert_same_weights(tmp_path / "whole", out)


def test_a_full_disk_under_one_rank_aborts_the_save_for_all(texts, tmp_path):
    settings = config(texts, "train.parallel=fsdp", "eval.every=0")
    env = {1: {"OCTAVO_FAILPOINT": "optimizer-1-of-2.safetensors-unsynced:full"}}
    crew = Crew(tmp_path, 2, aloud, settings, tmp_path / "run", env=env)
    assert crew.join() == [6, 6]
    assert crew.output().count("warning: not saved") == 2
    assert crew.errors().count("error:") == 1
    assert Run.open(tmp_path / "run").checkpoints == []


def torchrun(*words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def training(texts, out, *settings):
    words = ["train", str(texts), "--out", str(out), *SMALL, *settings]
    return ["-m", "octavo", *words]


@pytest.mark.timeout(120)
def test_torchrun_trains_one_run_and_a_signal_saves_it(texts, tmp_path):
    out = tmp_path / "run"
    begun = torchrun("--standalone", "--nproc-per-node=2", *training(texts, out, *LONG))
    wait_for_step(out, 3, timeout=60)
    begun.send_signal(signal.SIGTERM)
    output, errors = begun.communicate(timeout=30)
    assert errors.count("error: stopped by SIGTERM and saved at step") == 1
    assert output.count("2 processes, each with 4 of a step's 8 rows") == 1
    assert saved(out)[0] >= 3


@pytest.mark.long
@pytest.mark.timeout(120)
def test_torchrun_ends_when_a_rank_is_killed(texts, tmp_path):
    out = tmp_path / "run"
    begun = torchrun("--standalone", "--nproc-per-node=2", *training(texts, out, *LONG))
    wait_for_step(out, 3, timeout=60)
    ranks = children(begun.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    begun.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.long
@pytest.mark.timeout(120)
def test_two_nodes_meet_through_torchruns_rendezvous(texts, tmp_path):
    """Two agents on the loopback, each with one process: the same run as two on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        torchrun(
            "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--rdzv-backend=c10d",
            "--rdzv-id=octavo", f"--rdzv-endpoint=127.0.0.1:{port}",
            *training(texts, tmp_path / "nodes", "train.parallel=ddp"),
        )
        for node in range(2)
    ]  # fmt: skip
    ended = [node.communicate(timeout=90) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    together(tmp_path, 2, run, config(texts, "train.parallel=ddp"), tmp_path / "machine")
    assert_same_weights(tmp_path / "machine", tmp_path / "nodes")
