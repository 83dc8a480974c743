"""The gate that every model passes on its way in or out: the same logits, text and perplexity.

Both sides run in fp32 on the CPU. Sums taken in another order differ in the last bits, far below
`TOLERANCE`; a dropped bias or an exchanged head lies far above. `ParityError` (exit code 8) where
the gate refuses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import ParityError
from octavo.evaluating.perplexity import Score
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest difference of two logits allowed, as a share of the largest logit; of two perplexities,
as a share of either."""
ROWS, LENGTH = 4, 256  # how much text is compared: enough to see every weight at work
PROMPT, WRITTEN = 8, 32  # the tokens a greedy text begins with, and how many follow at most
REPORT = "nothing was written; please report this with the model's config.json"

Logits = Callable[[Tensor], Tensor]
"""Ids (T,) to the logits (T, V) after each of them."""


@dataclass(frozen=True)
class Reader:
    """Somebody's code that should compute what a model of ours does."""

    name: str
    """E.g. "transformers 5.23.0"."""
    logits: Logits
    tolerance: float = TOLERANCE


class Figures(NamedTuple):
    """What a comparison found."""

    difference: float
    """The largest of two logits, as a share of the largest logit."""
    perplexity: float
    """Ours on the text."""
    perplexity_there: float


def logits_of(model: GPT) -> Logits:
    """A model of ours as what gives logits, on the CPU."""
    device = model.tok_emb.weight.device
    return torch.inference_mode()(lambda ids: model(ids[None].to(device))[0].float().cpu())


def reader_of(library: Any, module: Any, tolerance: float = TOLERANCE) -> Reader:
    """A ``module`` of transformers' kind as a reader, in evaluation mode from now on."""
    module.eval()
    logits = torch.inference_mode()(lambda ids: module(ids[None], use_cache=False).logits[0])
    return Reader(f"{library.__name__} {library.__version__}", logits, tolerance)


def texts_of(rows: np.ndarray) -> Tensor:
    """As many of the ids ``rows`` (N, T + 1) as are compared."""
    return torch.from_numpy(rows[:ROWS, : LENGTH + 1].astype(np.int64))


def compare(ours: Logits, theirs: Reader, texts: Tensor, vocab_size: int | None = None) -> Figures:
    """Hold ``theirs`` against ``ours`` on ``texts`` (N, T + 1) of ids; `ParityError` if it differs.

    Logits of ids from ``vocab_size`` on count in the perplexities only.
    """
    differences, largest, nats = [], [], []
    for text in texts:  # one at a time: a vocabulary of 150,000 makes large rows
        wanted, given = ours(text[:-1]), theirs.logits(text[:-1])
        nats.append([F.cross_entropy(z, text[1:], reduction="sum").item() for z in (wanted, given)])
        wanted, given = wanted[:, :vocab_size], given[:, :vocab_size]
        differences.append((given - wanted).abs().max())
        largest.append(wanted.abs().max())
    n_tokens = texts[:, 1:].numel()
    worst = (torch.stack(differences).max() / torch.stack(largest).max().clamp(min=1e-30)).item()
    if not worst <= theirs.tolerance:
        raise ParityError(
            f"the logits of {theirs.name} differ by {worst:.2g} of the largest, "
            f"{theirs.tolerance:g} is allowed",
            f"on {n_tokens} tokens",
            REPORT,
        )
    here, there = (Score(sum(side), n_tokens, 0).perplexity for side in zip(*nats, strict=True))
    if not math.isclose(here, there, rel_tol=theirs.tolerance):
        raise ParityError(
            f"{theirs.name} finds a perplexity of {there:.6g}, not {here:.6g}", fix=REPORT
        )
    return Figures(worst, here, there)


def prompt_length(block_size: int) -> int:
    """The ids that a greedy text begins with."""
    return max(min(PROMPT, block_size // 2), 1)


def check_greedy(writer: str, logits: Tensor, text: Tensor, begin: int, tolerance: float) -> None:
    """See that what ``writer`` wrote into ``text`` (T,) from ``begin`` on, another would write too.

    At each place the id must be the likeliest by ``logits`` (T, V), or tie with it within the
    tolerance.
    """
    allowed = 2 * tolerance * logits.abs().max()
    logits = logits[begin - 1 : -1]
    behind = logits.amax(dim=1) - logits.gather(1, text[begin:, None])[:, 0]
    if len(wrong := (behind > allowed).nonzero()):
        raise ParityError(
            f"{writer} writes another greedy text", f"from token {int(wrong[0]) + 1} on", REPORT
        )


def compare_greedy(ours: GPT, module: Any, text: Tensor, vocab_size: int, writer: str) -> int:
    """How many tokens a module of transformers writes greedily, as ours would write them, too.

    It goes on where the beginning of ``text`` (T,) ends; ids from ``vocab_size`` on are padding,
    which nobody writes.
    """
    begin = prompt_length(ours.config.block_size)
    room = min(WRITTEN, ours.config.block_size - begin)
    if room < 1:
        return 0
    prompt = text[None, :begin]
    written = module.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=room, do_sample=False
    )[0]
    logits = logits_of(ours)(written)[:, :vocab_size]
    check_greedy(writer, logits, written, begin, TOLERANCE)
    return len(written) - begin


def compare_tokenizers(ours: Tokenizer, theirs: Any, rows: np.ndarray) -> None:
    """See that a tokenizer of transformers reads and writes these ids (N, T) as ours does."""
    for row in rows[:ROWS, :LENGTH].tolist():
        text = ours.decode(row)
        if theirs.decode(row, skip_special_tokens=False) != text:
            raise ParityError("the tokenizers write the same ids as other texts", fix=REPORT)
        if theirs.encode(text, add_special_tokens=False) != ours.encode(text, special=True):
            raise ParityError("the tokenizers give other ids for the same text", fix=REPORT)


def random_rows(vocab_size: int, length: int, tokenizer: Tokenizer | None = None) -> np.ndarray:
    """Ids (ROWS, T + 1) for a model without a text at hand; the same ones every time."""
    allowed = np.arange(vocab_size)
    if tokenizer is not None:
        allowed = np.flatnonzero(tokenizer.byte_lengths())  # text, not special tokens
    rng = np.random.default_rng(0)
    return allowed[rng.integers(len(allowed), size=(ROWS, min(length, LENGTH) + 1))]
