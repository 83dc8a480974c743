"""What the commands share: how options are declared, which run is meant, how figures are shown."""

import json
import os
import sys
from argparse import Action, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from octavo.errors import ConfigError, OctavoError
from octavo.studies.readable import aligned

Option = Callable[..., Action]
"""`ArgumentParser.add_argument`."""
COMMON: dict[str, dict[str, Any]] = {
    "weights": {"metavar": "P", "help": "packed weights: int8, int4, auto or fp16"},
    "base": {"metavar": "RUN", "help": "where an adapter's base is, if it was moved"},
    "device": {"default": "auto", "metavar": "D", "help": "cuda, mps, cpu or auto"},
    "json": {"action": "store_true", "help": "print one JSON object"},
}


def add_common(option: Option, *names: str) -> None:
    """Options that mean the same to every command that has them."""
    for name in names:
        option(f"--{name}", **COMMON[name])


def is_quiet(args: Namespace) -> bool:
    """Whether to print nothing: asked for, or the business of the first of several processes."""
    return args.quiet or os.environ.get("RANK", "0") != "0"


@contextmanager
def said_once() -> Iterator[None]:
    """What is wrong with the words that several processes were given, one on each machine says."""
    try:
        yield
    except OctavoError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(error.exit_code) from error
        raise


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left, on a terminal: call what it gives with (done, of)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def exactly(words: list[str], wanted: str, fix: str = "") -> list[str]:
    """The words typed: one for each that is ``wanted``."""
    if len(words) != len(wanted.split()):
        were = "word was" if len(words) == 1 else "words were"
        what = f"{wanted} are wanted, {len(words)} {were} given"
        raise ConfigError(what, ", ".join(words), fix)
    return words


def one_run(words: list[str]) -> str:
    """The run named, or the newest under runs/."""
    if len(words) > 1:
        raise ConfigError(f"one run is wanted, {len(words)} words were given", ", ".join(words))
    if words:
        return words[0]
    from octavo.checkpoint import newest_run

    run = newest_run("runs")
    if run is None:
        raise ConfigError("no run is named and there is none under runs/", fix="name one")
    print(f"using {run}", file=sys.stderr)
    return str(run)


def print_facts(facts: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """Figures as one JSON object, else as the ``text`` that says them, or as aligned lines."""
    if as_json or text is not None:
        print(json.dumps(facts, ensure_ascii=False) if as_json else text)
        return
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [
                (f"{name}: {part}", number) for part, number in value.items() if number is not None
            ]
        elif isinstance(value, list):
            lines += [("remark", item) for item in value]
        else:
            lines.append((name, value))
    rows = [(name.replace("_", " "), _shown(name, value)) for name, value in lines]
    print("\n".join(aligned(rows, "<<")))


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
