"""A linear layer that trains as fast on other makers' processors as on Intel's.

PyTorch multiplies fp32 matrices by MKL, which keeps AVX-512 to Intel's processors. oneDNN, which
PyTorch carries too, uses it wherever it is: the same sums, sooner (benchmarks/train.py).
"""

import functools
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ZEN_4 = 25  # AMD's family whose registers of AVX-512 are two halves
LARGE = 2**25  # multiplications a thread, from which a product gains more than asking costs


class Linear(nn.Linear):
    """``nn.Linear``, whose products oneDNN takes in training where that pays."""

    def forward(self, input: Tensor) -> Tensor:  # PyTorch's own name
        """(..., in) to (..., out)."""
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if eager and self.is_exact(input) and onednn_takes(input, self.weight):
            return _Product.apply(input, self.weight, self.bias)
        return super().forward(input)

    def is_exact(self, x: Tensor) -> bool:
        """Whether the layer multiplies ``x`` in fp32, by weights that lie here as a whole."""
        fp32 = x.dtype == self.weight.dtype == torch.float32
        whole = type(self.weight) is nn.Parameter
        return fp32 and whole and not torch.is_autocast_enabled(x.device.type)


@functools.cache
def onednn_pays() -> bool:
    """Whether this is a processor with AVX-512 on which MKL does not use it."""
    has_avx512 = (
        torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    return has_avx512 and amd_family() > 0


@functools.cache
def amd_family() -> int:
    """The processor's, as Linux tells it; 0 where it is not AMD's."""
    cpus = Path("/proc/cpuinfo")
    about = cpus.read_text(encoding="utf-8") if cpus.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)$", about, re.MULTILINE)
    return int(family[1]) if family and "AuthenticAMD" in about else 0


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is oneDNN's: on CPUs in fp32, where it pays."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not onednn_pays():
        return False
    return amd_family() > ZEN_4 or x.numel() * weight.size(0) >= LARGE * torch.get_num_threads()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` (..., in) times ``weight`` (out, in), in whatever order they lie."""
    if onednn_takes(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable  # whose type has lost the names
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows, inputs = gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1))
        # oneDNN has to turn these two round first: on a Zen 4 that is more than it gains.
        multiply = product if amd_family() > ZEN_4 else F.linear
        return (
            product(gradient, weight.t()) if to_x else None,
            multiply(rows.t(), inputs.t()) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )
