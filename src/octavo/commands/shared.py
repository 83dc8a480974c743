"""What the commands share: how options are declared, which run is meant, how figures are shown."""

import json
import sys
from argparse import Action
from collections.abc import Callable
from typing import Any

from octavo.errors import ConfigError

Option = Callable[..., Action]
"""`ArgumentParser.add_argument`."""


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


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Figures as one JSON object, or as aligned lines."""
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [(f"{name}: {part}", number) for part, number in value.items() if number]
        elif isinstance(value, list):
            lines += [("remark", item) for item in value]
        else:
            lines.append((name, value))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name.replace('_', ' '):<{width}}  {_shown(name, value)}")


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
