"""What `octavo plan` foretells beside what then happens, over five small configurations.

For each: the memory of a step, counted and measured; the operations of a token, counted and by
PyTorch's counter; tokens a second and the time of the whole run, foretold by a probe of seconds
and then taken from a real run in a process of its own, from start to report. All as ratios,
foretold over found: 1 is right.

    python benchmarks/plan.py --record
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
from measure import ForeignCpu, finish

SHARED = [
    "data.source=python-docs",
    "eval.windows=64",
    "log.sample_tokens=100",
    "data.tokenizer=char",
]
SMALL = ["model.n_layer=4", "model.n_head=4", "model.d_model=128", "model.block_size=128"]
GPT2 = ["model.position=learned", "model.norm=layernorm", "model.mlp=gelu", "model.bias=true"]
CONFIGURATIONS = {
    "characters, as quickstart": [*SMALL, "train.micro_batch_size=16", "train.max_steps=400"],
    "GPT-2 in small, accumulated": [
        *GPT2, "model.n_layer=6", "model.n_head=6", "model.d_model=384", "model.block_size=256",
        "train.micro_batch_size=4", "train.grad_accum=2", "train.max_steps=30",
    ],
    "16,384 tokens in the vocabulary": [
        *SMALL, "model.vocab_size=16384", "train.micro_batch_size=16", "train.max_steps=60",
    ],
    "dropout": [
        *SMALL, "model.block_size=256", "model.dropout=0.1", "train.micro_batch_size=8",
        "train.max_steps=100",
    ],
    "checkpointed, 12 layers, Muon": [
        *SMALL, "model.n_layer=12", "model.d_model=256", "train.grad_checkpoint=true",
        "train.micro_batch_size=16", "optim.name=muon", "train.max_steps=40",
    ],
}  # fmt: skip
WHAT = ("memory of a step", "operations of a token", "tokens a second", "time of the run")


def ratios(settings: list[str], folder: Path) -> dict[str, float]:
    """Foretold over found, of each of `WHAT`."""
    import torch

    from octavo.config import load_config
    from octavo.reporting.report import read_metrics
    from octavo.studies.plan import make_plan
    from octavo.training.task import prepare

    started = time.monotonic()
    task = prepare(load_config(None, settings), "cpu", folder / "run")
    prepared = time.monotonic() - started
    plan = make_plan(task, torch.device("cpu"), folder, probing=True, prepared=prepared)
    assert plan.measured is not None
    started = time.monotonic()
    words = [sys.executable, "-m", "octavo", "train", "python-docs", *settings]
    subprocess.run([*words, "--out", str(folder / "run"), "--quiet"], check=True)
    took = time.monotonic() - started
    events = [event for event in read_metrics(folder / "run") if event["event"] == "train"]
    speed = statistics.median(event["tokens_per_s"] for event in events)
    return {
        "memory of a step": plan.memory.step / plan.measured.step_bytes,
        "operations of a token": plan.flops_a_token / counted_flops(task.config.model),
        "tokens a second": plan.tokens_per_s / speed,
        "time of the run": plan.seconds / took,
    }


def counted_flops(config: Any) -> float:
    """PyTorch's count of a token's forward pass."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from octavo.model.gpt import GPT

    # The counter knows matrix products, but not the CPU's fused attention.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        GPT(config)(torch.zeros(1, config.block_size, dtype=torch.long))
    return counter.get_total_flops() / config.block_size


def main() -> None:
    """Run, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/...json")
    parser.add_argument("--allow-noise", action="store_true", help="keep, and mark, a noisy result")
    args = parser.parse_args()
    cpu = ForeignCpu([])
    found: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for name, settings in CONFIGURATIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                for what, ratio in ratios([*SHARED, *settings], Path(folder)).items():
                    found.setdefault(f"{what}: {name}", []).append(ratio)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    in_order = sorted(found, key=lambda row: WHAT.index(row.partition(":")[0]))
    results = [record.row(row, "×", *found[row]) for row in in_order]
    facts = {"versions": record.versions("octavo", "torch"), "rounds": args.rounds}
    finish("plan", args, results, facts, cpu.share())


if __name__ == "__main__":
    main()
