"""The canonical mode: the same weights, bit for bit, on 1, 2 and 4 processes; for debugging.

Floating-point sums depend on their order, and how rows are shared decides it. Here a step's rows
are always cut into four virtual shards. Each one's gradient is computed alone, by one thread, eager
and in fp32, so that its bits do not depend on who computes it; all four are gathered by every
process, and summed as (a + b) + (c + d). It costs memory and messages for four gradients.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.config import Config
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.training.parallel import Ranks

VIRTUAL = 4  # shards of a step's rows


def prepare_canonical(config: Config) -> None:
    """One thread from now on; raises `ConfigError` for a precision that breaks the equality."""
    precision = config.train.precision
    if precision not in ("auto", "fp32"):
        raise ConfigError(
            f"train.deterministic=canonical is in fp32, train.precision={precision} is not",
            fix="leave one of them out",
        )
    torch.set_num_threads(1)


def canonical_gradients(
    model: nn.Module, ranks: "Ranks", batches: Sequence[Any], backward: Callable[[Any], Tensor]
) -> Tensor:
    """Leave the gradient of all rows in ``model``; return their loss, summed the same way.

    ``batches`` are this process's micro-batches in order; ``backward`` adds the gradients of some
    of them and returns their loss.
    """
    each = len(batches) * ranks.size // VIRTUAL  # micro-batches of a virtual shard
    shards = []
    for first in range(0, len(batches), each):
        model.zero_grad(set_to_none=True)
        total = backward(batches[first : first + each])
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        shards.append(torch.cat([tensor.flatten() for tensor in (*gradients, total)]))
    a, b, c, d = ranks.stacked(torch.stack(shards))
    unflatten((a + b) + (c + d), [*gradients, total])
    return total


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Put the numbers in ``flat`` back into the ``tensors`` it was made of, in their order."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))
