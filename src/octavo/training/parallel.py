"""Several processes as one run: torchrun starts them, each takes its rows of a step, all agree.

Every process runs the same program. Gradients are summed as one flat buffer after the last
micro-batch, so nothing but the number of processes decides the order of additions. What is written,
validated, sampled, judged and chosen is the first process's work, and its outcome, an error too, is
everybody's. One process alone never opens a socket. Summing does not overlap with computing: that
would save time between GPUs, and cost the fixed order.
"""

import atexit
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from octavo.config import TrainConfig
from octavo.errors import ConfigError, DistributedError, OctavoError
from octavo.training.canonical import VIRTUAL, unflatten

T = TypeVar("T")

TIMEOUT = "OCTAVO_TIMEOUT"  # seconds after which a process that does not answer is given up
# Before the first step is done, while texts are read and code is compiled.
FIRST_TIMEOUT = timedelta(minutes=30)
PATIENCE = timedelta(days=1)  # with the first process, when it saves or judges


def outcome(do: Callable[[], Any]) -> Any:
    """What ``do`` gives, or the error for people that it raises: both can be sent."""
    try:
        return do()
    except OctavoError as error:
        return error


def settled(found: Any) -> Any:
    """What an `outcome` is; raises it where it is an error."""
    if isinstance(found, OctavoError):
        raise found
    return found


@dataclass(frozen=True)
class Ranks:
    """The place of a process among ``size`` of them, and all that they do together."""

    rank: int = 0
    size: int = 1
    patient: Any = None
    """The group for waiting long: without time limit a dead process is noticed, a hung one not."""

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which does what is done once."""
        return self.rank == 0

    def rows(self, first: int, train: TrainConfig) -> tuple[range, int]:
        """Of a step's rows from ``first`` on: where this process's micro-batches begin, and their
        size. Raises `ConfigError` where the rows cannot be shared equally.
        """
        parts = VIRTUAL if train.deterministic == "canonical" else self.size
        self._check(train, parts)
        share = train.batch_size // self.size
        micro = math.gcd(train.batch_size // parts, train.micro_batch_size)
        begin = first + self.rank * share
        return range(begin, begin + share, micro), micro

    def _check(self, train: TrainConfig, parts: int) -> None:
        if parts % self.size:
            raise ConfigError(
                f"the canonical mode runs on 1, 2 or 4 processes, not {self.size}",
                fix="choose torchrun --nproc-per-node 2 or 4, or no train.deterministic",
            )
        if train.batch_size % parts:
            raise ConfigError(
                f"a step's {train.batch_size} rows cannot be shared equally among {parts}",
                f"train.micro_batch_size={train.micro_batch_size} "
                f"train.grad_accum={train.grad_accum}",
                f"make their product a multiple of {parts}",
            )

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place and in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        unflatten(flat, tensors)

    def total(self, number: int) -> int:
        """The sum of every process's number."""
        if self.size == 1:
            return number
        count = torch.tensor(number)
        dist.all_reduce(count)
        return int(count)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.total(int(flag)) > 0

    def stacked(self, tensor: Tensor) -> Tensor:
        """Every process's (N, ...) one after the other, (size N, ...)."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def first(self, do: Callable[[], T]) -> T:
        """What ``do`` gives on the first process, where alone it is called; raises as it does."""
        if self.size == 1:
            return do()
        return settled(self.tell(outcome(do) if self.leads else None))

    def tell(self, what: Any) -> Any:
        """What the first process says, on each."""
        box = [what]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def gather(self, what: Any) -> list[Any]:
        """What each process says, on each."""
        if self.size == 1:
            return [what]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, what, group=self.patient)
        return said

    def check_equal(self, what: str, facts: Any) -> None:
        """Raise `DistributedError` unless ``facts`` are the same everywhere."""
        if any(other != facts for other in self.gather(facts)):
            raise DistributedError(
                f"the processes do not have the same {what}",
                fix="start all of them with the same command, on the same files",
            )

    def hurry(self) -> None:
        """From now on a process that does not answer for OCTAVO_TIMEOUT seconds (60) is lost."""
        if self.size > 1:
            limit = timedelta(seconds=float(os.environ.get(TIMEOUT, "60")))
            dist.distributed_c10d._set_pg_timeout(limit)  # PyTorch has no public name for it


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun has started; `ALONE` where it has not.

    A process group that is there already is used. What goes wrong is said once: by the process
    where it began, while the others end in silence, with exit code 7.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected == 1 and not (dist.is_available() and dist.is_initialized()):
        yield ALONE
        return
    if not dist.is_initialized():
        _meet(device)
    size = dist.get_world_size()
    ranks = Ranks(dist.get_rank(), size, _patient(dist.group.WORLD)) if size > 1 else ALONE
    try:
        yield ranks
    except Exception as error:
        said = _in_one_voice(_explained(error, ranks))
        if said is error:
            raise
        raise said from error


def _meet(device: torch.device) -> None:
    """Open the process group: gloo, and NCCL for what lies on GPUs."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"several processes train on CPUs or CUDA GPUs, not on {device.type}")
    backend = "gloo"
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(
                f"process {local + 1} of this machine has no GPU of its own: there are {there}",
                fix=f"torchrun --nproc-per-node {there}, or train.device=cpu",
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=FIRST_TIMEOUT)
    except (dist.DistError, ValueError) as error:  # the latter: a variable of torchrun's is missing
        reason = str(error).splitlines()[0]
        raise DistributedError(
            f"the processes did not find each other: {reason}",
            fix="start them with torchrun -m octavo train ...",
        ) from error
    atexit.register(dist.destroy_process_group)


@functools.cache
def _patient(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _explained(error: Exception, ranks: Ranks) -> Exception:
    """The same error, but for what a lost connection makes PyTorch say."""
    lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    if isinstance(error, OctavoError) or not (isinstance(error, RuntimeError) and lost):
        return error
    reason = str(error).splitlines()[0].rpartition("] ")[2]
    return DistributedError(
        f"process {ranks.rank} of {ranks.size} lost another one, which ended or hangs: {reason}",
        fix="torchrun names it below; then go on with --resume",
    )


def _in_one_voice(error: Exception) -> BaseException:
    """The error on the process that asks first, on the others an exit without a word."""
    atexit.unregister(dist.destroy_process_group)  # it would wait for who is gone
    key = f"octavo/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with contextlib.suppress(Exception):  # the store may be gone too: better twice than never
        if dist.distributed_c10d._get_default_store().add(key, 1) > 1:
            return SystemExit(error.exit_code if isinstance(error, OctavoError) else 1)
    return error
