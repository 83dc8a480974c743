"""A step's work in two halves, side by side, each on half of a CPU's threads.

PyTorch shares every operation out among all threads, which meet again before the next one, and
each reads what another core wrote. Halves of the rows meet once a step, as two processes' do, and
share one model's memory: up to a sixth more tokens a second on two cores (docs/speed.md).
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from octavo.config import Config

Here = TypeVar("Here")
Beside = TypeVar("Beside")

FEWEST = 256  # tokens of a micro-batch; with fewer, Python's lock costs more than waiting


def goes_in_halves(config: Config, device: str, width: int) -> bool:
    """Whether micro-batches, of ``width`` tokens a row, are halved where threads are even.

    Not with dropout, which both would draw from one generator, and not compiled.
    """
    rows, drops = config.train.micro_batch_size, config.model.dropout or config.lora.dropout
    even = rows % 2 == 0 and rows * width >= FEWEST
    return device == "cpu" and even and not drops and config.train.compile is not True


def side_by_side(here: Callable[[], Here], beside: Callable[[], Beside]) -> tuple[Here, Beside]:
    """What both return, each on as many threads as PyTorch has here.

    An error of either is raised when both have ended, an interruption too.
    """
    threads = torch.get_num_threads()

    def there() -> Beside:
        torch.set_num_threads(threads)  # it holds for the thread that says it
        return beside()

    other = _other_thread(os.getpid()).submit(there)
    try:
        result = here()
    finally:
        wait([other])
    return result, other.result()


@functools.cache
def _other_thread(process: int) -> ThreadPoolExecutor:  # a fork has none of its parent's
    return ThreadPoolExecutor(1)
