"""Where and with what a model writes. PyTorch is imported only where it has to be asked."""

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.checkpoint import Run
from octavo.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from octavo.generating.native import NativeModel

ENGINES = ("auto", "native", "torch")
GPU_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/kfd")  # a driver's, on Linux


def native_model(
    run: Run, checkpoint: Path, device: str, weights: str | None, engine: str
) -> "NativeModel | None":
    """The weights as the native engine reads them; None where PyTorch is to write.

    That is for adapters that were not packed with their base, for classifiers, on GPUs, and, said
    once, where nothing can be compiled or the model has a part that native.cpp has not. With
    ``engine`` native these are a `ConfigError`.
    """
    wanted = engine == "native"
    if engine == "torch" or not (wanted or on_cpu(device)):
        return None
    finetune, adapted = run.config.finetune, run.config.lora.rank or run.config.finetune.head_only
    if finetune.labels or (adapted and not weights):
        if wanted:
            fix = "octavo merge makes one of an adapter; or leave the engine to octavo"
            raise ConfigError("the native engine writes with plain models", fix=fix)
        return None
    from octavo.generating.native import open_model
    from octavo.generating.native_build import NoLibraryError, load_library

    try:
        load_library()
        return open_model(run, checkpoint, weights)
    except NoLibraryError as reason:
        what = f"the native engine is not here: {reason}"
        if wanted:
            raise ConfigError(what) from None
        tell_once(f"{what}; PyTorch writes, more slowly")
        return None


@functools.cache
def tell_once(what: str) -> None:
    """Print a line on standard error, the first time it is to be said."""
    print(what, file=sys.stderr)


def on_cpu(device: str) -> bool:
    """Whether `choose_device` would take the CPU; PyTorch is asked only where it must be."""
    gpu_there = "torch" in sys.modules or any(map(os.path.exists, GPU_FILES))
    if device == "auto" and gpu_there:
        return choose_device().type == "cpu"
    return device in ("auto", "cpu")


def choose_device(name: str = "auto") -> "torch.device":
    """The device called ``name``; auto takes CUDA, then Apple's MPS, then the CPU."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the device {name!r} cannot be used: {reason}", fix="try cpu") from None
    return device
