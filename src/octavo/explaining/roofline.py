"""What the parts of a model must compute and move at least, and how fast this machine does either.

The roofline (Williams, Waterman and Patterson 2009): a part that does F operations on B bytes takes
at least F / peak or B / bandwidth seconds, whichever is more. What takes much longer than that is
held up by something else: many small operations, Python, waiting.

Operations are those of `octavo.model.counts`, which they sum to. Bytes are what would move if every
operation read its operands and wrote its result once; what stays in a cache moves less, so small
models can do better than their roof.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.model.counts import flops_per_token
from octavo.model_config import ModelConfig

MOSTLY = 0.3  # of its roof: a part below is held up by neither arithmetic nor memory
MEASURE_SECONDS = 0.5
SIZES = {"cpu": (2048, 1 << 26)}  # a product's rows and columns, numbers to read: beyond any cache
LARGE_SIZES = (8192, 1 << 28)


@dataclass(frozen=True)
class Machine:
    """How fast a machine multiplies matrices and reads memory at best, as measured."""

    device: str
    flops: float
    """Operations a second."""
    bandwidth: float
    """Bytes a second."""

    @property
    def ridge(self) -> float:
        """Operations a byte from which arithmetic is the limit."""
        return self.flops / self.bandwidth

    def seconds(self, work: "Work") -> float:
        """What the work takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)

    def bound(self, work: "Work", seconds: float) -> str:
        """What holds up work that took so long: compute, memory, or overhead, which is neither."""
        if self.seconds(work) < MOSTLY * seconds:
            return "overhead"
        return "compute" if work.flops > self.ridge * work.bytes else "memory"


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes moved at least."""

    flops: float = 0.0
    bytes: float = 0.0


def measure_machine(device: torch.device, dtype: torch.dtype = torch.float32) -> Machine:
    """The best of a second of matrix products in ``dtype`` and of plain reads."""
    rows, numbers = SIZES.get(device.type, LARGE_SIZES)
    matrix = torch.ones(rows, rows, device=device, dtype=dtype)
    product = _best(lambda: matrix @ matrix, device)
    x = torch.ones(numbers, device=device)
    reading = _best(x.sum, device)
    return Machine(device.type, flops=2 * rows**3 / product, bandwidth=4 * numbers / reading)


def training_work(
    config: ModelConfig,
    shape: tuple[int, int],
    passes: int,
    trained: int,
    times: int = 3,
    number: int = 4,
) -> dict[str, Work]:
    """Work by part of a training step: ``passes`` times forward and backward over (B, T) tokens.

    Each product is ``times`` products in training, all of the same three matrices: three, or two
    where the weights are frozen beside adapters. ``trained`` counts the parameters that the
    optimizer moves, ``number`` the bytes of a number in products.
    """
    (B, T), D = shape, config.d_model
    tokens = passes * B * T
    parts = products(config, tokens, passes, T, number=number).items()
    work = {part: Work(times * one.flops, times * one.bytes) for part, one in parts}
    norms = (4 if config.norm_position == "sandwich" else 2) * config.n_layer + 1
    moved = {  # numbers a token, read and written, forward and backward
        "embedding": 4 * D,
        "norms": 5 * D * norms,
        "activation": (8 if config.gated else 5) * config.d_ff * config.n_layer,
        "residual": 2 * 5 * D * config.n_layer,
        "loss": 4 * config.vocab_size,
    }
    work |= {part: Work(0, 4 * tokens * numbers) for part, numbers in moved.items()}
    return work | {"optimizer": Work(0, 4 * 7 * trained)}  # AdamW reads four numbers, writes three


def products(
    config: ModelConfig,
    tokens: int,
    passes: int,
    length: int,
    keys_read: int = 1,
    number: int = 4,
) -> dict[str, Work]:
    """Work by part of reading ``tokens`` tokens forward in so many ``passes``: what multiplies.

    A pass reads every weight once. ``length`` is the context that attention sees; a token reads
    ``keys_read`` keys and values: one, where it shares them with a whole text.
    """
    D, F, V, L = config.d_model, config.d_ff, config.vocab_size, config.n_layer
    heads, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    matrices = 3 if config.gated else 2
    sizes = {  # numbers in the matrices; into and out of them for a token
        "projections": (L * 2 * D * (heads + kv), L * (4 * D + 2 * (heads + kv))),
        "mlp": (L * matrices * D * F, L * matrices * (D + F)),
        "head": (V * D, V + D),
    }
    work = {
        part: Work(2 * tokens * weights, number * (passes * weights + tokens * activations))
        for part, (weights, activations) in sizes.items()
    }
    states = 2 * L * (heads + kv * keys_read)  # queries and what comes of them, keys and values
    work["attention"] = Work(4 * tokens * length * heads * L, number * tokens * states)
    total = sum(part.flops for part in work.values())
    assert total == tokens * flops_per_token(config, length), "the parts are not the whole"
    return work


def _best(what: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call."""

    def whole() -> None:
        what()
        synchronize(device)

    whole()
    best, end = timed(whole), time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < end:
        best = min(best, timed(whole))
    return best


def timed(what: Callable[[], object]) -> float:
    """The seconds it takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
