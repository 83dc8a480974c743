"""Attention made visible: the weights that fused kernels never write down, computed beside them.

A model takes its attention function as an argument. A `Recorder` is one that computes what another
computes and keeps what every query looked at; the model never learns of it.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo import disk
from octavo.generating.engine import TorchEngine
from octavo.generating.writing import Slot
from octavo.model.attention import Attend, sdpa
from octavo.text.tokenizer import Tokenizer

MOST_SAVED = 256  # tokens of a sample: GPT-2's 144 heads then take a few megabytes


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) (Vaswani et al. 2017) in fp32: (B, H, T, S), each row sums to one.

    ``q`` (B, H, T, E), ``k`` (B, K, S, E). ``mask`` is True where a query may look; None means that
    the queries are the last T of the S tokens and look at none after themselves.
    """
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))
    if mask is None:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


class Recorder:
    """An attention function that appends each call's weights, on the CPU, to ``calls``.

    A model calls it once a layer, so after one pass ``calls`` holds a (B, H, T, S) for each layer.
    """

    def __init__(self, attend: Attend = sdpa, first: int = 0, last: int | None = None) -> None:
        """Compute with ``attend``; keep only the rows of the queries from ``first`` to ``last``."""
        self.attend, self.kept, self.calls = attend, slice(first, last), list[Tensor]()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """What ``attend`` gives, untouched."""
        self.calls.append(attention_weights(q, k, mask)[:, :, self.kept].cpu())
        return self.attend(q, k, v, mask, dropout)


class WatchedEngine:
    """A `TorchEngine` writing one row, and what each token it reads looks at, as it is read.

    ``ids`` are those tokens, at most ``most``, from the first that its window holds. Past
    block_size the window moves on and is read again: what a token looked at first is what counts.
    """

    slots = 1

    def __init__(self, engine: TorchEngine, most: int = MOST_SAVED) -> None:
        self.engine, self.most, self.attend = engine, most, engine.attend
        self.ids: list[int] = []
        self._rows: list[Tensor] = []  # of each token (layers, H, keys), the last key its own
        self._start: int | None = None  # where the first window begins, past a longer prompt's rest
        engine.static = None  # a recorded step would not call on us

    def step(self, slots: list[Slot], most: int = 1) -> list[list[int]]:
        """As the engine's."""
        recorder = Recorder(self.attend)
        self.engine.attend = recorder if len(self._rows) < self.most else self.attend
        drawn = self.engine.step(slots, most)
        start, layers = self.engine.starts[0], self.engine.model.config.n_layer
        self._start = start if self._start is None else self._start
        passes = [recorder.calls[i : i + layers] for i in range(0, len(recorder.calls), layers)]
        for read in passes:
            weights = torch.cat(read)  # (layers, H, T, S)
            T, S = weights.shape[-2:]
            first = start - self._start + S - T  # the first row of the pass
            for row in range(len(self._rows) - first, min(T, self.most - first)):
                self._rows.append(weights[:, :, row, : S - T + row + 1])
        self.ids = slots[0].ids[self._start : self._start + len(self._rows)]
        return drawn

    def release(self, index: int) -> None:
        """As the engine's."""
        self.engine.release(index)

    def weights(self) -> np.ndarray:
        """What each token looked at: (layers, H, T, T) float16, 0 where it could not look."""
        T = len(self._rows)
        square = np.zeros((*self._rows[0].shape[:2], T, T), np.float16)
        for row, weights in enumerate(self._rows):
            square[:, :, row, row + 1 - weights.size(-1) : row + 1] = weights.numpy()
        return square

    def save(self, path: Path, tokenizer: Tokenizer | None) -> None:
        """Write ``attention`` (layers, H, T, T), ``ids`` (T,) and ``tokens`` (T,) as one .npz.

        numpy.load opens it; nothing in it is a pickle. `ResourceError` when the disk refuses.
        """
        tokens = [token_text(tokenizer, token) for token in self.ids]
        arrays = {"ids": np.array(self.ids), "tokens": np.array(tokens, dtype=str)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, attention=self.weights(), **arrays)
        with disk.errors(f"write {path}"):
            path.parent.mkdir(exist_ok=True)
        disk.write_atomic(path, buffer.getvalue())


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    r"""What a token says; bytes that are no whole characters as \xe2\x80, an id as a number."""
    if tokenizer is None:
        return f"{token} "
    return tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
