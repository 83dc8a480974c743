"""What packing costs a trained model: `octavo quantize RUN --to P` for each P, as a record.

python benchmarks/quantize.py runs/quickstart --record
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import machine, row, versions, write

PRECISIONS = ("fp16", "int8", "int4", "auto")


def packed(run: Path, precision: str) -> dict[str, Any]:
    """What `octavo quantize` says of a copy of the run."""
    words = [sys.executable, "-m", "octavo", "quantize", str(run), "--to", precision, "--json"]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def results(precision: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What of perplexity, of the predictions and of the size is different from fp32."""
    values = {
        "perplexity rises by": (found["perplexity"]["rises_percent"], "%"),
        "divergence": (found["kl_nats_per_token"], "nats a token"),
        "times smaller": (found["times_smaller"], "×"),
    }
    return [row(f"{precision}: {what}", unit, value) for what, (value, unit) in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(args.run, Path(folder) / args.run.name))
        for precision in PRECISIONS:
            rows += results(precision, packed(run, precision))
    for each in rows:
        print(f"{each['what']:<36} {each['value']:.6g} {each['unit']}")
    if args.record:
        record = {"name": f"quantize-{args.run.name}", "machine": machine(), "rounds": 1}
        record |= {"versions": versions("octavo", "torch")}
        record |= {"command": f"octavo quantize {args.run.name} --to PRECISION"}
        print(write(record | {"results": rows}).name)


if __name__ == "__main__":
    main()
