"""Whole optimizer steps of training: octavo beside nanoGPT, transformers and litgpt.

    python benchmarks/train.py char --nanogpt CLONE --record           (or another of SHAPES)
    python benchmarks/train.py first-step --nanogpt CLONE --rounds 3 --record
    python benchmarks/train.py presets --record             (two tables, from its shapes' records)
    python benchmarks/train.py ratios --record                (one table, from all shapes' records)

At every shape all peers train one GPT-2 (without biases and dropout; AdamW, clipping at 1; eager,
fp32) from the same weights on the same batches. litgpt has no learned positions: it trains the
mini transformer's model (rotary positions, LayerNorm, SwiGLU), and octavo that one beside it,
called rotary. Before anything is timed, every parameter's gradient is compared with ours, in
nanoGPT and litgpt, and the losses of ten steps in all. A peer's share of the matrix product is how
much of the round it would have taken at that rate, by octavo's count of a step's operations: its
MFU, by what this machine is seen to multiply. Its memory is the most that its process held above
what it held before it had a model. A peer that is not installed is named and left out.

At the shape `124m-gpu` all train on a GPU, compiled and in bf16; gradients are compared in fp32.

`first-step` starts the commands that people type and waits for their first optimizer step, with
an empty cache for compiled code and then with what is in it; nanoGPT's validates one batch before.
"""

import functools
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
from first_step import first_steps
from measure import (
    WITNESS,
    ForeignCpu,
    Peers,
    Work,
    finish,
    interval,
    matrix_product,
    measure,
    options,
)
from record import row
from tables import newest
from train_peers import (
    SHAPES,
    STEPS_CHECKED,
    Shape,
    learner,
    litgpt,
    model_config,
    nanogpt,
    octavo_work,
    rival_work,
    transformers,
    writing_work,
)

# How far losses and gradients may differ from ours, as a share of ours.
CLOSE = {"cpu": (1e-4, 1e-5), "cuda": (1e-2, 1e-3)}
ROTARY, WRITING = "octavo, rotary", "octavo, writing"
GPT2 = "transformers.models.gpt2.modeling_gpt2"
PAIRS = [  # of the same mathematics
    ("octavo", "nanoGPT"), ("octavo", "transformers"), (ROTARY, "litgpt, rotary"),
    ("octavo, compiled", "nanoGPT, compiled"), ("octavo, compiled", "nanoGPT"),
]  # fmt: skip
PRESETS = ("tiny", "small", "medium", "large")
PRESET_STEPS, PRESET_ROWS = 10_000, 32  # that its page gives times for


def agree(seen: dict[str, Any], device: str, answers: dict[str, Any]) -> None:
    """Keep the answers; raise unless losses and gradients are ours."""
    near, nearer = CLOSE[device]
    for what, answer in answers.items():
        ours = answers[ROTARY if "rotary" in what else "octavo"]["losses"]
        for step, (loss, expected) in enumerate(zip(answer["losses"], ours, strict=False)):
            if not math.isclose(loss, expected, rel_tol=near):
                raise SystemExit(f"error: loss {loss} of {what} at step {step}, not {expected}")
        if answer["gap"] > nearer:
            raise SystemExit(f"error: a gradient of {what} is {answer['gap']:.2g} away from ours")
    seen.update(answers)
    first, *_, last = answers["octavo"]["losses"]
    gap = max(answer["gap"] for answer in answers.values())
    print(f"losses agree: {first:.4f} at first, {last:.4f} after {STEPS_CHECKED} steps")
    print(f"gradients agree: {gap:.1e} apart at most, as a share of their norm")


def derived(
    shape: Shape, seen: dict[str, Any], pairs: list[tuple[str, str]], figures: dict[str, Any]
) -> list[dict[str, Any]]:
    """Intervals of the ratios, shares of the matrix product, and memory."""
    import torch

    from octavo.model.counts import flops_per_token
    from octavo.training.hardware import peak_flops

    def gigaflops(rotary: bool) -> float:  # of a token, forward and backward
        return 3 * flops_per_token(model_config(shape, rotary)) / 1e9

    found = [interval(f"{a} / {b}, 95 % interval", figures[a], figures[b]) for a, b in pairs]
    product = figures[WITNESS]
    step = shape.rows * shape.block_size * gigaflops(False)
    found.append(
        row("fewest milliseconds of a step", "ms", *(1e3 * step / rate for rate in product))
    )
    data_sheet = peak_flops(torch.device("cuda"), torch.bfloat16) if shape.on_gpu else None
    for what in (what for what, answer in seen.items() if answer["losses"]):
        cost = gigaflops("rotary" in what)
        shares = [rate * cost / of for rate, of in zip(figures[what], product, strict=True)]
        found.append(row(f"{what}, share of the matrix product", "×", *shares))
        if data_sheet:
            mfu = [1e9 * rate * cost / data_sheet for rate in figures[what]]
            found.append(row(f"{what}, MFU by the GPU's data sheet", "×", *mfu))
    memory = {what: answer["memory"] for what, answer in seen.items()}
    found += [row(f"{what}, memory", "MB", most) for what, most in memory.items()]
    return found + [row(f"{a} / {b}, memory", "×", memory[a] / memory[b]) for a, b in pairs]


def contestants(asked: Any, folder: Path) -> Peers:
    """Who takes part at a shape, by name."""
    shape = SHAPES[asked.what]
    ours, theirs = (functools.partial(of, shape) for of in (octavo_work, rival_work))
    eager, compiled = (functools.partial(nanogpt, asked.nanogpt, of) for of in (False, True))
    usual = compiled if shape.on_gpu else eager
    found: dict[str, Callable[[], Work]] = {
        "octavo": functools.partial(ours, False),
        "nanoGPT": functools.partial(theirs, False, "peers", usual),
        "transformers": functools.partial(
            theirs, False, GPT2, functools.partial(transformers, shape.on_gpu)
        ),
    }
    if asked.compiled:
        found["octavo, compiled"] = functools.partial(ours, False, compiled=True)
        found["nanoGPT, compiled"] = functools.partial(theirs, False, "peers", compiled)
    if asked.litgpt or asked.what in PRESETS:
        found[ROTARY] = functools.partial(ours, True)
    if asked.litgpt:
        found["litgpt, rotary"] = functools.partial(theirs, True, "litgpt", litgpt)
    if asked.what in PRESETS:
        found[WRITING] = functools.partial(writing_work, folder / "run")
    chosen = asked.only.split(";") if asked.only else list(found)
    return {name: found[name] for name in chosen}


def at_shape(asked: Any) -> None:
    """Time the peers at one shape."""
    with tempfile.TemporaryDirectory() as temporary:
        peers = contestants(asked, Path(temporary))
        if WRITING in peers:
            new_run(Path(temporary) / "run", SHAPES[asked.what])
        pairs = [(a, b) for a, b in PAIRS if a in peers and b in peers]
        seen: dict[str, Any] = {}
        check = functools.partial(agree, seen, SHAPES[asked.what].device)
        derive = functools.partial(derived, SHAPES[asked.what], seen, pairs)
        measure(f"train-{asked.what}", peers, check, "tokens/s", asked, pairs, derive)


def new_run(path: Path, shape: Shape) -> None:
    """A run of the rotary model, its weights new."""
    from octavo.checkpoint import Run

    ours, _ = learner(shape, rotary=True)
    task = ours.task
    weights = ours.model.state_dict()
    Run.create(path, task.config, task.tokenizer, task.files, weights)


def presets(asked: Any) -> None:
    """The mini transformer's two tables, of sizes and of times, from this processor's records."""
    from octavo.model.counts import count_parameters

    sizes, times, measured = [], [], {}
    for name in PRESETS:
        measured, shape = newest(f"train-{name}", on=record.processor()), SHAPES[name]
        known = {of["what"]: of for of in measured["results"]}
        count = count_parameters(model_config(shape, rotary=True)).total
        sizes.append(row(f"{name}: parameters", "", count))
        at_once = f"{shape.rows} row" + "s" * (shape.rows > 1)
        for what, of in ((f"training, {at_once}", ROTARY), ("writing", WRITING)):
            sizes.append(known[of] | {"what": f"{name}: {what}"})
            sizes.append(known[f"{of}, memory"] | {"what": f"{name}: memory of {what}"})
        tokens = PRESET_STEPS * PRESET_ROWS * shape.block_size
        hours = [tokens / known[ROTARY][rate] / 3600 for rate in ("low", "value", "high")]
        times.append(row(f"{name}: {PRESET_STEPS:,} steps of {PRESET_ROWS} rows", "h", *hours))
    facts = {name: measured[name] for name in ("versions", "rounds", "threads", "noisy")}
    finish("presets-sizes", asked, sizes, facts)
    finish("presets-times", asked, times, facts)


def ratios(asked: Any) -> None:
    """Octavo's speed and memory over nanoGPT's at every shape, from this processor's records."""
    found, measured = [], {}
    for name in (name for name, shape in SHAPES.items() if not shape.on_gpu):
        measured = newest(f"train-{name}", on=record.processor())
        known = {of["what"]: of for of in measured["results"]}
        for what, of in (("tokens/s", "95 % interval"), ("memory", "memory")):
            found.append(known[f"octavo / nanoGPT, {of}"] | {"what": f"{name}: {what}"})
    facts = {name: measured[name] for name in ("versions", "rounds", "threads", "noisy")}
    finish("train-ratios", asked, found, facts)


def first_step(asked: Any) -> None:
    """Seconds to the first step, of both commands."""
    cpu = ForeignCpu([])
    found = first_steps(asked.nanogpt, asked.rounds, asked.threads)
    facts = {"versions": asked.versions, "rounds": asked.rounds, "threads": asked.threads}
    rows = [row(what, "s", *of) for what, of in found.items()]
    finish("first-step", asked, rows, facts, cpu.share())


def is_there(module: str) -> bool:
    """Whether a peer can be imported; if not, that is said."""
    probe = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, check=False
    )
    if probe.returncode:
        print(f"{module} is not here: python -c 'import {module}' fails", flush=True)
    return not probe.returncode


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*SHAPES, "first-step", "presets", "ratios"])
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--compiled", action="store_true", help="compiled steps besides")
    parser.add_argument("--only", help="peers by name, separated by ;")
    asked = parser.parse_args()
    if asked.what in ("presets", "ratios"):
        return (presets if asked.what == "presets" else ratios)(asked)
    if asked.nanogpt is None:
        parser.error("--nanogpt CLONE is needed: git clone https://github.com/karpathy/nanoGPT")
    from peers import version_of  # not above: it imports PyTorch

    asked.versions = record.versions("octavo", "torch", "transformers")
    asked.versions["nanoGPT"] = version_of(asked.nanogpt)
    if asked.what == "first-step":
        return first_step(asked)
    shape = SHAPES[asked.what]
    asked.witness = functools.partial(matrix_product, shape.device)
    asked.litgpt = not shape.on_gpu and is_there("litgpt")
    if asked.litgpt:
        asked.versions |= record.versions("litgpt")
    return at_shape(asked)


if __name__ == "__main__":
    main()
