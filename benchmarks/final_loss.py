"""What finished runs of one recipe reached: the last validation of each and their mean.

for seed in 1 2 3; do octavo train nanogpt-char.yaml train.seed=$seed --out runs/$seed; done
python benchmarks/final_loss.py nanogpt-char runs/1 runs/2 runs/3 --record
"""

import argparse
import statistics
from pathlib import Path

from record import machine, row, versions, write

from octavo.reporting.report import read_metrics


def last_validation(run: Path) -> tuple[int, float, str]:
    """The seed, the last validation loss and the name of the text of a finished run."""
    events = read_metrics(run)
    start = next(event for event in events if event["event"] == "start")
    if events[-1]["event"] != "end":
        raise SystemExit(f"{run} is not finished")
    loss = [event["val_loss"] for event in events if event["event"] == "eval"][-1]
    return start["settings"]["train"]["seed"], loss, start["data"]["sha256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    reached = [last_validation(run) for run in args.runs]
    if len({text for _, _, text in reached}) > 1:
        raise SystemExit("the runs learned from different texts")
    losses = [loss for _, loss, _ in reached]
    results = [row(f"seed {seed}", "nats a token", loss) for seed, loss, _ in reached]
    mean = row("mean", "nats a token", *losses) | {"value": statistics.mean(losses)}
    results.append(mean)
    for result in results:
        print(f"{result['what']:<10} {result['value']:.4f} {result['unit']}")
    if args.record:
        record = {"name": f"final-loss-{args.recipe}", "machine": machine()}
        record |= {"versions": versions("octavo", "torch"), "rounds": len(losses)}
        command = f"octavo train {args.recipe}.yaml train.seed=N"
        print(write(record | {"command": command, "text": reached[0][2], "results": results}).name)


if __name__ == "__main__":
    main()
