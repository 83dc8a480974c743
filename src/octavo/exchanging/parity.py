"""The gate that every model passes on its way in or out: the same logits, text and perplexity.

Both sides run in fp32 on the CPU. Sums taken in another order differ in the last bits, far below
`TOLERANCE`; a dropped bias or an exchanged head lies far above. `ParityError` (exit code 8) where
the gate refuses.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.errors import ParityError
from octavo.evaluating.perplexity import score_windows
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest difference of two logits allowed, as a share of the largest logit; of two perplexities,
as a share of either."""
ROWS, LENGTH = 4, 256  # how much text is compared: enough to see every weight at work
PROMPT, WRITTEN = 16, 32  # the tokens a greedy text begins with, and how many follow
REPORT = "nothing was written; please report this with the model's config.json"


@dataclass(frozen=True)
class Parity:
    """What a comparison found."""

    against: str
    """Whose implementation the other one was, e.g. "transformers 5.23.0"."""
    text: str
    """What was compared on."""
    tokens: int
    largest_difference: float
    """Of two logits, as a share of the largest."""
    perplexity: float
    """Ours on that text."""
    perplexity_there: float
    greedy_tokens: int
    """Tokens of greedy text that were equal: all that were written."""


class Stock(nn.Module):
    """A module of transformers that, like ours, takes ids (B, T) and gives logits (B, T, V)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        return self.module(idx, use_cache=False).logits


def compare(
    ours: GPT, module: nn.Module, rows: np.ndarray, text: str, against: str, vocab_size: int
) -> Parity:
    """Hold ``ours`` against a ``module`` of transformers on ``rows`` (N, T + 1) of ids.

    ``text`` names what they are; ids from ``vocab_size`` on are padding, which nobody writes.
    """
    rows = rows[:ROWS, : LENGTH + 1].astype(np.int64)
    x, y = rows[:, :-1], rows[:, 1:]
    stock = Stock(module)
    difference = compare_logits(ours, stock, x)
    here = score_windows(ours, x, y).perplexity
    there = score_windows(stock, x, y).perplexity  # type: ignore[arg-type]
    if not math.isclose(here, there, rel_tol=TOLERANCE):
        raise ParityError(f"the perplexities are {here:.6g} and {there:.6g}", text, REPORT)
    written = compare_greedy(ours, module, x, vocab_size)
    return Parity(against, text, x.size, difference, here, there, written)


@torch.inference_mode()
def compare_logits(ours: GPT, stock: Stock, x: np.ndarray) -> float:
    """The largest difference of logits after ``x`` (N, T), as a share of the largest logit."""
    differences, largest = [], []
    for row in torch.from_numpy(x):  # one at a time: a vocabulary of 150,000 makes large rows
        mine, theirs = ours(row[None]), stock(row[None])
        differences.append((mine - theirs).abs().max().item())
        largest.append(theirs.abs().max().item())
    worst = max(differences) / max(*largest, 1e-30)
    if not all(map(math.isfinite, differences)) or worst > TOLERANCE:
        raise ParityError(
            f"the logits differ by {worst:.2g} of the largest, {TOLERANCE:g} is allowed",
            f"on {x.size} tokens",
            REPORT,
        )
    return worst


@torch.inference_mode()
def compare_greedy(ours: GPT, module: Any, x: np.ndarray, vocab_size: int) -> int:
    """How many tokens the module writes greedily, having seen that ours would write the same.

    Its text is read by our model in one piece: at each place the token it chose must be our
    likeliest, or tie with it within the tolerance.
    """
    prompt = torch.from_numpy(x[:1, : max(min(PROMPT, x.shape[1] // 2), 1)])
    room = min(WRITTEN, ours.config.block_size - prompt.size(1))
    if room < 1:
        return 0
    text = module.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=room, do_sample=False
    )
    begin = prompt.size(1)
    logits = ours(text[:, :-1])[0, begin - 1 :, :vocab_size]
    chosen = logits.gather(1, text[0, begin:, None])[:, 0]
    behind = logits.max(dim=1).values - chosen
    wrong = (behind > 2 * TOLERANCE * logits.abs().max()).nonzero()
    if len(wrong):
        raise ParityError("the greedy texts differ", f"from token {int(wrong[0]) + 1} on", REPORT)
    return len(chosen)


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


def import_transformers() -> Any:
    """The library, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without its warnings and progress bars meanwhile: what they warn of is what we compare."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
