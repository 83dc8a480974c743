"""Muon: momentum whose matrices are made orthogonal before they are added to the weights.

Jordan et al. 2024 (github.com/KellerJordan/Muon). Every direction that a matrix's gradient has is
followed at the same rate, so a step teaches more than AdamW's. What is no matrix inside a block
(embeddings, head, norms, biases, adapters) is AdamW's, in the same optimizer.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.training.halves import side_by_side

# Each iteration's polynomial is the best there is for the singular values the one before it leaves:
# Amsel et al. 2025, The Polar Express (arXiv 2505.16932), table of their reference code.
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = (
    1.01  # rounding must not push a singular value above 1, where the first polynomials explode
)


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a linear layer's matrix inside a block, which Muon is for."""
    return "blocks." in name and name.endswith("_proj.weight") and parameter.dim() == 2


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (N, R, C) with their singular values moved towards 1, directions kept.

    Five matrix polynomials instead of an SVD; they act from the shorter side, in ``dtype``.
    """
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY).clamp_min(1e-30)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b / SAFETY**3, alpha=c / SAFETY**5)
        x = torch.baddbmm(x, inner, x, beta=a / SAFETY)
    return (x.mT if tall else x).to(matrices.dtype)


def multiplies_bf16(device: str) -> bool:
    """Whether bfloat16, precise enough for a direction, is multiplied faster than fp32 there."""
    if device == "cuda":  # a GPU from before 2020 imitates it, slowly
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


class Muon(torch.optim.AdamW):
    """Muon for the groups that say ``muon``, fused AdamW for the others."""

    halves = False
    """Whether another thread takes half of the matrices of a shape."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update; a matrix's gradient is gone afterwards, so that AdamW passes over it."""
        for group in self.param_groups:
            if group["muon"]:
                for alike in _by_shape(p for p in group["params"] if p.grad is not None):
                    update = functools.partial(_update, group, self.state)
                    if self.halves and len(alike) > 1:
                        halves = (functools.partial(update, alike[i::2]) for i in (0, 1))
                        side_by_side(*halves)
                    else:
                        update(alike)
        super().step(closure)


def _by_shape(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Parameters of one shape together: they are made orthogonal in one batch."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    return shapes.values()


@torch.no_grad()
def _update(
    group: Mapping[str, Any],
    state: Mapping[Any, dict[str, Tensor]],
    parameters: list[nn.Parameter],
) -> None:
    """Nesterov momentum, made orthogonal, times the rate; a tall matrix takes longer steps."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for p in parameters:
        if "momentum" not in state[p]:
            state[p]["momentum"] = torch.zeros_like(p)
    averages = [state[p]["momentum"] for p in parameters]
    torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
    directions = torch.stack(gradients).lerp_(torch.stack(averages), group["momentum"])
    rows, columns = parameters[0].shape
    stretch = max(1.0, rows / columns) ** 0.5
    weights: list[Tensor] = list(parameters)
    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    dtype = torch.bfloat16 if multiplies_bf16(directions.device.type) else torch.float32
    steps = list(orthogonalize(directions, dtype).unbind())
    torch._foreach_add_(weights, steps, alpha=-group["lr"] * stretch)
    for p in parameters:
        p.grad = None
