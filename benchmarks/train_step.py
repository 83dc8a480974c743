"""Tokens a second of training: octavo beside nanoGPT and transformers, with the same mathematics.

nanoGPT's character model for CPUs (4 layers, 4 heads, width 128, context 64, batch 12; GELU,
LayerNorm, learned positions, no biases, dropout 0; AdamW, clipping at 1), eager, fp32. All three
start from the same weights and read the same batches; their losses, before the first step and
after ten, must agree before anything is timed.

    python benchmarks/train_step.py --nanogpt PATH     # a clone of github.com/karpathy/nanoGPT
"""

import functools
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from measure import Work, measure, options, timed
from record import versions

STEPS_A_ROUND, STEPS_CHECKED = 50, 10
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


def learner() -> Any:
    """Our learner as `octavo train` builds it, with a text of random characters."""
    import torch

    from octavo.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
    from octavo.training.display import Display
    from octavo.training.learner import build_learner
    from octavo.training.task import prepare

    shape = {"block_size": 64, "n_layer": 4, "n_head": 4, "d_model": 128}
    optim = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "grad_clip": CLIP}
    characters = [chr(ord("!") + i) for i in range(65)]  # as many as Tiny Shakespeare's
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(random.Random(1337).choices(characters, range(1, 66), k=500_000)))
        config = Config(
            model=ModelConfig(**shape, position="learned", norm="layernorm", mlp="gelu"),
            data=DataConfig(source=str(text), tokenizer="char"),
            optim=OptimConfig(**optim, warmup=0, schedule="constant"),
            train=TrainConfig(micro_batch_size=12, max_steps=10**6, compile=False, device="cpu"),
        )
        task = prepare(config, "cpu", Path(folder) / "run")
    return build_learner(task, torch.device("cpu"), Display(quiet=True))


def octavo_work() -> Work:
    """The optimizer step of `octavo train`."""
    from octavo.training.learner import optimizer_step

    ours = learner()
    return work(ours, lambda: optimizer_step(ours).loss)


def nanogpt_work(clone: Path) -> Work:
    """What nanoGPT's train.py does at each iteration on a CPU, with its own optimizer."""
    import contextlib
    import os

    ours = learner()
    model = peers.to_nanogpt(ours.model, clone)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        optimizer = model.configure_optimizers(DECAY, LR, BETAS, "cpu")
    return work(ours, stepper(ours, model, optimizer, lambda x, y: model(x, y)[1]))


def transformers_work() -> Work:
    """GPT2LMHeadModel in the same loop, with PyTorch's AdamW as its defaults are."""
    import torch
    import torch.nn.functional as F

    ours = learner()
    model = peers.to_transformers(ours.model).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)

    def loss(x: Any, y: Any) -> Any:
        return F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())

    return work(ours, stepper(ours, model, optimizer, loss))


def stepper(ours: Any, model: Any, optimizer: Any, loss: Callable[..., Any]) -> Callable[[], float]:
    """One optimizer step a call, on our batches; gives the loss before it."""
    import torch

    batch, done = ours.task.config.train.batch_size, 0

    def step() -> float:
        nonlocal done
        x, y = (torch.from_numpy(rows) for rows in ours.task.batches.rows(done * batch, batch))
        done += 1
        value = loss(x, y)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def work(ours: Any, step: Callable[[], float]) -> Work:
    """The losses of the first steps as the answer, then many steps a round."""
    config = ours.task.config
    tokens = STEPS_A_ROUND * config.train.batch_size * config.model.block_size
    losses = [step() for _ in range(STEPS_CHECKED + 1)]
    return Work(losses, functools.partial(timed, step, tokens, STEPS_A_ROUND))


def equal_losses(answers: dict[str, list[float]]) -> None:
    """Raise unless all peers saw the same losses, step by step."""
    reference = answers["octavo"]
    for what, losses in answers.items():
        for step, (loss, expected) in enumerate(zip(losses, reference, strict=True)):
            if not math.isclose(loss, expected, rel_tol=1e-4):
                raise SystemExit(f"error: loss {loss} of {what} at step {step}, not {expected}")
    print(f"losses agree: {reference[0]:.4f} at first, {reference[-1]:.4f} after 10 steps")


if __name__ == "__main__":
    parser = options("tokens a second of training")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    asked = parser.parse_args()
    asked.versions = versions("octavo", "torch", "transformers")
    asked.versions["nanoGPT"] = peers.nanogpt_version(asked.nanogpt)
    contestants = {
        "octavo": octavo_work,
        "nanoGPT": functools.partial(nanogpt_work, asked.nanogpt),
        "transformers": transformers_work,
    }
    measure("train-step", contestants, equal_losses, "tokens/s", asked)
