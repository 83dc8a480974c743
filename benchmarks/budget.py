"""The same time, the same text: `octavo train --budget` beside every recipe there is.

Each is the whole command in a process of its own, from start to exit, and each follows the clock:
a recipe's schedule ends with the time too, so it is as good as it can be. nanogpt-char is nanoGPT's
own model and settings. Losses are each run's last validation, over its own windows.

    python benchmarks/budget.py shakespeare --text FILE --minutes 2 5 --record
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

from octavo.reporting.report import read_metrics

RECIPES = ["nanogpt-char.yaml", "quickstart.yaml", "s2-tiny.yaml", "s2-small.yaml", "s3.yaml"]
CHOSEN = "octavo train --budget"


def run(words: list[str], minutes: float, seed: int) -> dict[str, float]:
    """Train once; bits a byte, nats a token, and the time as a share of what was allowed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "octavo", "train", *words, "--budget", f"{minutes}m"]
        command += ["--out", str(out), "--quiet", f"train.seed={seed}"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        last = [event for event in read_metrics(out) if event["event"] == "eval"][-1]
    found = {"bits": last["val_bpb"], "nats": last["val_loss"], "steps": last["step"]}
    return found | {"time": seconds / (60 * minutes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="what the text is called in the record")
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 5, 15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--words", nargs="*", default=[], help="settings for all")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    contestants = {CHOSEN: [asked.text]}
    contestants |= {recipe: [recipe, asked.text] for recipe in asked.recipes}
    for minutes in asked.minutes:
        results = []
        for what, words in contestants.items():
            runs = [run([*words, *asked.words], minutes, seed) for seed in asked.seeds]
            for key, unit in (("bits", "bits a byte"), ("nats", "nats a token")):
                results.append(record.row(f"{what}: loss", unit, *(r[key] for r in runs)))
            if what == CHOSEN:
                share = [r["time"] for r in runs]
                results.append(record.row("its time, of what was allowed", "×", *share))
            print(f"{minutes:g} min  {what:<24} {runs}", flush=True)
        if asked.record:
            written = {"name": f"budget-{asked.name}-{minutes:g}m", "machine": record.machine()}
            written |= {"versions": record.versions("octavo", "torch")}
            written |= {"command": record.command(), "rounds": len(asked.seeds)}
            print(record.write(written | {"results": results}).name)


if __name__ == "__main__":
    main()
