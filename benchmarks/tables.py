"""Tables and pictures from the records: `python benchmarks/tables.py` rewrites README and docs.

Whatever stands between ``<!-- record: NAME -->`` and ``<!-- end -->`` is replaced by the newest
``records/NAME-PROCESSOR-DATE.json`` as a table; after ``<!-- record: NAME on PROCESSOR -->`` by the
newest of that processor. A test fails while pages and records differ.
"""

import json
import re
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
MARKED = re.compile(
    r"(<!-- record: (?P<name>[\w-]+)(?: on (?P<on>[\w-]+))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def newest(name: str, records: Path = RECORDS, on: str | None = None) -> dict[str, Any]:
    """The record of that name with the latest date; FileNotFoundError where there is none.

    ``on`` is the only processor that counts, as file names have it.
    """
    for path in reversed(by_date(records)):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["name"] == name and on in (None, path.stem[len(name) + 1 : -len("-2000-01-01")]):
            return record
    raise FileNotFoundError(f"a page names the record {name!r}; {records} has none of that name")


def by_date(records: Path) -> list[Path]:
    """All records, oldest first: their names end in a date."""
    return sorted(records.glob("*.json"), key=lambda path: (path.stem[-10:], path.stem))


def table(record: dict[str, Any]) -> str:
    """One row a result with its range, and a line that says how it was measured."""
    rows = ["| | | range |", "|---|---:|---:|"]
    for result in record["results"]:
        low, high = figure(result["low"]), figure(result["high"])
        value = f"{figure(result['value'])} {result['unit']}".strip()
        between = f"{low} to {high}" if low != high else ""
        rows.append(f"| {result['what']} | {value} | {between} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rounds = "1 round" if record["rounds"] == 1 else f"{record['rounds']} rounds"
    how = f"{rounds} on {record['machine']}, {versions}: `{record['command']}`"
    return "\n".join([*rows, "", how, ""])


def figure(value: float) -> str:
    """Four digits, or all of a large number's."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def fill(text: str, records: Path = RECORDS) -> str:
    """``text`` with every marked table drawn anew."""
    return MARKED.sub(lambda m: m[1] + table(newest(m["name"], records, m["on"])) + m[4], text)


if __name__ == "__main__":
    from pictures import drawn

    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    for picture, text in drawn().items():
        picture.write_text(text, encoding="utf-8")
