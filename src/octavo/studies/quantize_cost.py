"""What quantization costs and gives: perplexity, divergence from the original, tokens a second."""

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import ConfigError, OctavoError
from octavo.evaluating.perplexity import strided_windows
from octavo.generating.engine import TorchEngine
from octavo.generating.sampling import Sampling
from octavo.generating.writing import write
from octavo.language_model import LanguageModel, start_ids
from octavo.model.gpt import GPT
from octavo.text.batches import document_mask
from octavo.text.corpus import read_corpus
from octavo.text.token_files import watched
from octavo.training.task import prepare

TOKENS = 16_384  # measured on; of a longer text evenly spread windows
OWN_ROWS, OWN_TOKENS = 16, 64  # texts a model writes where there is none to measure on
BATCH_TOKENS = 4096  # in one pass
LOGITS = 1 << 25  # held at once
SPEED_ROUNDS, SPEED_TOKENS = 5, 64


@dataclass(frozen=True)
class Windows:
    """Inputs and targets (N, T) to measure on; targets of -100 do not count."""

    name: str
    """Where they come from, for people."""
    x: np.ndarray
    y: np.ndarray
    own: bool = False
    """Whether the model wrote them itself: then their perplexity says nothing about a text."""
    eot_id: int | None = None
    """The token beyond which attention may not look back, if there is one."""

    def at(self, rows: slice | np.ndarray) -> "Windows":
        """Some of them."""
        return dataclasses.replace(self, x=self.x[rows], y=self.y[rows])

    @property
    def tokens(self) -> int:
        """How many targets count."""
        return int((self.y != -100).sum())


@dataclass(frozen=True)
class Cost:
    """What a changed model loses against the one it was."""

    loss: float
    """Nats a token."""
    kl: float
    """Kullback-Leibler divergence of its predictions from the original's, nats a token."""
    rise: float
    """Of perplexity, as a share of the original's: 0.01 is one per cent."""


class Judge:
    """Compares models with one original, whose last states on the windows it keeps."""

    def __init__(self, original: GPT, windows: Windows) -> None:
        self.original, self.windows = original, windows
        rows = max(1, BATCH_TOKENS // windows.x.shape[1])
        firsts = range(0, len(windows.x), rows)
        self.batches = [
            (windows.x[first : first + rows], torch.from_numpy(windows.y[first : first + rows]))
            for first in firsts
        ]
        reading = watched(self.batches, len(self.batches), "reading the text to measure on")
        self.states = [self._states(original, *batch) for batch in reading]
        self.loss = math.nan
        self.loss = self.cost(original, "measuring the original").loss

    @torch.inference_mode()
    def _states(self, model: GPT, x: np.ndarray, y: Tensor) -> Tensor:
        """The states (targets that count, D) from which ``model`` predicts."""
        eot_id = self.windows.eot_id
        mask = None if eot_id is None else torch.from_numpy(document_mask(x, eot_id))
        return model.hidden(torch.from_numpy(x), mask=mask)[y != -100]

    @torch.inference_mode()
    def cost(self, model: GPT, doing: str = "") -> Cost:
        """How much worse than the original ``model`` is; ``doing`` is what a progress bar says."""
        nats = kl = 0.0
        chunk = max(1, LOGITS // model.config.vocab_size)
        pairs = list(zip(self.batches, self.states, strict=True))
        for (x, y), wanted in watched(pairs, len(pairs), doing) if doing else pairs:
            states, targets = self._states(model, x, y), y[y != -100]
            parts = (tensor.split(chunk) for tensor in (wanted, states, targets))
            for before, after, target in zip(*parts, strict=True):
                p = self.original.lm_head(before).float().log_softmax(-1)
                q = model.lm_head(after).float().log_softmax(-1)
                nats += F.nll_loss(q, target, reduction="sum").item()
                kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        loss, kl = nats / self.windows.tokens, kl / self.windows.tokens
        # Over texts that the original writes, the loss rises by the divergence.
        rise = kl if self.windows.own else loss - self.loss
        return Cost(loss, kl, math.expm1(rise))


def windows_for(lm: LanguageModel, text: str | None) -> Windows:
    """What to measure ``lm`` on: the file ``text``, else validation windows, else its own words."""
    block_size = lm.config.block_size
    if text:
        ids = lm.tokenizer.encode_array(read_corpus(text).text)
        if len(ids) < 2:
            raise ConfigError("a text to measure on needs at least two tokens", text)
        return _spread(Windows(text, *strided_windows(ids, block_size, block_size)))
    try:
        return _spread(_validation(lm))
    except OctavoError as error:
        return _own_words(lm, error.what)


def _validation(lm: LanguageModel) -> Windows:
    assert lm.run is not None
    if lm.run.config.data.source is None:
        raise ConfigError("it came from elsewhere, without a validation text")
    task = prepare(lm.run.config, "cpu", lm.run.path, lm.run.tokenizer)
    if task.val is None:
        raise ConfigError("it has no validation text")
    return Windows("the run's validation text", *task.val, eot_id=task.mask_id)


def _own_words(lm: LanguageModel, why: str) -> Windows:
    """Texts that the model begins and writes by itself, drawn as it would have them."""
    length = min(OWN_TOKENS, lm.config.block_size)
    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    start = start_ids(tokenizer, None)[-1:] if tokenizer else [0]
    engine = TorchEngine(lm.model, OWN_ROWS, tokenizer.vocab_size if tokenizer else None)
    rows = [list(start) for _ in range(OWN_ROWS)]
    for piece in write(engine, tokenizer, [start], Sampling(), length, n=OWN_ROWS):
        if piece.id is not None:
            rows[piece.row].append(piece.id)
    x = np.zeros((OWN_ROWS, length), dtype=np.int64)
    y = np.full((OWN_ROWS, length), -100, dtype=np.int64)
    for number, row in enumerate(rows):
        x[number, : len(row) - 1], y[number, : len(row) - 1] = row[:-1], row[1:]
    return Windows(f"what the model itself writes ({why})", x, y, own=True)


def _spread(windows: Windows) -> Windows:
    """At most so many windows as hold `TOKENS`, evenly spread."""
    n = len(windows.x)
    most = max(1, TOKENS // windows.x.shape[1])
    return windows.at(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def tokens_per_second(models: Mapping[str, LanguageModel]) -> dict[str, float]:
    """How fast each writes a short greedy text; the best of some rounds in which they take turns.

    The best, because a busy neighbour makes all of them slower, and some of them much more so.
    """
    best = dict.fromkeys(models, math.inf)
    for _, (name, lm) in itertools.product(range(SPEED_ROUNDS), models.items()):
        started = time.perf_counter()
        new = lm.generate_ids([[0]], SPEED_TOKENS, temperature=0.0)[0]
        best[name] = min(best[name], (time.perf_counter() - started) / len(new))
    return {name: 1 / seconds for name, seconds in best.items()}
