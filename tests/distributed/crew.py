"""Several processes for a test: children of a fork server that has imported torch once.

They meet through a file, so no test needs a port. What they print goes into files.
"""

import json
import multiprocessing
import os
import pickle
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from command_kit import wait_until
from torch import distributed as dist
from training_kit import FOX, config_of
from training_kit import SMALL as ALONE

from octavo.config import Config
from octavo.errors import OctavoError

SMALL = (
    *ALONE, "train.grad_accum=2", "log.sample_every=0", "data.separator=true",
    "data.mask_documents=true",
)  # fmt: skip
CPU = torch.device("cpu")
PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot", "octavo.cli",
    "octavo.training.loop",
]  # fmt: skip


def write_texts(folder: Path) -> Path:
    """Documents of 3 to 39 characters, whose ends are not learned from: targets are ragged."""
    path = folder / "texts.jsonl"
    lines = [json.dumps({"text": FOX[n % 40 : n % 40 + 3 + n % 37]}) for n in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config(texts: Path, *settings: str) -> Config:
    return config_of(texts, *SMALL, *settings)


class Crew:
    """``function(*args)`` on ``size`` processes of one process group; alone where it is 1."""

    def __init__(
        self,
        folder: Path,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        env: dict[int, dict[str, str]] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.home = folder / f"crew-{secrets.token_hex(4)}"
        self.home.mkdir()
        self.processes = [
            context.Process(
                target=_work,
                args=(
                    rank,
                    size,
                    self.home,
                    _environment((env or {}).get(rank, {})),
                    function,
                    args,
                ),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def join(self, timeout: float = 60.0) -> list[int | None]:
        """Exit codes; None of a process that has not ended in time, and is then killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def results(self) -> list[Any]:
        """What the function returned on each process."""
        assert self.join() == [0] * len(self.processes), self.errors()
        paths = [self.home / f"result-{rank}" for rank in range(len(self.processes))]
        return [pickle.loads(path.read_bytes()) for path in paths]

    def errors(self) -> str:
        """All that was printed on standard error."""
        return "".join(p.read_text(encoding="utf-8") for p in sorted(self.home.glob("stderr-*")))

    def output(self) -> str:
        """All that was printed on standard output."""
        return "".join(p.read_text(encoding="utf-8") for p in sorted(self.home.glob("stdout-*")))

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


def together(folder: Path, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``size`` processes."""
    return Crew(folder, size, function, *args).results()


def wait_for_step(run: Path, step: int, timeout: float = 30.0) -> None:
    """Until the run has logged ``step``."""
    log, line = run / "metrics.jsonl", f'"event": "train", "step": {step},'
    wait_until(lambda: log.exists() and line in log.read_text(), timeout)


def _environment(more: dict[str, str]) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if name.startswith("OCTAVO_")}
    return {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **mine, **more}


def _work(
    rank: int,
    size: int,
    home: Path,
    env: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(home / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), stream)
    torch.set_num_threads(1)
    torch.manual_seed(1337)
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{home}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
    try:
        result = function(*args)
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    (home / f"result-{rank}").write_bytes(pickle.dumps(result))
    if size > 1:
        dist.destroy_process_group()
