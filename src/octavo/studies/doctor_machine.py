"""The doctor's rules about the machine: each a function from its facts to one finding, or None.

What comes first in the list is more urgent.
"""

from octavo.studies.doctor import Finding, Machine
from octavo.studies.plan_remarks import size


def disk_full(machine: Machine) -> Finding | None:
    """Checkpoints need room."""
    if machine.disk_free > 2e9:
        return None
    what = f"{size(machine.disk_free)} are free on the disk"
    return Finding(what, "delete old runs, or name another --out", machine.disk_free < 1e8)


def memory_full(machine: Machine) -> Finding | None:
    """PyTorch alone takes a quarter of a gigabyte."""
    if machine.memory_free > 1e9:
        return None
    what = f"{size(machine.memory_free)} of memory are free"
    return Finding(what, "close other programs", machine.memory_free < 3e8)


def gpu_unused(machine: Machine) -> Finding | None:
    """There is a GPU and a PyTorch that does not see it."""
    if not machine.unused_gpu:
        return None
    what = f"there is an NVIDIA GPU that PyTorch {machine.torch} cannot use"
    return Finding(what, "install PyTorch's CUDA build: pytorch.org/get-started")


def too_many_threads(machine: Machine) -> Finding | None:
    """Threads beyond the cores wait for each other."""
    if machine.device != "cpu" or machine.threads <= machine.cores:
        return None
    what = f"PyTorch uses {machine.threads} threads on {machine.cores} cores"
    return Finding(what, f"export OMP_NUM_THREADS={machine.cores}")


def too_few_threads(machine: Machine) -> Finding | None:
    """Cores that nobody uses."""
    if machine.device != "cpu" or machine.threads >= machine.cores:
        return None
    what = f"PyTorch uses {machine.threads} of {machine.cores} cores"
    return Finding(what, f"export OMP_NUM_THREADS={machine.cores}")


def busy(machine: Machine) -> Finding | None:
    """Others compute here too."""
    if machine.load < 1.5:
        return None
    what = f"{machine.load:.1f} processes want each core"
    return Finding(what, "wait for the others, or stop them: everything is slower")


def no_native_engine(machine: Machine) -> Finding | None:
    """Writing falls back to PyTorch, which is several times slower."""
    if machine.device != "cpu" or not machine.native_problem:
        return None
    what = f"the native engine is not here ({machine.native_problem}), so writing is slow"
    return Finding(what, "install a C++ compiler: apt install g++")


MACHINE_RULES = (
    disk_full,
    memory_full,
    gpu_unused,
    too_many_threads,
    too_few_threads,
    busy,
    no_native_engine,
)
