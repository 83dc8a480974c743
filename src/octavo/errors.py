"""Errors for people: what went wrong, where, and what to do about it, each with its exit code.

The codes are part of the interface: 0 ok, 1 a bug of ours, 2 configuration or usage, 3 data or
tokenizer, 4 checkpoint, 5 non-finite numbers, 6 resources or network, 7 distributed, 8 a parity or
quality gate refused, 75 preempted and saved.
"""

from typing import Any


class OctavoError(Exception):
    """A failure the user can act on; prints as ``error: what; where; fix``."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__("; ".join(part for part in (what, where, fix) if part))
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.what, self.where, self.fix)


def _again(kind: type[OctavoError], what: str, where: str, fix: str) -> OctavoError:
    """An error that another process raised; subclasses may ask for other arguments."""
    error = kind.__new__(kind)
    OctavoError.__init__(error, what, where, fix)
    return error


class ConfigError(OctavoError, ValueError):
    """A setting, an argument or a path is wrong."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """An optional library is not installed; the message holds the line that installs it."""

    def __init__(self, extra: str, wanted_for: str) -> None:
        super().__init__(
            f"{wanted_for} needs the extra '{extra}'", fix=f'pip install "octavo[{extra}]"'
        )


class DataError(OctavoError, ValueError):
    """A text, a tokenizer or a shard cannot be used."""

    exit_code = 3


class CheckpointError(OctavoError):
    """A checkpoint is damaged, missing or belongs to something else."""

    exit_code = 4


class NonFiniteError(OctavoError, ArithmeticError):
    """Training met NaN or infinity more often than it may."""

    exit_code = 5


class ResourceError(OctavoError):
    """Disk, memory or network ran out."""

    exit_code = 6


class DistributedError(OctavoError):
    """A rank died, hung or disagreed."""

    exit_code = 7


class ParityError(OctavoError):
    """Two implementations that must agree do not."""

    exit_code = 8


class Preempted(OctavoError):  # noqa: N818 - not a failure: the run was saved
    """The run was asked to stop, saved itself and can go on."""

    exit_code = 75


def first_line(error: Exception, otherwise: str = "") -> str:
    """What an error of somebody else's says in its first line; ``otherwise`` where it is silent."""
    return (str(error).splitlines() or [otherwise or type(error).__name__])[0]
