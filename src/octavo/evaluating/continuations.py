"""How probable continuations are after their contexts: what multiple-choice judges are made of.

Continuations of one context go through the model in one row: the context, then every continuation.
Each sees the context and itself, and stands right after the context, whatever lies between. So the
context is computed once, and only the states that predict a continuation pass through the head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from octavo.adapting.classify import Classifier
from octavo.errors import ConfigError
from octavo.model.gpt import GPT
from octavo.model.kv_cache import CacheView

Request = tuple[Sequence[int], Sequence[int]]
"""The ids of a context and of a continuation, neither empty."""
Row = tuple[tuple[int, ...], list[tuple[int, Sequence[int]]]]
"""A context and the continuations that share it, each after the number of its request."""
Watch = Callable[[int, int], object]
"""Told after each batch how many of how many requests are done; what it raises stops the rest."""

BATCH_TOKENS = {"cpu": 1536}  # in one pass: what a core's cache holds
MANY_TOKENS = 16_384  # on any other device
HEAD_ROWS = 512  # logits held at once: with a large vocabulary they are the largest tensor


@dataclass(frozen=True)
class Likelihoods:
    """What the model thinks of each request."""

    logprobs: np.ndarray
    """(N,) float64: the summed log-probability of the continuation's tokens, in nats."""
    greedy: np.ndarray
    """(N,) bool: whether each of its tokens is the likeliest one."""


@torch.inference_mode()
def continuation_likelihoods(
    model: GPT, requests: Sequence[Request], watch: Watch | None = None
) -> Likelihoods:
    """Score every continuation after its context, each cut as `cut` says.

    The model is put in evaluation mode for as long as it takes.
    """
    was_training = model.training
    model.eval()
    most = BATCH_TOKENS.get(model.tok_emb.weight.device.type, MANY_TOKENS)
    found = Likelihoods(np.zeros(len(requests)), np.ones(len(requests), dtype=bool))
    done = 0
    try:
        for rows in _batches(_share_contexts(requests, model.config.block_size), most):
            _read(model, rows, found)
            done += sum(len(asked) for _, asked in rows)
            if watch is not None:
                watch(done, len(requests))
    finally:
        model.train(was_training)
    return found


def refuse_classifier(model: nn.Module) -> None:
    """Raise `ConfigError` for a model that sorts texts and does not write them."""
    if isinstance(model, Classifier):
        raise ConfigError(
            "a classifier does not write, so no ending is likely to it",
            fix="judge the run it was made from",
        )


def cut(context: Sequence[int], continuation: Sequence[int], block_size: int) -> Request:
    """The last block_size + 1 tokens of both, of which the very last is read by nobody.

    So the context loses its beginning, and a continuation longer than block_size its own: its last
    block_size tokens are scored.
    """
    whole = [*context, *continuation][-(block_size + 1) :]
    kept = min(len(continuation), block_size)
    return whole[:-kept], whole[-kept:]


def _share_contexts(requests: Sequence[Request], block_size: int) -> list[Row]:
    rows: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = {}
    for number, request in enumerate(requests):
        context, continuation = cut(*request, block_size)
        rows.setdefault(tuple(context), []).append((number, continuation))
    return list(rows.items())


def _length(row: Row) -> int:
    context, asked = row
    return len(context) + sum(len(ids) - 1 for _, ids in asked)


def _batches(rows: list[Row], most: int) -> Iterator[list[Row]]:
    """Rows of like length together, ``most`` tokens, the longest first: no memory shows at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=_length, reverse=True):
        if batch and _length(batch[0]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _Branches(CacheView):
    """Where the tokens of such rows stand and what they see; keeps nothing."""

    def __init__(self, positions: Tensor, branches: Tensor) -> None:
        """Take (B, T) each; branch 0 is the context, which all see, and the others are apart."""
        self.positions, self.end = positions, int(positions.max()) + 1
        seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        self.seen = (seen & (positions[:, None, :] <= positions[:, :, None]))[:, None]

    def mask(self) -> Tensor:
        return self.seen

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def commit(self) -> None:
        pass


def _read(model: GPT, rows: list[Row], found: Likelihoods) -> None:
    """Score the continuations of one batch of rows into ``found``."""
    shape = len(rows), max(map(_length, rows))
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    branches = np.full(shape, -1)  # padding: a branch that nobody reads
    states, targets, numbers = [], [], []  # for each scored token: what predicts it, itself, whose
    for at, (context, asked) in enumerate(rows):
        end = length = len(context)
        ids[at, :end], positions[at, :end], branches[at, :end] = context, range(end), 0
        for branch, (number, tokens) in enumerate(asked, 1):
            start, end = end, end + len(tokens) - 1  # the last token predicts nothing
            ids[at, start:end] = tokens[:-1]
            positions[at, start:end] = range(length, length + end - start)
            branches[at, start:end] = branch
            states += [at * shape[1] + column for column in (length - 1, *range(start, end))]
            targets += tokens
            numbers += [number] * len(tokens)
    device = model.tok_emb.weight.device
    on_device = [torch.from_numpy(array).to(device) for array in (ids, positions, branches)]
    hidden = model.hidden(on_device[0], _Branches(*on_device[1:])).flatten(0, 1)
    _add(model, hidden[states], targets, numbers, found)


def _add(
    model: GPT, states: Tensor, targets: list[int], numbers: list[int], found: Likelihoods
) -> None:
    """Add the log-probability of each target after its state (R, D) to its request's."""
    for first in range(0, len(targets), HEAD_ROWS):
        part = slice(first, first + HEAD_ROWS)
        logits = model.lm_head(states[part]).float()
        wanted = logits.gather(1, torch.tensor(targets[part], device=logits.device)[:, None])[:, 0]
        highest = logits.amax(1)
        total = logits.sub_(highest[:, None]).exp_().sum(1)
        logprobs = (wanted - highest - total.log()).cpu().double().numpy()
        np.add.at(found.logprobs, numbers[part], logprobs)
        np.logical_and.at(found.greedy, numbers[part], (wanted == highest).cpu().numpy())
