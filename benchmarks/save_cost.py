"""What saving costs: the share of a run's wall-clock that goes into its checkpoints.

A run of the recipe's own model, optimizer and batch takes a few steps and saves a few times, each
save synced to the disk and hashed as in training; the rest is arithmetic. The worst is assumed:
every validation is the best so far, and saves too. Where a whole step would take too long here,
``--rows`` of it are measured and multiplied; the last row then tells how fast a GPU may be.

    python benchmarks/save_cost.py quickstart.yaml
    python benchmarks/save_cost.py gpt2-124m.yaml --rows 2
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record

from octavo.checkpoint import Run
from octavo.config import Config, load_config
from octavo.language_model import choose_device
from octavo.training.display import Display
from octavo.training.learner import build_learner, optimizer_step
from octavo.training.request import find_recipe
from octavo.training.task import prepare

VOCABULARY = {"char": 100, "gpt2": 50257}  # ids stand for the text: what they say costs nothing


def shortened(recipe: str, ids: Path, rows: int | None) -> tuple[Config, Config]:
    """The recipe as it is, and over random ids, with so many rows a step."""
    config = load_config(find_recipe(recipe))
    size = VOCABULARY.get(config.data.tokenizer, 50257)
    block = config.model.block_size
    np.save(ids, np.random.default_rng(0).integers(0, size, 200 * block, dtype=np.uint16))
    words = [f"data.source={ids}", "data.tokenizer=auto", f"model.vocab_size={size}"]
    words += ["train.compile=false", "eval.windows=1"]
    if rows:
        words += [f"train.micro_batch_size={rows}", "train.grad_accum=1"]
    return config, load_config(find_recipe(recipe), words)


def saves_of(config: Config) -> int:
    """Steps at which the recipe saves when every validation is the best so far."""
    steps, every = config.train.max_steps, (config.checkpoint.every, config.eval.every)
    return len({s for n in every if n for s in range(n, steps + 1, n)} | {steps})


def timed(work: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def measured(recipe: str, rows: int | None, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of the record: a step, a save, and what saves are of the whole."""
    full, config = shortened(recipe, folder / "ids.npy", rows)
    device = choose_device(config.train.device)
    task = prepare(config, device.type, folder / "run")
    learner = build_learner(task, device, Display(quiet=True))
    run = Run.create(folder / "run", task.config)
    scale = full.train.batch_size / config.train.batch_size
    optimizer_step(learner)  # the optimizer's state is made in the first
    steps = [scale * s for s in timed(lambda: optimizer_step(learner), rounds)]

    def save() -> None:
        model, optimizer = learner.tensors()
        run.save(learner.progress.step, model, optimizer, learner.state(), keep=2)
        learner.progress.step += 1  # the same step is not saved twice

    saves = timed(save, rounds)
    size = sum(path.stat().st_size for path in run.checkpoints[-1].iterdir())
    number, total = saves_of(full), full.train.max_steps
    shares = [
        100 * number * save / (number * save + total * step)
        for save, step in (
            (statistics.median(saves), statistics.median(steps)),
            (min(saves), max(steps)),
            (max(saves), min(steps)),
        )
    ]
    least = [19 * number * save / total for save in saves]  # 5 % of saving to 95 % of steps
    part = f", {config.train.batch_size} of its {full.train.batch_size} rows measured"
    return [
        record.row(f"one step on {device.type}{part if rows else ''}", "s", *steps),
        record.row(f"one save, {size / 1e6:,.0f} MB", "s", *saves),
        record.row(f"{number} saves in {total:,} steps, of the wall-clock", "%", *shares),
        record.row("they stay below 5 % while a step takes at least", "s", *least),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--rows", type=int, help="rows of a step that are measured; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/...json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measured(asked.recipe, asked.rows, asked.rounds, Path(folder))
    for result in results:
        low, high = f"{result['low']:.3g}", f"{result['high']:.3g}"
        print(f"{result['what']:<60} {result['value']:>9.4g} {result['unit']} ({low} to {high})")
    if asked.record:
        name = f"save-cost-{Path(asked.recipe).stem}"
        about = {"name": name, "machine": record.machine(), "command": record.command()}
        about["versions"] = record.versions("octavo", "torch", "safetensors")
        print(record.write(about | {"rounds": asked.rounds, "results": results}).name)


if __name__ == "__main__":
    main()
