"""What a run writes down as it goes: ``metrics.jsonl`` always, TensorBoard and W&B when asked.

One JSON object a line, appended and flushed, so a killed run loses at most a torn last line. What a
full disk refuses waits in memory and is written with the next line.
"""

import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from octavo import disk
from octavo.config import Config, LogConfig
from octavo.errors import MissingExtraError
from octavo.training.sharded import full

Backend = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]
"""To send it the numbers of a step, and to close it."""


class MetricsLog:
    """Appends events to ``metrics.jsonl`` and passes their numbers on to the other backends."""

    def __init__(self, run: Path, config: Config, silent: bool = False) -> None:
        """``silent``: another process writes."""
        self.path = run / "metrics.jsonl"
        written = Path(os.devnull) if silent else self.path
        with disk.errors(f"write {self.path}"):
            self._file = written.open("a", encoding="utf-8")
        if not silent and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self._file.write("\n")  # a killed run's torn line stays torn, and alone
        openers = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
        asked = [] if silent else config.log.to
        self._backends = [openers[name](run, config.log) for name in asked]

    def write(self, event: str, step: int, tokens: int, seconds: float, **values: Any) -> None:
        """Append one event; numbers that JSON cannot hold become null.

        Raises `ResourceError` when the disk refuses.
        """
        line = {"event": event, "step": step, "tokens": tokens, "seconds": round(seconds, 3)}
        line |= {name: _json_safe(value) for name, value in values.items()}
        with disk.errors(f"write {self.path}"):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            disk.failpoint(f"logged-{event}")
        if event in ("train", "eval", "judge"):
            numbers = {
                f"{event}/{name}": float(value)
                for name, value in values.items()
                if isinstance(value, int | float)
            }
            for send, _ in self._backends:
                send(numbers, step)

    def close(self) -> None:
        """Flush everything; the log cannot be written to afterwards."""
        with contextlib.suppress(OSError):  # of a full disk everybody was told before
            self._file.close()
        for _, close in self._backends:
            close()


def _open_tensorboard(run: Path, log: LogConfig) -> Backend:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("track", "log.to: [tensorboard]") from None
    writer = SummaryWriter(str(run / "tensorboard"))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _open_wandb(run: Path, log: LogConfig) -> Backend:
    try:
        import wandb
    except ImportError:
        raise MissingExtraError("track", "log.to: [wandb]") from None
    # The mode is the user's: WANDB_MODE=offline or disabled works as everywhere.
    session = wandb.init(project=log.project, name=log.run_name or run.name, dir=str(run))
    return lambda numbers, step: session.log(numbers, step=step), session.finish


def environment(device: torch.device) -> dict[str, Any]:
    """What the run ran on, for the report and for whoever repeats it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "octavo": octavo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "device": f"{device.type} {name}".strip(),
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def last_event(path: Path) -> str:
    """The kind of the last whole line, or nothing."""
    lines = path.read_bytes().splitlines() if path.exists() else []  # one may end in half a letter
    with contextlib.suppress(IndexError, ValueError, KeyError):
        return json.loads(lines[-1])["event"]
    return ""


def gradient_norms(parameters: Mapping[str, nn.Parameter]) -> tuple[Tensor, dict[str, float]]:
    """The gradient's norm, and by layer, to see where it vanishes or explodes."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norms = _norms(gradients)
    return torch.linalg.vector_norm(norms), _of_layers(gradients, norms)


def weights_before(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the weights that a step is about to change."""
    return {name: p.detach().clone() for name, p in parameters.items() if p.requires_grad}


def layer_updates(
    parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far a step has moved each layer's weights, as a share of their norm ``before`` it.

    About a thousandth is usual; much less learns little, much more is not stable.
    """
    moved = {name: parameters[name].detach() - old for name, old in before.items()}
    sizes, moves = _of_layers(before, _norms(before)), _of_layers(moved, _norms(moved))
    return {layer: move / sizes[layer] for layer, move in moves.items() if sizes[layer]}


def _norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """The norm of each of N tensors, (N,)."""
    return full(torch.stack(torch._foreach_norm([*tensors.values()])))


def _of_layers(names: Iterable[str], norms: Tensor) -> dict[str, float]:
    """The norms (N,) of all tensors of a block together, and of the rest, by their N names."""
    layers: dict[str, list[float]] = {}
    for name, norm in zip(names, norms.tolist(), strict=True):
        parts = name.removeprefix("body.").split(".")  # a classifier's GPT is its body
        layer = ".".join(parts[:2]) if parts[0] == "blocks" else "rest"
        layers.setdefault(layer, []).append(norm)
    return {layer: math.hypot(*group) for layer, group in layers.items()}


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _json_safe(item) for name, item in value.items()}
    return value
