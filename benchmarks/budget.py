"""The same time, the same text: `octavo train --budget` beside every recipe there is.

Each is the whole command in a process of its own, from start to exit, and each follows the clock:
a recipe's schedule ends with the time too, so it is as good as it can be. nanogpt-char is nanoGPT's
own model and settings. Losses are of the checkpoint that each run leaves as its best, over its own
validation windows.

    python benchmarks/budget.py shakespeare --text FILE --minutes 2 5 --record
    python benchmarks/budget.py shakespeare-core --text FILE --minutes 15 --beside --record

With --beside as many run at a time as there are cores, each on one: what slows the machine then
slows all alike, and a minute buys what one core can do.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from queue import Queue
from typing import Any

import record

from octavo.reporting.report import read_metrics

RECIPES = ["nanogpt-char.yaml", "quickstart.yaml", "s2-tiny.yaml", "s2-small.yaml", "s3.yaml"]
CHOSEN = "octavo train --budget"


def run(words: list[str], minutes: float, seed: int) -> dict[str, float]:
    """Train once; the loss, the steps, and the time, also as a share of what was allowed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [*words, "--budget", f"{minutes}m", "--out", str(out), "--quiet"]
        started = time.perf_counter()
        subprocess.run([*command, f"train.seed={seed}"], check=True)
        seconds = time.perf_counter() - started
        judged = [event for event in read_metrics(out) if event["event"] == "eval"]
    best = min(judged, key=itemgetter("val_loss"))
    found = {"bits": best["val_bpb"], "nats": best["val_loss"], "steps": judged[-1]["step"]}
    return found | {"seconds": seconds, "time": seconds / (60 * minutes)}


def compare(contestants: dict[str, list[str]], minutes: float, asked: Any) -> list[dict[str, Any]]:
    """Train all, and give the rows of the record."""
    places: Queue[list[str]] = Queue()  # where a run may be: what stands before its command
    on_cores = [["taskset", "-c", str(core)] for core in sorted(os.sched_getaffinity(0))]
    for place in on_cores if asked.beside else [[]]:
        places.put(place)

    def trained(who: str, seed: int) -> dict[str, float]:
        place = places.get()
        words = [*place, sys.executable, "-m", "octavo", "train", *contestants[who], *asked.words]
        found = run(words, minutes, seed)
        places.put(place)
        print(f"{minutes:g} min  {who:<24} {found}", flush=True)
        return found

    with ThreadPoolExecutor(places.qsize()) as pool:
        jobs: dict[str, list[Future[dict[str, float]]]] = {who: [] for who in contestants}
        for seed, who in itertools.product(asked.seeds, contestants):  # rivals beside each other
            jobs[who].append(pool.submit(trained, who, seed))
        runs = {who: [job.result() for job in of] for who, of in jobs.items()}
    rows = []
    for who, of in runs.items():
        rows.append(record.row(f"{who}: loss", "bits a byte", *(found["bits"] for found in of)))
        rows.append(record.row(f"{who}: loss", "nats a token", *(found["nats"] for found in of)))
    shares = [found["time"] for found in runs[CHOSEN]]
    rows.insert(2, record.row("its time, of what was allowed", "×", *shares))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="what the text is called in the record")
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 5, 15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--words", nargs="*", default=[], help="settings for all")
    parser.add_argument("--beside", action="store_true", help="each on one core, side by side")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    contestants = {CHOSEN: [asked.text]}
    contestants |= {recipe: [recipe, asked.text] for recipe in asked.recipes}
    for minutes in asked.minutes:
        results = compare(contestants, minutes, asked)
        if asked.record:
            written = {"name": f"budget-{asked.name}-{minutes:g}m", "machine": record.machine()}
            written |= {"versions": record.versions("octavo", "torch")}
            written |= {"command": record.command(), "rounds": len(asked.seeds)}
            print(record.write(written | {"results": results}).name)


if __name__ == "__main__":
    main()
