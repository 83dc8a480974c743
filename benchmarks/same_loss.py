"""How soon one recipe comes to the loss at which another ends, each by the clock.

    python benchmarks/same_loss.py gpt2-124m.yaml modern-124m.yaml --text PATH --minutes 10 --record
    python benchmarks/same_loss.py nanogpt-char.yaml modern-char.yaml --text FILE --minutes 4

The first has all of the time; the loss of its best checkpoint, in bits a byte, is the target. The
other is given a sixteenth of the time, then an eighth and so on, until it comes to the target. Each
is the whole command, from start to exit, and anneals to the end of its time. Where there are
several GPUs, all of them train.
"""

import argparse
import sys
from collections.abc import Iterator

import budget
import record
import torch
from measure import finish


def command(recipe: str, asked: argparse.Namespace) -> list[str]:
    """`octavo train`, with a process for each GPU."""
    gpus = torch.cuda.device_count()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    words = [sys.executable, *(torchrun if gpus > 1 else []), "-m", "octavo", "train"]
    return [*words, recipe, asked.text, *asked.words]


def runs(asked: argparse.Namespace, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The run that sets the target, then the other recipe's until one comes to it."""
    first = budget.run(command(asked.target, asked), asked.minutes, seed)
    yield asked.target, first
    for halvings in range(asked.halvings, -1, -1):
        found = budget.run(command(asked.recipe, asked), asked.minutes / 2**halvings, seed)
        yield asked.recipe, found
        if found["bits"] <= first["bits"]:
            return
    raise SystemExit(f"{asked.recipe} does not come to {first['bits']:.4f} bits a byte in the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="the recipe that has all of the time")
    parser.add_argument("recipe", help="the one that is to come to its loss sooner")
    parser.add_argument("--name", default="124m", help="what the record is called")
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--halvings", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--words", nargs="*", default=[], help="settings for both")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    ends: dict[str, list[dict[str, float]]] = {asked.target: [], asked.recipe: []}
    for seed in asked.seeds:
        last = {}
        for recipe, found in runs(asked, seed):
            print(f"seed {seed}  {recipe:<20} {found}", flush=True)
            last[recipe] = found
        for recipe, found in last.items():
            ends[recipe].append(found)
    rows = [
        record.row(f"{recipe}: {what}", unit, *(found[what] for found in of))
        for recipe, of in ends.items()
        for what, unit in (("bits", "bits a byte"), ("steps", "steps"), ("seconds", "s"))
    ]
    pairs = zip(ends[asked.recipe], ends[asked.target], strict=True)
    shares = [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]
    rows.append(record.row(f"seconds, {asked.recipe} / {asked.target}", "×", *shares))
    facts = {"versions": record.versions("octavo", "torch"), "rounds": len(asked.seeds)}
    finish(f"same-loss-{asked.name}", asked, rows, facts)


if __name__ == "__main__":
    main()
