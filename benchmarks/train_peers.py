"""The steps of training that `train.py` times: octavo's, and each peer's from the same weights.

Every peer runs in a process of its own, so what it needs is imported there.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import os
import random
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Work, timed

STEPS_CHECKED, NEW_TOKENS = 10, 64
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.99), 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A model's sizes, the rows of its step, the steps of a round, and where it is trained."""

    n_layer: int
    n_head: int
    d_model: int
    block_size: int
    rows: int
    steps: int
    vocab_size: int = 65  # Tiny Shakespeare's characters
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """There steps are compiled, and multiply in bf16."""
        return self.device == "cuda"


SHAPES = {
    "char": Shape(4, 4, 128, 64, rows=12, steps=50),  # nanoGPT's for CPUs
    "seed-char": Shape(4, 4, 128, 128, rows=12, steps=25),  # the seed project's example
    "tiny": Shape(4, 4, 128, 128, rows=32, steps=10),  # the mini transformer's presets
    "small": Shape(6, 8, 256, 256, rows=32, steps=1),
    "medium": Shape(12, 8, 512, 512, rows=4, steps=1),
    "large": Shape(24, 12, 768, 1024, rows=1, steps=1),
    "124m": Shape(12, 12, 768, 1024, rows=1, steps=1, vocab_size=50_304),
    "124m-gpu": Shape(12, 12, 768, 1024, rows=16, steps=10, vocab_size=50_304, device="cuda"),
}


@dataclass(frozen=True)
class Rival:
    """Another's model, how it is trained, and its names for our parameters where they are known."""

    model: Any
    optimizer: Any
    loss: Callable[..., Any]
    names: Mapping[str, str] | None = None


def model_config(shape: Shape, rotary: bool) -> Any:
    from octavo.model_config import ModelConfig

    names = ("n_layer", "n_head", "d_model", "block_size", "vocab_size")
    sizes = {name: getattr(shape, name) for name in names}
    kind = {"position": "rope", "mlp": "swiglu"} if rotary else {"position": "learned"}
    return ModelConfig(**{"norm": "layernorm", "mlp": "gelu"} | kind | sizes)


def learner(shape: Shape, rotary: bool, compiled: bool = False) -> tuple[Any, float]:
    """Our learner as `octavo train` builds it, and the memory this process held before."""
    import torch
    import torch._dynamo  # every optimizer brings it: it is part of no model

    from octavo.config import Config, DataConfig, OptimConfig, TrainConfig
    from octavo.training.display import Display
    from octavo.training.learner import build_learner
    from octavo.training.task import prepare

    optim = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "grad_clip": CLIP}
    train = {"micro_batch_size": shape.rows, "max_steps": 10**6}
    train |= {"compile": compiled or shape.on_gpu, "device": shape.device}
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=model_config(shape, rotary),
            data=DataConfig(source=str(random_text(Path(folder))), tokenizer="char"),
            optim=OptimConfig(**optim, warmup=0, schedule="constant"),
            train=TrainConfig(**train),
        )
        task = prepare(config, shape.device, Path(folder) / "run")
    before = held(shape)
    return build_learner(task, torch.device(shape.device), Display(quiet=True)), before


def random_text(folder: Path) -> Path:
    """Half a million characters of 65 kinds, some more frequent than others."""
    kinds = [chr(ord("!") + i) for i in range(65)]
    path = folder / "text.txt"
    path.write_text("".join(random.Random(1337).choices(kinds, range(1, 66), k=500_000)))
    return path


def octavo_work(shape: Shape, rotary: bool, compiled: bool = False) -> Work:
    """The optimizer step of `octavo train`."""
    from octavo.training.learner import optimizer_step

    ours, before = learner(shape, rotary, compiled)
    return work(shape, lambda: optimizer_step(ours).loss, before)


def rival_work(shape: Shape, rotary: bool, module: str, make: Callable[[Any], Rival]) -> Work:
    """What a plain training script does at each iteration, with a model made of ours.

    Its batches are drawn before: what that costs is ours, not of the script that it stands for.
    ``module`` is where it comes from: imported first, it is no part of the model's memory.
    """
    import torch

    importlib.import_module(module)
    ours, before = learner(shape, rotary)
    rival = make(ours.model)
    gap = gradient_gap(ours, rival) if rival.names else 0.0
    batches = itertools.cycle([batch(ours, step) for step in range(STEPS_CHECKED + 1)])
    autocast = ours.autocast if shape.on_gpu else contextlib.nullcontext
    del ours  # what is no longer there takes no memory

    def step() -> float:
        with autocast():
            value = rival.loss(*next(batches))
        value.backward()
        torch.nn.utils.clip_grad_norm_(rival.model.parameters(), CLIP)
        rival.optimizer.step()
        rival.optimizer.zero_grad(set_to_none=True)
        return value.item()

    return work(shape, step, before, gap)


def batch(ours: Any, step: int) -> list[Any]:
    """Inputs and targets of a step."""
    import torch

    rows = ours.task.config.train.batch_size
    return [
        torch.from_numpy(of).to(ours.device) for of in ours.task.batches.rows(step * rows, rows)
    ]


def gradient_gap(ours: Any, rival: Rival) -> float:
    """How far a parameter's gradient is from ours at most, as a share of its norm; or the loss."""
    from peers import renamed

    x, y = batch(ours, 0)
    loss = ours.loss(ours.model, x, y) / y.numel()
    loss.backward()
    value = rival.loss(x, y)
    value.backward()
    named = ours.model.named_parameters(remove_duplicate=False)
    expected = renamed({name: p.grad for name, p in named}, rival.names or {})
    gaps = [abs(value.item() / loss.item() - 1)]
    for name, p in rival.model.named_parameters():
        if p.requires_grad:
            gaps.append(((p.grad - expected[name]).norm() / expected[name].norm()).item())
    rival.model.zero_grad(set_to_none=True)
    return max(gaps)


def nanogpt(clone: Path, compiled: bool, ours: Any) -> Rival:
    """Its model with its own optimizer and loss."""
    import peers
    import torch

    model: Any = peers.to_nanogpt(ours, clone).to(ours.tok_emb.weight.device)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        optimizer = model.configure_optimizers(DECAY, LR, BETAS, ours.tok_emb.weight.device.type)
    forward = torch.compile(model) if compiled else model
    return Rival(model, optimizer, lambda x, y: forward(x, y)[1], peers.NANOGPT)


def transformers(compiled: bool, ours: Any) -> Rival:
    """GPT2LMHeadModel with PyTorch's AdamW as its defaults are."""
    import peers
    import torch
    import torch.nn.functional as F

    model: Any = peers.to_transformers(ours).to(ours.tok_emb.weight.device).train()
    forward = torch.compile(model) if compiled else model

    def loss(x: Any, y: Any) -> Any:
        return F.cross_entropy(forward(x, use_cache=False).logits.flatten(0, 1), y.flatten())

    return Rival(model, plain_adamw(model), loss)


def litgpt(ours: Any) -> Rival:
    """Its model and its loss, with the optimizer that its recipes name."""
    import peers
    from litgpt.utils import chunked_cross_entropy

    model: Any = peers.to_litgpt(ours)
    optimizer = plain_adamw(model)
    return Rival(model, optimizer, lambda x, y: chunked_cross_entropy(model(x), y), peers.LITGPT)


def plain_adamw(model: Any) -> Any:
    """PyTorch's AdamW; vectors do not decay."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS)


def writing_work(run: Path) -> Work:
    """How fast octavo writes with a model, and the memory it takes for it."""
    from octavo.language_model import load

    before = megabytes("VmRSS")
    lm = load(run, device="cpu")

    def write() -> Any:
        return lm.generate_ids([[0]], max_new_tokens=NEW_TOKENS, temperature=0)

    write()
    answer = {"losses": [], "gap": 0.0, "memory": megabytes("VmHWM") - before}
    return Work(answer, functools.partial(timed, write, NEW_TOKENS * 5, 5))


def work(shape: Shape, step: Callable[[], float], before: float, gap: float = 0.0) -> Work:
    """The losses and the memory of the first steps as the answer, then many steps a round."""
    gc.collect()
    most_held = count_peak(shape)
    losses = [step() for _ in range(STEPS_CHECKED + 1)]
    answer = {"losses": losses, "gap": gap, "memory": most_held() - before}
    tokens = shape.steps * shape.rows * shape.block_size
    return Work(answer, functools.partial(timed, step, tokens, shape.steps))


def held(shape: Shape) -> float:
    """Megabytes of the memory there that this process holds: its own, or its GPU's."""
    import torch

    return torch.cuda.memory_allocated() / 1e6 if shape.on_gpu else megabytes("VmRSS")


def count_peak(shape: Shape) -> Callable[[], float]:
    """What tells the most megabytes that were held from now on."""
    import torch

    if shape.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return lambda: megabytes("VmHWM")


def megabytes(what: str) -> float:
    """Of this process: VmRSS is what it holds, VmHWM the most it held."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6
