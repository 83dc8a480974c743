"""What the terminal shows while a model learns: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from octavo.evaluating.perplexity import Score

PLAIN_INTERVAL = 15.0  # seconds between progress lines where there is no terminal


class Display:
    """Progress with loss, speed, time left and validation; silent when ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = self._last_line = time.monotonic()
        self._first_step = 0
        self._val = ""

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
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
            self._bar = Progress(
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[facts]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=max_steps, completed=step, facts="")
            self._bar.start()

    def advance(self, step: int, max_steps: int, loss: float, tokens_per_s: float) -> None:
        """Show where training stands after a logged step."""
        facts = f"loss {loss:.3f}{self._val}  {tokens_per_s:,.0f} tokens/s"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif now - self._last_line > PLAIN_INTERVAL:
            self._last_line = now
            left = (now - self._started) / max(step - self._first_step, 1) * (max_steps - step)
            self.say(f"step {step:,}/{max_steps:,}  {facts}  ETA {clock(left)}")

    def validated(self, step: int, score: Score, best: bool) -> None:
        """Show a validation and keep its loss beside the bar."""
        self._val = f"  val {score.loss:.3f}"
        figures = f"perplexity {score.perplexity:.2f}"
        if score.bytes:
            figures += f", {score.bits_per_byte:.3f} bits a byte"
        self.say(f"step {step:,}: val {score.loss:.4f} ({figures}){' *best*' if best else ''}")


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
