"""The end of a run with a budget: a time, not a step, and how many steps that still allows."""

import contextlib
import time
from collections.abc import Iterator

from octavo.config import TrainConfig

LEAVING = 2.0  # seconds from the last sample to the exit: the report, its pictures, Python's end
DRAFT_SHARE = 0.1  # of a budget, where a draft is trained too


class Deadline:
    """The moment at which a command is to be over, and what must be done before it."""

    def __init__(self, train: TrainConfig, began: float) -> None:
        """``train.budget`` counts from ``began``, a `time.monotonic`."""
        self.end = began + train.budget * (1 - DRAFT_SHARE if train.draft else 1)
        self._lasted: dict[str, float] = {}

    @contextlib.contextmanager
    def lasting(self, what: str) -> Iterator[None]:
        """Remember how long ``what`` takes: it comes again when the run ends."""
        started = time.monotonic()
        yield
        self._lasted[what] = time.monotonic() - started

    def steps_left(self, step_seconds: float, validation: float) -> int:
        """How many steps there is time for; ``validation`` is a guess until there was one."""
        ending = {"validation": validation} | self._lasted
        left = self.end - time.monotonic() - sum(ending.values()) - LEAVING
        return round(max(left, 0.0) / step_seconds)
