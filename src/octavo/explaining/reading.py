"""One text through a model, with everything that can be seen on the way.

Of every token: the probability of the next one, its rank, the likeliest alternatives, the entropy;
the same by layer (the logit lens); and what each head looks at. Nothing of it changes the model:
hooks keep the residual stream, a `Recorder` in place of the attention function keeps its weights.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from octavo.adapting.classify import Classifier
from octavo.errors import ConfigError
from octavo.generating.recording import Recorder
from octavo.generating.writing import window_start
from octavo.language_model import LanguageModel
from octavo.model.attention import sdpa
from octavo.model.gpt import GPT
from octavo.text.token_files import watched

ALTERNATIVES = 6  # of each token
ROWS = 64  # positions whose logits are held at once: (rows, V) is the largest array


class Window(NamedTuple):
    """A stretch of the text that is read at once; it gives the answers from ``first`` on.

    Positions before ``first`` are its context only: an earlier window has answered for them.
    """

    start: int
    first: int
    end: int


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model made of N tokens; row t is what it expected after token t.

    The rows of ``probability``, ``rank`` and ``lens_probability`` are about the token that came
    next, so the last row, after which nothing came, holds NaN and 0.
    """

    ids: np.ndarray
    """The text (N,)."""
    windows: list[Window]
    probability: np.ndarray
    """Of the next token (N,)."""
    rank: np.ndarray
    """Of the next token among all, 1 being the likeliest (N,)."""
    entropy: np.ndarray
    """Of the distribution over the next token, in bits (N,)."""
    top_ids: np.ndarray
    """The likeliest next tokens, best first (N, A)."""
    top_probability: np.ndarray
    """Theirs (N, A)."""
    lens_ids: np.ndarray
    """What each layer would say: before the first block, then after each (N, layers + 1)."""
    lens_best: np.ndarray
    """The probability it would give that token (N, layers + 1)."""
    lens_probability: np.ndarray
    """The probability it would give the next token (N, layers + 1)."""
    attention: list[np.ndarray]
    """Of the first tokens of the text: what each looks at, (layers, H, keys) float32. The keys
    begin with its window and end with itself."""

    @property
    def bits(self) -> float:
        """Bits a token of the text but the first; NaN for a single token."""
        return float(-np.log2(self.probability[:-1]).mean()) if len(self.ids) > 1 else math.nan


def windows(length: int, block_size: int) -> list[Window]:
    """How a text of ``length`` tokens is read: as a model that writes it would see it.

    When block_size tokens are full the oldest half is dropped.
    """
    starts = sorted({window_start(end, block_size) for end in range(1, length + 1)})
    ends = [min(start + block_size, length) for start in starts]
    return list(map(Window, starts, [0, *ends], ends))


@torch.inference_mode()
def read(lm: LanguageModel, ids: Sequence[int], most_weights: int = 0) -> Reading:
    """Read ``ids``; attention is kept of the first tokens, ``most_weights`` numbers at most.

    Probabilities are over the tokenizer's vocabulary: padding is never written. Raises
    `ConfigError` for a classifier, an empty text, and ids outside the vocabulary.
    """
    model = lm.model
    vocab = vocab_size(lm)
    if isinstance(model, Classifier):
        raise ConfigError(
            "this model sorts texts: it gives no token a probability",
            fix="octavo attention RUN shows what it looks at",
        )
    check_ids(ids, vocab)
    text = torch.tensor([*ids, ids[0]], device=model.tok_emb.weight.device)
    looked = attended_tokens(lm, len(ids), most_weights)
    plan = windows(len(ids), lm.config.block_size)
    attention: list[np.ndarray] = []
    pieces = _answers(model, text, plan, looked, attention, vocab)
    count = sum(math.ceil((window.end - window.first) / ROWS) for window in plan)
    parts = list(watched(pieces, count, "reading"))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, nothing in (("probability", math.nan), ("rank", 0), ("lens_probability", math.nan)):
        columns[name][-1] = nothing  # the first token, put there, does not really come next
    return Reading(np.array(ids), plan, **columns, attention=attention)


def vocab_size(lm: LanguageModel) -> int:
    """How many ids mean something; a model may have more, as padding."""
    return lm.tokenizer.vocab_size if lm.has_tokenizer else lm.config.vocab_size


def check_ids(ids: Sequence[int], vocab: int) -> None:
    """Refuse an empty text and ids that are no token's."""
    if not len(ids):
        raise ConfigError("the text is empty", fix="give some")
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise ConfigError(
            f"the model has no token {wrong[0]}", f"its vocabulary is 0 to {vocab - 1}"
        )


def attended_tokens(lm: LanguageModel, length: int, most_weights: int) -> int:
    """How many of the first tokens of a text have no more weights in all than ``most_weights``."""
    plan = windows(length, lm.config.block_size)
    keys = np.concatenate([np.arange(w.first, w.end) - w.start + 1 for w in plan])
    weights = np.cumsum(keys) * lm.config.n_layer * lm.config.n_head
    return int((weights <= most_weights).sum())


def _answers(
    model: GPT,
    text: Tensor,
    plan: list[Window],
    looked: int,
    attention: list[np.ndarray],
    vocab: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of a `Reading`, a few rows at a time.

    ``text`` has one token more than are answered for. What the first ``looked`` of them look at is
    appended to ``attention``.
    """
    for window in plan:
        first = window.first - window.start
        recorder = Recorder(first=first, last=looked - window.start)
        attend = recorder if looked > window.first else sdpa
        with _streams(model) as streams:
            model.hidden(text[None, window.start : window.end], attend=attend)
        if recorder.calls:
            weights = torch.cat(recorder.calls).numpy()  # (layers, H, rows, S)
            rows = range(weights.shape[2])
            attention += [weights[:, :, row, : first + row + 1] for row in rows]
        following = text[window.first + 1 : window.end + 1]
        yield from _judge(model, [stream[first:] for stream in streams], following, vocab)


@contextmanager
def _streams(model: GPT) -> Iterator[list[Tensor]]:
    """The residual stream (T, D) before the first block and after each, of the pass made inside."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0][0])

    readers = [*model.blocks, model.norm_f]  # each reads what the one before has left
    hooks = [module.register_forward_pre_hook(keep) for module in readers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _judge(
    model: GPT, streams: list[Tensor], following: Tensor, vocab: int
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of a `Reading`, a few rows at a time, from each layer's stream (T, D).

    Every layer speaks through the final norm and the head: nostalgebraist's logit lens (2020).
    """
    for start in range(0, len(streams[0]), ROWS):
        rows = [stream[start : start + ROWS] for stream in streams]
        wanted = following[start : start + ROWS, None]
        layers = [model.lm_head(model.norm_f(row)).float()[:, :vocab] for row in rows]
        lens = [logits.softmax(-1) for logits in layers]
        best = [p.max(-1) for p in lens]
        of_wanted = torch.cat([p.gather(1, wanted) for p in lens], 1)
        final, logits = lens[-1], layers[-1]
        top = final.topk(min(ALTERNATIVES, vocab))
        columns = {
            "probability": of_wanted[:, -1],
            "rank": 1 + (logits > logits.gather(1, wanted)).sum(1).int(),
            "entropy": -torch.xlogy(final, final).sum(-1) / math.log(2),
            "top_ids": top.indices.int(),
            "top_probability": top.values,
            "lens_ids": torch.stack([b.indices for b in best], 1).int(),
            "lens_best": torch.stack([b.values for b in best], 1),
            "lens_probability": of_wanted,
        }
        yield {name: column.cpu().numpy() for name, column in columns.items()}
