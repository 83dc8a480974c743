"""Learning rates of `recipe: modern` at several widths and batches: whether the best one moves.

    python benchmarks/rates.py width --text FILE --work DIR --record
    python benchmarks/rates.py batch --text FILE --work DIR --record

Every model is modern-char.yaml's with another width or batch; all see the same number of tokens, so
a batch of twice the rows makes half the steps. Both rates, AdamW's and Muon's, are the one
given. Runs are kept in DIR: finished ones are not made again, stopped ones go on.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import record
from measure import finish

from octavo.reporting.report import read_metrics

RATES = (0.00375, 0.0075, 0.015, 0.03, 0.06)
ROWS, STEPS = 12, 300
SIZES = {"width": (64, 128, 256, 512), "batch": (3, 6, 12, 24, 48)}
LAYERS = {512: 5}
"""Of the widths that have not four: 5 of width 512 are 15.8 M parameters."""


def settings(what: str, size: int) -> list[str]:
    """What makes the model, or the batch, of this size."""
    if what == "batch":
        return [f"train.micro_batch_size={size}", f"train.max_steps={STEPS * ROWS // size}"]
    layers = LAYERS.get(size, 4)
    return [f"model.d_model={size}", f"model.n_head={size // 32}", f"model.n_layer={layers}"]


def loss(what: str, size: int, rate: float, seed: int, asked: Any) -> float:
    """The last validation's, in nats a token."""
    out = asked.work / f"{what}-{size}-{rate:g}-{seed}"
    words = ["modern-char.yaml", asked.text, *settings(what, size)]
    words += [f"optim.lr={rate}", f"optim.muon_lr={rate}", f"train.seed={seed}"]
    words += ["eval.every=10000", "checkpoint.every=10000", "log.sample_every=10000"]
    command = [sys.executable, "-m", "octavo", "train", *words, "--out", str(out), "--quiet"]
    subprocess.run([*command, "--resume"], check=True)  # a finished run is left as it is
    return [event for event in read_metrics(out) if event["event"] == "eval"][-1]["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SIZES)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/...json")
    asked = parser.parse_args()
    rows = []
    for size in asked.sizes or SIZES[asked.what]:
        for rate in asked.rates:
            losses = [loss(asked.what, size, rate, seed, asked) for seed in asked.seeds]
            rows.append(record.row(f"{asked.what} {size}, rate {rate:g}", "nats a token", *losses))
            print(f"{rows[-1]['what']:<28} {rows[-1]['value']:.4f}", flush=True)
    facts = {"versions": record.versions("octavo", "torch"), "rounds": len(asked.seeds)}
    finish(f"rates-{asked.what}", asked, rows, facts)


if __name__ == "__main__":
    main()
