"""Does a model read further than it was trained to: `octavo eval RUN --lengths`, as a record.

python benchmarks/lengths.py runs/quickstart --record
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import machine, row, versions, write


def results(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One perplexity for each way of stretching and each length of context."""
    return [
        row(f"{way}, context {length}", "", value)
        for way, by_length in found["perplexity"].items()
        for length, value in by_length.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    words = [sys.executable, "-m", "octavo", "eval", str(args.run), "--lengths", "--json"]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    for result in results(found):
        print(f"{result['what']:<32} {result['value']:.4g}")
    if args.record:
        record = {"name": f"lengths-{args.run.name}", "machine": machine(), "rounds": 1}
        record |= {"versions": versions("octavo", "torch"), "tokens": found["tokens"]}
        record |= {"command": f"octavo eval {args.run.name} --lengths"}
        print(write(record | {"results": results(found)}).name)


if __name__ == "__main__":
    main()
