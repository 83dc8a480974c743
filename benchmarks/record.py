"""A record: what was measured, on what, how. It names no host and no path of the machine."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


def versions(*packages: str) -> dict[str, str]:
    """Python's version and theirs, by name."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **found}


def cpu_model() -> str:
    """The processor by the name its maker gives it."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu_models() -> list[str]:
    """The GPUs, each by its maker's name."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def machine() -> str:
    """Processor, cores, memory and GPUs; no name of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = [f"{os.cpu_count()} cores of {cpu_model()}", f"{memory:.0f} GiB", platform.system()]
    return ", ".join([*known, *gpu_models()])


def command() -> str:
    """What was typed, without the paths of this machine."""
    words = [re.sub(r"[^=]*[/\\\\].*", "PATH", word) for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def row(what: str, unit: str, *values: float) -> dict[str, Any]:
    """One result: the median of its values, and the range they have."""
    middle = statistics.median(values)
    return {"what": what, "value": middle, "unit": unit, "low": min(values), "high": max(values)}


def write(record: dict[str, Any]) -> Path:
    """Write the record as records/NAME-PROCESSOR-DATE.json, of the GPU where there is one."""
    on = re.sub(r"[^a-z0-9]+", "-", next(iter(gpu_models()), cpu_model()).lower()).strip("-")
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{record['name']}-{on}-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
