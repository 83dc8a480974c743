"""What training survives, counted: kills, full disks, flipped bits, signals; nanoGPT's way beside.

The trials of `tests/faults`, in large numbers: runs killed at random times and at every named point
end with the weights, optimizer and losses of an undisturbed one, to the bit. Then octavo's way of
saving and nanoGPT's, which overwrites its one file in place, save the same tensors (19 MB) in a
loop and are killed at 0.3 to 3 times the time that one save takes.

    python benchmarks/faults.py --kills 1000 --compiled 20 --flips 10000 --stops 100 --saves 100
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
import trials

NUMBERS = 1_600_000  # in the model; twice as many in its optimizer: 19 MB
# The quick start's model, of a tenth of a second a step: the time to stop is measured in steps.
STOPPED = (
    "model.block_size=128", "model.n_layer=4", "model.n_head=4", "model.d_model=128",
    "train.micro_batch_size=16", "train.grad_accum=1", "train.max_steps=12",
)  # fmt: skip
Result = dict[str, Any]


def result(what: str, value: float, unit: str, low: float = 0, high: float = 0) -> Result:
    """One row of the record, printed; without a range the value is its own."""
    print(f"{what:<55} {value:>12,.4g} {unit}", flush=True)
    spread = (low, high) if high else (value, value)
    return {"what": what, "value": value, "unit": unit, "low": spread[0], "high": spread[1]}


def disturbed(asked: argparse.Namespace) -> list[Result]:
    """Runs that are killed, at random and at each point, run out of disk, and bits that flip."""
    rows = []
    for name, count, settings in (
        ("", asked.kills, []),
        ("compiled, ", asked.compiled, ["train.compile=true"]),
    ):
        found = trials.ask({"kills": count}, *settings)["kills"]
        rows += [
            result(f"{name}kill -9 at random times", found["killed"], "kills"),
            result(f"{name}checkpoints lost or torn", found["lost"], "of them"),
            result(f"{name}runs that ended otherwise", found["different"], f"of {found['runs']}"),
            result(f"{name}these kills took", found["trial_seconds"], "s"),
        ]
    found = trials.ask({"points": 1, "flips": asked.flips})
    points, flips = found["points"], found["flips"]
    disks = trials.ask({"full_disks": 1}, "model.d_model=64")["full_disks"]
    return [
        *rows,
        result("kill at every named point", len(points["points"]), "points"),
        result("lost, or ended otherwise", len(points["lost"] + points["different"]), "of them"),
        result("disk full at every 64 KB", len(disks["codes"]), "limits"),
        result("checkpoints lost, or runs that ended otherwise", disks["lost"], "of them"),
        result("bits flipped in checkpoint and shards", flips["flips"], "flips"),
        result("flips that were not found", len(flips["unseen"]), "of them"),
    ]


def stopped(asked: argparse.Namespace) -> list[Result]:
    """From SIGTERM to the end of a process that has saved."""
    found = trials.ask({"stops": asked.stops}, *STOPPED, on_disk=True)["stops"]
    allowed = found["step_and_save_seconds"]
    saved, gone = (
        [a / b for a, b in zip(found[which], allowed, strict=True)]
        for which in ("saved_seconds", "seconds")
    )
    return [
        result("SIGTERM at random times", asked.stops, "signals"),
        result("saved and exited 75", found["codes"].get("75", 0), "of them"),
        result("ended otherwise when they went on", found["different"], "of them"),
        spread("SIGTERM to saved exit, 99th of 100", found["seconds"], "s"),
        spread("SIGTERM to saved, of one step and save, 99th", saved, "x"),
        spread("SIGTERM to the process's end, of them, 99th", gone, "x"),
    ]


def spread(what: str, values: list[float], unit: str) -> Result:
    """The 99th percentile, the least and the most."""
    p99 = statistics.quantiles(values, n=100, method="inclusive")[98]
    return result(what, p99, unit, min(values), max(values))


def saving(count: int, folder: Path) -> list[Result]:
    """The same kills against octavo's way of saving and nanoGPT's."""
    import torch

    from octavo.checkpoint import Run
    from octavo.config import Config

    torch.set_num_threads(1)
    model = {"w": torch.zeros(NUMBERS)}
    optimizer = {"m": torch.zeros(NUMBERS), "v": torch.zeros(NUMBERS)}
    run, file = Run.create(folder / "run", Config()), folder / "ckpt.pt"

    def ours(step: int) -> None:
        model["w"].fill_(step)
        run.save(step, model, optimizer, {}, keep=2)

    def load_ours() -> None:
        saved = run.load()
        saved.model_tensors(), saved.optimizer_tensors()

    def theirs(step: int) -> None:  # as nanoGPT's train.py does
        checkpoint = {"model": model, "optimizer": optimizer, "iter_num": step}
        torch.save(checkpoint, file)

    return [
        result("saves killed, each way", count, "kills"),
        result("octavo: no checkpoint left", lost(ours, load_ours, count), "of them"),
        result(
            "in place, nanoGPT's way: no checkpoint left",
            lost(theirs, lambda: torch.load(file), count),
            "of them",
        ),
    ]


def lost(save: Callable[[int], None], load: Callable[[], object], count: int) -> int:
    """How many of so many kills of a process that saves in a loop leave nothing that loads."""
    draw, failures = random.Random(1337), 0
    save(1)
    started = time.monotonic()
    save(2)
    one = time.monotonic() - started
    for number in range(count):
        pid = trials.fork(lambda first=1000 * (number + 1): endlessly(save, first))
        time.sleep(draw.uniform(0.3 * one, 3 * one))
        os.kill(pid, signal.SIGKILL)
        trials.wait(pid)
        try:
            load()
        except Exception:
            failures += 1
            save(2)  # every trial begins with a good checkpoint
    return failures


def endlessly(save: Callable[[int], None], step: int) -> int:
    while True:
        step += 1
        save(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("kills", 1000), ("compiled", 20), ("flips", 10_000), ("stops", 100)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/...json")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    found = disturbed(asked) + stopped(asked)
    with tempfile.TemporaryDirectory() as folder:
        found += saving(asked.saves, Path(folder))
    found.append(result("all of it took", round(time.monotonic() - started), "s"))
    if asked.record:
        about = {"name": "faults", "machine": record.machine(), "command": record.command()}
        about["versions"] = record.versions("octavo", "torch", "numpy", "safetensors")
        print(record.write(about | {"rounds": 1, "results": found}).name)


if __name__ == "__main__":
    main()
