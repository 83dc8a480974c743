"""What the terminal shows while a model learns: a bar on a terminal, plain lines elsewhere."""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from octavo.errors import ConfigError
from octavo.evaluating.perplexity import Score

PLAIN_INTERVAL = 15.0  # seconds between progress lines where there is no terminal


class Display:
    """Progress with loss, validation, norm, speed, memory and time left; silent when ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._started = self._last_line = time.monotonic()
        self._first_step = 0
        self._val: float | None = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self.console.print(text, markup=False)

    def start(self, step: int, max_steps: int) -> None:
        """Begin at ``step`` of ``max_steps``."""
        self._started = self._last_line = time.monotonic()
        self._first_step = step
        if self.console.is_terminal:
            self._bar = _Bar(
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:.0f} %  ETA"),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=max_steps, completed=step)
            self._bar.start()

    def advance(self, step: int, max_steps: int, values: Mapping[str, Any]) -> None:
        """Show where training stands after a logged step; ``values`` are the log's."""
        facts = "  ".join(facts_of(values, self._val))
        now = time.monotonic()
        if self._bar is not None:
            self._bar.facts = facts
            self._bar.update(self._task, completed=step, total=max_steps)
        elif now - self._last_line > PLAIN_INTERVAL:
            self._last_line = now
            left = (now - self._started) / max(step - self._first_step, 1) * (max_steps - step)
            self.say(f"step {step:,}/{max_steps:,}  {facts}  ETA {clock(left)}")

    def validated(self, step: int, score: Score, best: bool) -> None:
        """Show a validation and keep its loss beside the bar."""
        self._val = score.loss
        figures = f"perplexity {score.perplexity:.2f}"
        if score.bytes:
            figures += f", {score.bits_per_byte:.3f} bits a byte"
        self.say(f"step {step:,}: val {score.loss:.4f} ({figures}){' *best*' if best else ''}")


class _Bar(Progress):
    """A bar with a line of facts under it: both fit 80 columns."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.facts:
            yield Text(self.facts, no_wrap=True, overflow="ellipsis")


def facts_of(values: Mapping[str, Any], val: float | None) -> list[str]:
    """A logged step in words: what matters most first, for a narrow screen cuts the rest."""
    facts = [f"loss {values['loss']:.3f}"]
    facts += [f"val {val:.3f}"] if val is not None else []
    facts += [f"grad norm {values['grad_norm']:.3g}", f"{values['tokens_per_s']:,.0f} tokens/s"]
    facts += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
    return [*facts, f"{values['memory_bytes'] / 1e9:.2f} GB"]


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_of(text: str) -> float:
    """A time as people write it.

    >>> [seconds_of(text) for text in ("90", "15m", "1h30m", "2.5h")]
    [90.0, 900.0, 5400.0, 9000.0]
    """
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text.replace(" ", ""))
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if total := 3600 * hours + 60 * minutes + seconds:
        return total
    raise ConfigError(f"--budget {text} is not a time", fix="write it as 15m, 90s or 1h30m")
