"""The engine a model writes with, opened by itself: its name, its threads and what it reads."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from octavo.generating.native import NativeEngine, choose_threads
from octavo.generating.native_build import source_key
from octavo.generating.writing import Engine
from octavo.language_model import LanguageModel

if TYPE_CHECKING:
    from octavo.generating.engine import TorchEngine


class Opened(NamedTuple):
    """An engine and what is known about it."""

    engine: Engine
    threads: int
    name: str
    """Kind, device, packed weights or -, and version: four words, the last may go on."""
    weights: Iterable[tuple[str, np.ndarray]]
    """Each tensor by name, as the engine reads it; to be gone through once. Tied ones come under
    both names."""

    @property
    def native(self) -> bool:
        """Whether it is the native engine."""
        return self.name.startswith("native")


def open_engine(lm: LanguageModel, slots: int = 1, threads: int | None = None) -> Opened:
    """What the model writes with; ``threads`` are the native engine's, PyTorch has its own.

    Raises `ConfigError` for a model that does not write.
    """
    engine = lm.open_engine(slots)
    if not isinstance(engine, NativeEngine):
        return _opened_torch(engine, lm.weights or "-")
    threads = choose_threads(threads, engine.model.bytes)
    stored = engine.model.tensors.items()
    arrays = ((name, a) for name, s in stored for a in (s.values, s.scale) if a is not None)
    name = f"native cpu {lm.weights or '-'} {source_key()[:8]}"
    engine = NativeEngine(engine.model, slots, engine.vocab, threads)
    return Opened(engine, threads, name, arrays)


def _opened_torch(engine: "TorchEngine", weights: str) -> Opened:
    import torch

    device = engine.model.tok_emb.weight.device
    name = f"torch {device.type} {weights} {torch.__version__}"
    if device.type == "cuda":
        name += f" on {torch.cuda.get_device_name(device)}"
    state = engine.model.state_dict().items()
    arrays = ((n, t.cpu().contiguous().flatten().view(torch.uint8).numpy()) for n, t in state)
    return Opened(engine, torch.get_num_threads(), name, arrays)
