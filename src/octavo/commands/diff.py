"""`octavo diff`: what two checkpoints differ in."""

import dataclasses
import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, exactly, print_facts
from octavo.studies.readable import aligned

if TYPE_CHECKING:
    from octavo.explaining.diff import Diff

MOST_ROWS = 20  # tensors, unless --all
WORDS = "A B"
PAGE = """\
What two runs, or two checkpoints of one run, differ in: settings, tokenizers and weights, the most
changed tensor first. A change is |b - a| / |a|.

  octavo diff runs/a runs/b
  octavo diff runs/a/checkpoints/step-00000500 runs/a/checkpoints/step-00001000
  octavo diff runs/my my-hf-directory --json

Of a run its best checkpoint is taken."""


def add_options(option: Option) -> None:
    option("--all", action="store_true", help=f"every tensor, not only the first {MOST_ROWS}")
    option("--json", action="store_true", help="print one JSON object, with every tensor")


def run(args: Namespace, settings: list[str]) -> None:
    a, b = exactly(args.words, WORDS, "octavo diff runs/a runs/b")
    from octavo.explaining.diff import diff

    found = diff(a, b)
    same = {"same_weights": found.same_weights, "identical": found.identical}
    said = "\n".join(_lines(found, None if args.all else MOST_ROWS))
    print_facts(dataclasses.asdict(found) | same, args.json, said)


def _lines(found: "Diff", most: int | None) -> list[str]:
    lines = [f"A  {found.a}", f"B  {found.b}", "", *found.remarks]
    if found.same_weights:
        lines.append(f"weights: identical, all {len(found.changes)} tensors bit for bit")
    elif found.changes:
        lines += _weights(found, most)
    named = {"only in A": found.only_a, "only in B": found.only_b}
    lines += [f"{where}: {_listed(names, most)}" for where, names in named.items() if names]
    lines += [
        f"another shape: {n}, {_shape(a)} and {_shape(b)}" for n, (a, b) in found.shapes.items()
    ]
    lines.append(f"tokenizer: {found.tokenizer}")
    if not found.settings:
        return [*lines, "settings: the same"]
    rows = [(f"  {name}", f"{_value(a)} -> {_value(b)}") for name, (a, b) in found.settings.items()]
    return [*lines, "settings that differ:", *aligned(rows, "<<")]


def _weights(found: "Diff", most: int | None) -> list[str]:
    shown, rows = found.changes[:most], [("  tensor", "change", "|a|", "|b|", "shape")]
    for c in shown:
        norms = f"{c.norm_a:.4g}", f"{c.norm_b:.4g}"
        rows.append((f"  {c.name}", _share(c.relative), *norms, _shape(c.shape)))
    lines = [f"weights: {_share(found.relative)} apart in all", "", *aligned(rows, "<>>><")]
    rest = len(found.changes) - len(shown)
    return [*lines, f"  and {rest:,} more, less changed (--all)"] if rest else [*lines, ""]


def _listed(names: list[str], most: int | None) -> str:
    rest = len(names[most:]) if most else 0
    return ", ".join(names[:most]) + (f" and {rest:,} more (--all)" if rest else "")


def _share(relative: float | None) -> str:
    return "from zero" if relative is None else f"{relative:.2%}" if relative else "0"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _value(value: Any) -> str:
    return value if value and isinstance(value, str) else json.dumps(value)
