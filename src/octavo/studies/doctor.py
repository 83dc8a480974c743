"""What is slow or wrong, on this machine and with a run, and the one thing to do about it.

Facts are gathered here; `doctor_rules` is what follows from them.
"""

import contextlib
import os
import platform
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.generating.native import usable_cores
from octavo.generating.native_build import NoLibraryError, find_compiler, load_library
from octavo.language_model import choose_device
from octavo.model.counts import count_parameters
from octavo.reporting.report import read_metrics
from octavo.training.hardware import peak_flops, step_threads
from octavo.training.learner import choose_precision
from octavo.training.memory import Conditions, free_memory
from octavo.training.muon import multiplies_bf16

Points = list[tuple[int, float]]
"""Losses in nats a token, by step."""


@dataclass(frozen=True)
class Machine:
    """What a run would stand on; sizes in bytes."""

    device: str
    device_name: str
    torch: str
    threads: int
    cores: int
    load: float
    """Processes that want to run, for each core."""
    instructions: str
    gflops: float
    """Of an fp32 matrix product: measured on a CPU, a GPU's by its name; 0: unknown."""
    half: str
    """The two-byte numbers it is best at: bf16, or fp16 where a GPU would only imitate them."""
    half_gain: float
    """How many times faster a product of these is; below 1: slower, 0: unknown."""
    compiler: str
    """The C++ compiler; empty: none."""
    compile_problem: str
    """Why torch.compile cannot work; empty: nothing is known against it."""
    native_problem: str
    """Why the native engine cannot; empty: it can."""
    unused_gpu: bool
    """An NVIDIA GPU that this PyTorch cannot use."""
    memory_total: int
    memory_free: int
    disk_free: int


@dataclass(frozen=True)
class RunFacts:
    """What a run's settings and metrics say."""

    path: str
    config: Config
    conditions: Conditions
    parameters: int
    tokens_in_text: int
    tokens_seen: int
    seconds: float
    losses: Points
    validations: Points
    skipped: int
    sample: str
    finished: bool

    @property
    def best(self) -> tuple[int, float]:
        """The step and the loss of the best validation; there must be one."""
        return min(self.validations, key=lambda point: point[1])


@dataclass(frozen=True)
class Finding:
    """What is wrong and what to do; where it ``blocks`` nothing can be trained."""

    rule: str
    what: str
    fix: str
    blocks: bool = False


def examine_machine(folder: Path) -> Machine:
    """Look at this machine; ``folder`` is where runs would be written."""
    device = choose_device()
    cuda = device.type == "cuda"
    fp32, half = (peak_flops(device, kind) or 0.0 for kind in (torch.float32, torch.bfloat16))
    compiler, native_problem = "", ""
    with contextlib.suppress(NoLibraryError):
        compiler = find_compiler()[0]
    try:
        load_library()
    except NoLibraryError as reason:
        native_problem = str(reason)
    return Machine(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if cuda else processor(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cores=usable_cores(),
        load=os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0,
        instructions=instruction_set(),
        gflops=fp32 / 1e9,
        half="fp16" if cuda and not multiplies_bf16(device.type) else "bf16",
        half_gain=half / fp32 if fp32 else 0.0,
        compiler=compiler,
        compile_problem=_compile_problem(device.type, compiler),
        native_problem=native_problem,
        unused_gpu=not cuda and Path("/proc/driver/nvidia/version").exists(),
        memory_total=_memory_total(device),
        memory_free=free_memory(device.type),
        disk_free=shutil.disk_usage(folder).free,
    )


def examine_run(run: Run) -> RunFacts:
    """Read what a run has logged; a run that never began has its settings only."""
    events = read_metrics(run.path) if (run.path / "metrics.jsonl").exists() else []
    config, last = run.config, events[-1] if events else {}

    def series(event: str, value: str) -> Points:
        return [
            (e["step"], float(e[value]))
            for e in events
            if e["event"] == event and e.get(value) is not None
        ]

    data = next((e["data"] for e in reversed(events) if e["event"] == "start"), {})
    samples = [e["text"] for e in events if e["event"] == "sample"]
    device = choose_device(config.train.device)
    return RunFacts(
        path=str(run.path),
        config=config,
        conditions=Conditions(
            device.type,
            half=choose_precision(config.train.precision, device) != torch.float32,
            even=step_threads(config.train.threads) % 2 == 0,
        ),
        parameters=count_parameters(config.model).total,
        tokens_in_text=data.get("tokens", 0),
        tokens_seen=last.get("tokens", 0),
        seconds=last.get("seconds", 0.0),
        losses=series("train", "loss"),
        validations=series("eval", "val_loss"),
        skipped=sum(e["event"] == "skip" for e in events),
        sample=samples[-1] if samples else "",
        finished=last.get("event") == "end",
    )


def processor() -> str:
    """The processor by the name its maker gives it."""
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1].strip() if found else platform.processor() or platform.machine()


def instruction_set() -> str:
    """The widest instructions that the native engine has kernels for and this machine knows."""
    flags = set(_cpuinfo().split())
    known = {
        "AVX-512 VNNI": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
        "AVX-512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "AVX2": {"avx2", "fma"},
        "NEON": {"asimd"},
    }
    found = next((name for name, wanted in known.items() if wanted <= flags), "")
    return found or ("NEON" if platform.machine() == "arm64" else "scalar")


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _compile_problem(device: str, compiler: str) -> str:
    if device == "cuda":
        from importlib.util import find_spec

        return "" if find_spec("triton") else "Triton is not installed"
    if not compiler:
        return "there is no C++ compiler"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.exists() else "Python's headers are not installed (Python.h)"


def _memory_total(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def facts_of(run: RunFacts) -> dict[str, Any]:
    """A run's facts as JSON, without its settings and series."""
    told = ("config", "conditions", "losses", "validations", "sample")
    facts = {name: value for name, value in vars(run).items() if name not in told}
    return facts | {
        "last_loss": run.losses[-1][1] if run.losses else None,
        "last_val_loss": run.validations[-1][1] if run.validations else None,
    }
