"""Records as pictures: horizontal bars in an SVG of a few lines, drawn for light and dark pages."""

from html import escape
from pathlib import Path
from typing import Any

from tables import ROOT, figure, newest

PICTURES = {
    "generate-124m-decode": ("One row of a GPT-2 of 124 M parameters", "tokens/s"),
    "generate-124m-batch-8": ("Eight rows at once, of the same model", "tokens/s"),
    "generate-124m-prefill": ("Reading a prompt of 512 tokens", "tokens/s"),
}
OURS, ROW, LEFT, WIDTH, TOP = "octavo", 26, 214, 720, 52
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1f2328}.quiet{fill:#59636e}.ours{fill:#0072b2}"
    ".theirs{fill:#b8bec6}@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.quiet{fill:#9198a1}"
    ".ours{fill:#56b4e9}.theirs{fill:#565d66}}"
)


def draw(record: dict[str, Any], title: str, unit: str) -> str:
    """One bar for each result in ``unit``, the longest first; ours stand out."""
    rows = [row for row in record["results"] if row["unit"] == unit and "limit" not in row["what"]]
    rows.sort(key=lambda row: -row["value"])
    scale = (WIDTH - LEFT - 90) / rows[0]["value"]
    height = TOP + ROW * len(rows) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}, {unit}</title><style>{STYLE}</style>",
        f'<text x="8" y="20" font-weight="600">{escape(title)}</text>',
        f'<text x="8" y="40" class="quiet">{unit}; {escape(record["machine"])}</text>',
    ]
    for number, row in enumerate(rows):
        y, length = TOP + ROW * number, max(row["value"] * scale, 1)
        kind = "ours" if row["what"].startswith(OURS) else "theirs"
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(row["what"])}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.0f}" height="20" rx="2"/>',
            f'<text x="{LEFT + length + 6:.0f}" y="{y + 15}">{figure(row["value"])}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def drawn() -> dict[Path, str]:
    """Every picture's path and what belongs there."""
    return {
        ROOT / "docs" / "pictures" / f"{name}.svg": draw(newest(name), *labels)
        for name, labels in PICTURES.items()
    }
