"""Which module asked for an operation: PyTorch's profiler, with ranges around every module.

What runs backward belongs to the module whose forward made its node of the graph; both carry the
node's number. Every microsecond is given to exactly one module and phase, the Python between two
operations too; what no module has is "rest". On a GPU it is the time of the kernels that counts.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from octavo import disk

RANGE, NODE = "octavo:", "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Times:
    """Seconds by (module, "forward" or "backward") and by operation."""

    modules: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def trace(what: Callable[[], Any], model: nn.Module, path: Path | None = None) -> Times:
    """Do ``what`` under the profiler; ``path`` gets a Chrome trace, which Perfetto opens too."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells standard error of itself
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with module_ranges(model), profile(activities=activities) as profiler:
        with record_function(f"{RANGE}rest"):
            what()
        if on_gpu:
            torch.cuda.synchronize()
    if path is not None:
        with tempfile.TemporaryDirectory() as folder:  # where it cannot write it says nothing
            profiler.export_chrome_trace(f"{folder}/trace.json")
            disk.write_atomic(path, Path(folder, "trace.json").read_bytes())
    return attribute(profiler.events() or (), on_gpu)


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a range, as if it were a module of that name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + name):
            return function(*args, **kwargs)

    return call


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """Put a range with its name around every call of every module."""
    modules = {name: module for name, module in model.named_modules() if name}
    for name, module in modules.items():
        module.forward = named(name, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def attribute(events: Iterable[FunctionEvent], on_gpu: bool) -> Times:
    """Give each event's own time, without that of the events in it, to a module and a phase."""
    times = Times()
    places: dict[int, tuple[str, str]] = {}
    made_by: dict[int, str] = {}  # each node of the graph, by its number
    ours = [event for event in events if event.device_type == DeviceType.CPU]
    for event in sorted(ours, key=lambda e: (e.time_range.start, -e.time_range.end)):
        module, phase = places.get(id(event.cpu_parent), ("rest", "forward"))
        if event.name.startswith(RANGE):
            module = event.name.removeprefix(RANGE)
        elif event.name.startswith("Optimizer.step"):
            module = "optimizer"
        elif event.name.startswith(NODE):
            module, phase = made_by.get(event.sequence_nr, "rest"), "backward"
        elif phase == "forward" and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = module
        places[id(event)] = module, phase
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times.modules[module, phase] += own / 1e6
        if event.name.startswith(("aten::", "mkldnn::")):
            times.operations[event.name] += own / 1e6
    return times
