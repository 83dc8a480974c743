"""How surprised a model is by a text: nats a token, perplexity, bits per byte.

Sums are kept and divided once. Bits per byte compares models whatever their tokenizers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from octavo.text.batches import document_mask


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood of ``tokens`` tokens that stand for ``bytes`` of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits of information a byte of text; 8 is knowing nothing."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def score_windows(
    model: nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    byte_lengths: np.ndarray | None = None,
    batch_tokens: int = 16_384,
    eot_id: int | None = None,
) -> Score:
    """Score targets ``y`` (N, T) after inputs ``x`` (N, T); targets of -100 do not count.

    ``byte_lengths`` (V,) says how many bytes each token stands for. Every window starts with an
    empty context, so a longer context always scores at least as well. Where ``eot_id`` is given, a
    token sees only its own document.
    """
    nats = float(token_nats(model, x, y, batch_tokens, eot_id).sum(dtype=np.float64))
    counted = y[y != -100]
    n_bytes = int(byte_lengths[counted].sum()) if byte_lengths is not None else 0
    return Score(nats, int(counted.size), n_bytes)


@torch.inference_mode()
def token_nats(
    model: nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    batch_tokens: int = 16_384,
    eot_id: int | None = None,
) -> np.ndarray:
    """Negative log-likelihood of each target, as `score_windows` sums them: (N, T) float32.

    It is 0 where the target is -100.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = max(1, batch_tokens // x.shape[1])
    nats = np.empty(y.shape, dtype=np.float32)
    for first in range(0, len(x), rows):
        inputs = torch.from_numpy(x[first : first + rows]).to(device)
        targets = torch.from_numpy(y[first : first + rows]).to(device)
        masked = {}
        if eot_id is not None:
            mask = document_mask(x[first : first + rows], eot_id)
            masked["mask"] = torch.from_numpy(mask).to(device)
        logits = model(inputs, **masked).flatten(0, 1)
        nll = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
        nats[first : first + rows] = nll.view(targets.shape).cpu().numpy()
    model.train(was_training)
    return nats


def strided_windows(ids: np.ndarray, block_size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of one text in which every token but the first is a target exactly once.

    Each window moves on by ``stride``; what an earlier window has scored is context only, marked
    -100. So every token is seen after at least ``block_size - stride`` others where the text has
    them. Returns (x, y), each (N, block_size) int64, padded with 0 and -100.
    """
    targets = len(ids) - 1
    ends = [*range(min(block_size, targets), targets, stride), targets]
    x = np.zeros((len(ends), block_size), dtype=np.int64)
    y = np.full((len(ends), block_size), -100, dtype=np.int64)
    scored = 0
    for row, end in enumerate(ends):
        start = max(end - block_size, 0)
        x[row, : end - start] = ids[start:end]
        y[row, scored - start : end - start] = ids[scored + 1 : end + 1]
        scored = end
    return x, y
