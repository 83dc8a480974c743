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
    """The processor by its maker's name and, as one name has several kinds, by its numbers."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", about, re.MULTILINE))
    if len(found) < 3:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"


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


def processor() -> str:
    """What a record's file is named by: the GPU where there is one, or else the CPU."""
    name = next(iter(gpu_models()), cpu_model())
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(record: dict[str, Any]) -> Path:
    """Write the record as records/NAME-PROCESSOR-DATE.json."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{record['name']}-{processor()}-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
