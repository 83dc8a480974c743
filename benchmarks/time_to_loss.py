"""How long until a validation loss of 1.88: `recipe: modern` beside nanoGPT's and nanochat's.

Tiny Shakespeare by characters, at the shape of nanoGPT's recipe for CPUs (4 layers, 4 heads, width
128, context 64), eager, fp32. nanoGPT is its model, optimizer, schedule and batches of 12 random
windows, over as many steps as it wants: of --theirs, the first number whose run ends at the loss.
Ours is what `octavo train` does with --ours steps. With --nanochat a clone of nanochat takes part:
its model of that shape and its optimizer with its schedules on our batches, at its rates as they
are written, which its own scaling to so small a batch would divide by 26, and without weight decay.
Each run is a process of its own, they take turns, and the clock stands still while code is compiled
and the 384 validation windows are scored.

    python benchmarks/time_to_loss.py --nanogpt CLONE --nanochat CLONE --text FILE --record
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import record

TARGET, WINDOWS, BATCH = 1.88, 384, 12
SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "d_model": 128}
LR, MIN_LR, WARMUP, BETAS, DECAY, CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0  # nanoGPT's
NANOCHAT_RATES = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02, "scalar_lr": 0.5}
OURS = ["recipe=modern", "data.sampling=random", "train.compile=false", "train.device=cpu"]


def learner(text: Path, words: list[str]) -> Any:
    """Our learner as `octavo train` builds it."""
    import tempfile

    import torch

    from octavo.config import load_config
    from octavo.training.display import Display
    from octavo.training.learner import build_learner
    from octavo.training.task import prepare

    shape = [f"model.{name}={value}" for name, value in SHAPE.items()]
    data = [f"data.source={json.dumps(str(text))}", "data.tokenizer=char"]
    config = load_config(None, [*data, *shape, f"eval.windows={WINDOWS}", *words])
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(config, "cpu", Path(folder) / "run")
    return build_learner(task, torch.device("cpu"), Display(quiet=True))


def octavo_run(asked: argparse.Namespace) -> tuple[float, float]:
    """Loss and seconds of one of our runs."""
    from octavo.training.keeper import validate
    from octavo.training.learner import optimizer_step

    words = [f"train.seed={asked.seed}", f"train.max_steps={asked.steps}", *OURS, *asked.words]
    ours = learner(asked.text, words)
    seconds = clocked(lambda: optimizer_step(ours), asked.steps)
    return validate(ours).loss, seconds


def nanogpt_run(asked: argparse.Namespace) -> tuple[float, float]:
    """Loss and seconds of one run of nanoGPT's recipe, its model and its optimizer."""
    import numpy as np
    import torch

    from octavo.evaluating.perplexity import score_windows
    from octavo.exchanging.nanogpt import NANOGPT
    from octavo.exchanging.weights import build

    same = ["model.position=learned", "model.norm=layernorm", "model.mlp=gelu"]
    ours = learner(asked.text, [*same, f"train.seed={asked.seed}"])
    model = peers.to_nanogpt(ours.model, asked.nanogpt)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        optimizer = model.configure_optimizers(DECAY, LR, BETAS, "cpu")
    tokens = torch.from_numpy(np.asarray(ours.task.batches.tokens).astype(np.int64))
    torch.manual_seed(asked.seed)
    done = 0

    def step() -> None:
        nonlocal done
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_lr(done, asked.steps)
        starts = torch.randint(len(tokens) - 64, (BATCH,))
        x = torch.stack([tokens[start : start + 64] for start in starts])
        y = torch.stack([tokens[start + 1 : start + 65] for start in starts])
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

    seconds = clocked(step, asked.steps)
    learned = build(NANOGPT, ours.task.config.model, model.state_dict(), "nanoGPT")
    return score_windows(learned.eval(), *ours.task.val, None).loss, seconds


def nanochat_run(asked: argparse.Namespace) -> tuple[float, float]:
    """Loss and seconds of one run of nanochat's recipe."""
    import numpy as np
    import torch

    os.environ["NANOCHAT_DTYPE"] = "float32"
    sys.path.insert(0, str(asked.nanochat))
    from nanochat.gpt import GPT, GPTConfig

    ours = learner(asked.text, ["data.sampling=random", f"train.seed={asked.seed}"])
    heads = {"n_head": SHAPE["n_head"], "n_kv_head": SHAPE["n_head"], "n_layer": SHAPE["n_layer"]}
    sizes = {"sequence_len": SHAPE["block_size"], "n_embd": SHAPE["d_model"], "vocab_size": 65}

    def new() -> tuple[Any, Any]:
        torch.manual_seed(asked.seed)
        with torch.device("meta"):
            model = GPT(GPTConfig(**heads, **sizes, window_pattern="L"))
        model.to_empty(device="cpu")
        model.init_weights()
        return model, model.setup_optimizer(**NANOCHAT_RATES)

    def step(model: Any, optimizer: Any, done: int) -> None:
        rate, momentum = nanochat_schedules(done, asked.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"] = momentum
        x, y = ours.task.batches.rows(done * BATCH, BATCH)
        model(torch.from_numpy(x), torch.from_numpy(y)).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        step(*new(), 0)  # its optimizer compiles its steps
        model, optimizer = new()
    counter = itertools.count()
    seconds = clocked(lambda: step(model, optimizer, next(counter)), asked.steps)
    x, y = (torch.from_numpy(np.asarray(of, np.int64)) for of in ours.task.val)
    with torch.no_grad():
        return model(x, y).item(), seconds


def nanochat_schedules(step: int, steps: int) -> tuple[float, float]:
    """Its share of the rates, and Muon's momentum."""
    falling = round(0.65 * steps)
    since = max(step - (steps - falling), 0) / falling
    rate = (step + 1) / 40 if step < 40 else 1 - 0.95 * since
    momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 - 0.07 * since
    return rate, momentum


def nanogpt_lr(step: int, steps: int) -> float:
    """nanoGPT's warmup and cosine."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / (steps - WARMUP)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * share)) * (LR - MIN_LR)


def clocked(step: Callable[[], Any], steps: int) -> float:
    """Seconds that so many steps took."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - started


def one(asked: argparse.Namespace, who: str, seed: int, lengths: list[int]) -> dict[str, float]:
    """The first of ``lengths`` at whose end the loss is reached, or else the last."""
    found: dict[str, float] = {}
    for steps in lengths:
        words = [sys.executable, __file__, *sys.argv[1:]]
        words += ["--one", who, "--seed", str(seed), "--steps", str(steps)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        print(
            f"seed {seed}: {who:<8} {steps:>5} steps  {found['loss']:.4f}  {found['seconds']:.1f} s"
        )
        if found["loss"] <= TARGET:
            break
    return found


def results(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Mean and extremes over the seeds of steps, loss and seconds, and of the ratio of seconds."""
    columns = [
        (f"{who}: {what}", [run[what] for run in of], unit)
        for who, of in runs.items()
        for what, unit in (("steps", "steps"), ("loss", "nats a token"), ("seconds", "s"))
    ]
    for who in (who for who in runs if who != "octavo"):
        pairs = zip(runs["octavo"], runs[who], strict=True)
        ratio = [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]
        columns.append((f"seconds, octavo / {who}", ratio, "×"))
    return [
        record.row(what, unit, *of) | {"value": statistics.mean(of)} for what, of, unit in columns
    ]


RUNS = {"octavo": octavo_run, "nanoGPT": nanogpt_run, "nanochat": nanochat_run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--nanochat", type=Path, help="a clone of nanochat")
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare")
    parser.add_argument("--ours", type=int, nargs="+", default=[300])
    parser.add_argument("--theirs", type=int, nargs="+", default=[2000, 3000, 4000, 5000])
    parser.add_argument("--chats", type=int, nargs="+", default=[300, 400, 500, 600])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--words", nargs="*", default=[], help="settings of ours")
    parser.add_argument("--record", action="store_true")
    for name, kind in (("--one", str), ("--seed", int), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        loss, seconds = RUNS[asked.one](asked)
        print(json.dumps({"loss": loss, "seconds": seconds, "steps": asked.steps}))
        return
    lengths = {"octavo": asked.ours, "nanoGPT": asked.theirs}
    lengths |= {"nanochat": asked.chats} if asked.nanochat else {}
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in lengths}
    for seed in asked.seeds:
        for who, of in runs.items():
            of.append(one(asked, who, seed, lengths[who]))
    found = results(runs)
    for row in found:
        print(f"{row['what']:<28} {row['value']:>10.4g} {row['unit']}")
    reached = all(run["loss"] <= TARGET for of in runs.values() for run in of)
    print(f"{TARGET} nats reached by every run" if reached else f"not every run reached {TARGET}")
    if asked.record:
        versions = record.versions("octavo", "torch")
        versions["nanoGPT"] = peers.version_of(asked.nanogpt)
        if asked.nanochat:
            versions["nanochat"] = peers.version_of(asked.nanochat)
        written = {"name": "time-to-loss", "machine": record.machine(), "versions": versions}
        written |= {"command": record.command(), "rounds": len(asked.seeds), "reached": reached}
        print(record.write(written | {"results": found}).name)


if __name__ == "__main__":
    main()
