"""The loss of a step, without ever holding all of its logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from octavo.linear import Linear, product
from octavo.model.gpt import GPT
from octavo.training.memory import rows_at_once


def cross_entropy(
    model: GPT, idx: Tensor, targets: Tensor, mask: Tensor | None = None, chunk: int = 0
) -> Tensor:
    """Summed negative log-likelihood, in nats, of ``targets`` (B, T); targets of -100 do not count.

    Only ``chunk`` rows of logits exist at a time, in the backward pass too: the largest tensor of a
    small GPT, (B T, V), is never whole in memory. Chosen by itself in fp32, where it costs nothing.
    """
    states = model.hidden(idx, mask=mask).flatten(0, 1)  # (B T, D)
    targets, head = targets.flatten(), model.lm_head

    def nll(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    exact = type(head) is Linear and head.bias is None and head.is_exact(states)
    if exact:
        chunk = chunk or rows_at_once(head.out_features)
    if not chunk or states.size(0) <= chunk:
        return nll(states, targets)
    if exact and torch.is_grad_enabled():
        return _HeadLoss.apply(states, head.weight, targets, chunk)
    pieces = zip(states.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(nll, rows, wanted, use_reentrant=False) for rows, wanted in pieces]
    return torch.stack(losses).sum()


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy of a few rows at a time, which leave gradients and no logits.

    The gradient of a summed loss is the same whatever becomes of it, up to a factor (Liger kernels:
    Hsu et al. 2024): it is taken while the logits are there, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        to_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = states.new_zeros(())
        for start in range(0, states.size(0), chunk):
            rows, wanted = states[start : start + chunk], targets[start : start + chunk, None]
            counted, wanted = wanted != -100, wanted.clamp(min=0)
            logits = product(rows, weight)
            log_sum = logits.logsumexp(1, keepdim=True)
            total += ((log_sum - logits.gather(1, wanted)) * counted).sum()
            gradient = logits.sub_(log_sum).exp_()  # softmax, less one where the target is
            gradient.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0)).mul_(counted)
            if to_states is not None:
                to_states[start : start + chunk] = product(gradient, weight.t())
            if to_weight is not None:
                to_weight.addmm_(gradient.t(), rows)
        ctx.save_for_backward(to_states, to_weight)
        return total

    @staticmethod
    @once_differentiable  # whose type has lost the names
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        to_states, to_weight = ctx.saved_tensors
        for gradient in (to_states, to_weight):
            if gradient is not None:
                gradient.mul_(factor)
        return to_states, to_weight, None, None
