"""What the device could do at best, and how much memory training takes: for MFU and the log.

Model FLOPs utilization (Chowdhery et al. 2022) is the share of the device's peak that the model's
own arithmetic uses: forward and backward passes, attention counted whole, nothing recomputed.
"""

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Iterator

import torch

from octavo.adapting.classify import Classifier
from octavo.config import Config
from octavo.linear import product
from octavo.model.counts import flops_per_token
from octavo.model.gpt import GPT

# Dense peaks in TFLOP/s by the makers' data sheets: 16-bit with fp32 sums, and fp32 without TF32.
# The first name that a device's own contains counts.
PEAKS = {
    "B200": (2250, 75), "GH200": (989, 67), "H200": (989, 67), "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60), "H100": (989, 67), "A100": (312, 19.5), "L40S": (362, 91.6),
    "L40": (181, 90.5), "L4": (121, 30.3), "A10G": (70, 35), "A10": (125, 31.2),
    "A30": (165, 10.3), "V100": (125, 15.7), "T4": (65, 8.1), "RTX A6000": (155, 38.7),
    "RTX 5090": (210, 105), "RTX 4090": (165, 82.6), "RTX 4080": (97, 48.7),
    "RTX 3090": (71, 35.6), "RTX 3080": (60, 29.8), "MI300X": (1307, 163), "MI250X": (383, 47.9),
}  # fmt: skip
SIDE = 768  # of the square matrices that a CPU is measured with


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the device for products of ``dtype``; None where they are not known.

    A GPU's are looked up by its name; a CPU's are measured, once a process, by a matrix product.
    """
    if device.type == "cpu":
        return _measured(dtype, torch.get_num_threads())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = next((peaks for known, peaks in PEAKS.items() if known in name), None)
    return peaks[dtype == torch.float32] * 1e12 if peaks else None


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    """The best of a few products, on ``threads`` threads: what a model could at most come to."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.1:
        started = time.perf_counter()
        product(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * SIDE**3 / best


def step_threads(most: int) -> int:
    """How many CPU threads a step takes: ``most`` (0: all) of those that PyTorch has."""
    has = torch.get_num_threads()
    return min(most or has, has)


@contextlib.contextmanager
def limited_threads(most: int) -> Iterator[None]:
    """Let PyTorch take `step_threads` meanwhile."""
    has, wanted = torch.get_num_threads(), step_threads(most)
    if wanted == has:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(has)


def flops_a_token(model: GPT | Classifier, config: Config, length: int) -> int | None:
    """What training on one token of a row of ``length`` costs; None where parts are frozen.

    Twice the forward pass again for the backward one, which holds only if all of it is trained.
    """
    whole = all(p.requires_grad for p in model.parameters()) and isinstance(model, GPT)
    return 3 * flops_per_token(config.model, length) if whole else None


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once so far: tensors on a GPU, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
