"""Does a model read further than it was trained to: perplexity at longer and longer contexts.

Every figure is about the same tokens, with more of the text before them: a model that reaches
further does no worse for it. RoPE is also stretched, without any training, in the three known ways.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from octavo.errors import DataError
from octavo.evaluating.perplexity import score_windows
from octavo.model.gpt import GPT
from octavo.model.layers import rope_table
from octavo.model_config import RopeScaling
from octavo.text.token_files import Tokens

FACTORS = (1.0, 1.5, 2.0, 4.0)
STRETCHED = ("linear", "ntk", "yarn")
PLAIN = "as trained"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Perplexity by way of stretching and by context length, over the same ``tokens`` tokens."""

    trained: int
    """The context the model was trained with."""
    tokens: int
    perplexity: dict[str, dict[int, float]]
    remarks: list[str]


def measure_lengths(
    model: GPT,
    tokens: np.ndarray | Tokens,
    windows: int = 64,
    watch: Callable[[int, int], object] = lambda done, of: None,
) -> Lengths:
    """Perplexity of the same tokens of a text (N,) after 1, 1.5, 2 and 4 times the trained context.

    Scored are the half contexts before up to ``windows`` places spread over the text. Stretched are
    linear (Chen et al. 2023), ntk (bloc97) and yarn (Peng et al. 2023), with the factor that the
    length asks for. Lengths that the text does not fill or learned positions do not reach are left
    out, and said. ``watch`` is told how many passes of how many are done. Raises `DataError` where
    the text does not fill one context.
    """
    trained, config = model.config.block_size, model.config
    reached = [factor for factor in FACTORS if int(factor * trained) < len(tokens)]
    if not reached:
        raise DataError(
            f"the context is {trained} tokens long and the text only {len(tokens)}",
            fix="give a longer text: --perplexity FILE",
        )
    remarks = []
    if len(reached) < len(FACTORS):
        remarks.append(f"the text ends before {FACTORS[len(reached)]:g} contexts")
    if config.uses_learned_positions and len(reached) > 1:
        reached = reached[:1]
        remarks.append(f"its learned positions end at {trained} tokens")
    scored = max(1, trained // 2)
    ends = np.unique(np.linspace(int(reached[-1] * trained), len(tokens) - 1, windows, dtype=int))
    ways = (PLAIN, *STRETCHED) if config.uses_rope and not config.rope_scaling else (PLAIN,)
    passes = [(way, f) for way in ways for f in reached if way == PLAIN or f > 1]
    perplexity: dict[str, dict[int, float]] = {}
    for done, (way, factor) in enumerate(passes):
        watch(done, len(passes))
        length = int(factor * trained)
        window = np.asarray(tokens[ends[:, None] + np.arange(-length, 1)], dtype=np.int64)
        x, y = window[:, :-1], np.where(np.arange(length) < length - scored, -100, window[:, 1:])
        score = score_windows(_stretched(model, way, factor), x, y)
        perplexity.setdefault(way, {})[length] = score.perplexity
    watch(len(passes), len(passes))
    return Lengths(trained, len(ends) * scored, perplexity, remarks)


def _stretched(model: GPT, way: str, factor: float) -> GPT:
    """The same weights with another rotation; ``model`` itself as it was trained."""
    if way == PLAIN:
        return model
    scaling = RopeScaling(
        type=way,  # type: ignore[arg-type]
        factor=factor,
        original_block_size=model.config.block_size,
    )
    length = int(factor * model.config.block_size)
    config = dataclasses.replace(model.config, block_size=length, rope_scaling=scaling)
    with torch.device("meta"):  # no second copy of the weights
        copy = GPT(config)
    copy.load_state_dict(model.state_dict(), assign=True)
    positions = torch.arange(length, device=model.tok_emb.weight.device)
    copy.rope_cos, copy.rope_sin = rope_table(config, positions)
    return copy
