"""Figures as people read them: large numbers with three digits and a unit, rows as lines."""

from collections.abc import Iterable, Sequence

PREFIXES = ("", *"kMGTPEZ")


def size(count: float) -> str:
    """Bytes: 12.3 kB."""
    return _with_unit(count, (" bytes", *(f" {prefix}B" for prefix in PREFIXES[1:])))


def amount(count: float) -> str:
    """A number: 10 B, 153 k."""
    return _with_unit(count, ("", " k", " M", " B", " T"))


def scaled(count: float) -> str:
    """A number before its unit: 12.3 G."""
    return _with_unit(count, tuple(f" {prefix}" for prefix in PREFIXES))


def _with_unit(count: float, units: tuple[str, ...]) -> str:
    power = 0
    while round(count) >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g}{units[power]}"


def aligned(rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    """Rows of cells as lines of equal columns, of which ``sides`` has < or > for each."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]
