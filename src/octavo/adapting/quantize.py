"""Weights into packed weights: int8 with a scale a row, int4 with a scale a group of columns.

Symmetric, to the nearest: a number and what it is stored as differ by at most half a scale. All
that multiplies is quantized, head and token embedding too; learned positions, norms and biases are
a hundredth of the size and stay fp32. In PyTorch the layers keep the integers and dequantize them
whenever they are used: the reference for faster engines, and a base for adapters.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import packed
from octavo.adapting.surgery import linear_layers, swap_linear
from octavo.checkpoint import Run, weights_sha256
from octavo.config import ModelConfig
from octavo.errors import CheckpointError, ConfigError, NonFiniteError
from octavo.model.gpt import GPT
from octavo.model.layers import rope_table
from octavo.packed import Numbers, Packed, Storage

GROUPS = range(16, 129)  # a smaller group saves little over int8, a larger one costs accuracy
USUAL_BITS = 4.5  # a number's share of a group of 32
FP16_MAX = 65_504.0
# Where a group's largest number may come to lie, in scales: up to 8.5 it is rounded to -8.
INT4_REACH = np.linspace(7.0, 8.5, 10, dtype=np.float32)
CHUNK = 1 << 17  # numbers worked on at once, so that they stay in the processor's cache

Weights = Mapping[str, np.ndarray]
"""A model's tensors by name: fp32, fp16, or bfloat16 as its bits in uint16."""


def legal_groups(columns: int) -> list[int]:
    """The group sizes that int4 can use for rows of so many numbers, the most usual one first."""
    legal = [group for group in GROUPS if columns % group == 0]
    return sorted(legal, key=lambda group: abs(bits(group) - USUAL_BITS))


def bits(group: int) -> float:
    """What a number takes in int4: four bits, its share of a scale and of the group's padding."""
    return 8 * Storage("int4", group).bytes((packed.ROWS, group)) / (packed.ROWS * group)


def choose_storage(weights: Weights, precision: str) -> tuple[dict[str, Storage], list[str]]:
    """How each tensor is to be kept for ``precision``, and a line about each exception.

    ``auto`` begins with int8. Raises `NonFiniteError` for a tensor with NaN or infinity.
    """
    chosen: dict[str, Storage] = {}
    remarks = []
    for name, tensor in weights.items():
        peak = float(np.abs(plain(tensor)).max(initial=0.0))
        if not np.isfinite(peak):
            raise NonFiniteError(f"{name} holds NaN or infinity", fix="nothing was packed")
        chosen[name], why = Storage("fp32"), ""
        if is_matrix(name, tensor.shape):
            chosen[name], why = _matrix_storage(tensor.shape[1], peak, precision)
        if why:
            remarks.append(f"{name} stays {chosen[name].kind}: {why}")
    return chosen, remarks


def _matrix_storage(columns: int, peak: float, precision: str) -> tuple[Storage, str]:
    """How a matrix is to be kept, and why if not as ``precision`` says."""
    if precision == "fp16":
        if peak <= FP16_MAX:
            return Storage("fp16"), ""
        return Storage("fp32"), f"{peak:.3g} is more than fp16 holds"
    if precision != "int4":
        return Storage("int8"), ""
    groups = legal_groups(columns)
    if not groups:
        limits = f"{GROUPS[0]} to {GROUPS[-1]}"
        return Storage("int8"), f"no group of {limits} divides its {columns} columns"
    if peak / INT4_REACH[0] > FP16_MAX:
        return Storage("int8"), f"{peak:.3g} needs a scale that fp16 does not hold"
    return Storage("int4", groups[0]), ""


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether this tensor multiplies, or is looked up as the head that does: not so positions."""
    return len(shape) == 2 and name != "pos_emb.weight"


def plain(tensor: np.ndarray) -> np.ndarray:
    """The numbers of one of `Weights` as fp32."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32, copy=False)


def quantize(tensor: np.ndarray, storage: Storage) -> Numbers:
    """Values and scales of one tensor.

    |w - value * scale| <= |scale| / 2, except where a scale is too small for its type's full
    accuracy: what is below 2e-36 (int8) or 3e-7 (int4) may become 0.
    """
    if storage.kind in ("fp32", "fp16"):
        return plain(tensor).astype(storage.kind.replace("fp", "float")), None
    rows = max(1, CHUNK // tensor.shape[1])
    parts = (plain(tensor[first : first + rows]) for first in range(0, len(tensor), rows))
    int8 = storage.kind == "int8"
    done = [_int8(part) if int8 else _int4(part, storage.group) for part in parts]
    values, scales = zip(*done, strict=True)
    return np.concatenate(values), np.concatenate(scales)


def _int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) to int8 and fp32 scales (rows,): a row's largest number becomes 127."""
    scale = np.abs(w).max(axis=1) / np.float32(127)
    scale[scale < np.finfo(np.float32).tiny] = 0  # processors may take subnormal numbers for 0
    return np.rint(w * _inverse(scale)[:, None]).astype(np.int8), scale


def _int4(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) to -8 .. 7 and fp16 scales (rows, groups), of least squared error.

    The number furthest from zero is put on the negative side, which reaches one step further:
    hence scales may be negative. As in llama.cpp's `make_qx_quants` several scales are tried and
    the best is taken; here only of those that move no number by more than half a step.
    """
    groups = w.reshape(-1, group)
    low, high = groups.min(axis=1), groups.max(axis=1)
    far = np.where(-low > high, low, high)
    best = np.full(len(groups), np.inf, dtype=np.float32)
    scales = np.zeros(len(groups), dtype=np.float16)
    for reach in INT4_REACH:
        scale = (far / -reach).astype(np.float16)
        inverse = _inverse(scale.astype(np.float32))
        steps = groups * inverse[:, None]
        steps -= np.rint(steps)
        error = np.einsum("ng,ng->n", steps, steps) * np.square(scale.astype(np.float32))
        other = np.where(far == low, high, low) * inverse
        legal = (far * inverse >= -8.5) & (other <= 7.5) | (reach == INT4_REACH[0])
        better = legal & (error < best)
        best[better], scales[better] = error[better], scale[better]
    values = np.rint(groups * _inverse(scales.astype(np.float32))[:, None]).clip(-8, 7)
    return values.astype(np.int8).reshape(w.shape), scales.reshape(len(w), -1)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where the scale is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def quantized(weights: Weights, chosen: Mapping[str, Storage]) -> Iterator[tuple[str, Numbers]]:
    """Every tensor in turn, as it is to be kept."""
    for name, storage in chosen.items():
        yield name, quantize(weights[name], storage)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is dequantized whenever it is used; gradients flow through."""

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: nn.Parameter | None) -> None:
        """Take values (out, in) and their scales as `quantize` gives them."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, dequantize(self.weight, self.scale).to(x.dtype), self.bias)


class QuantizedEmbedding(nn.Module):
    """A token embedding whose rows are dequantized when they are looked up."""

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        """Take values (V, D) and their scales as `quantize` gives them."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (...) to states (..., D)."""
        rows = idx.flatten()
        scale = None if self.scale is None else self.scale[rows]
        return dequantize(self.weight[rows], scale).unflatten(0, idx.shape)


def dequantize(values: Tensor, scale: Tensor | None) -> Tensor:
    """`packed.dequantize` for PyTorch."""
    if scale is None:
        return values.float()
    groups = values.reshape(*scale.shape, -1).float()
    return (groups * scale.float().unsqueeze(-1)).reshape(values.shape)


def load_quantized(run: Run, precision: str) -> GPT:
    """The run's packed model for PyTorch, in evaluation mode; int4 takes a byte a number here.

    Raises as `packed.open_packed`, and `CheckpointError` where the file is of another model.
    """
    checkpoint = run.best or run.latest
    if checkpoint is None:
        raise ConfigError(f"{run.path} holds no checkpoint yet", fix="train it first")
    file = packed.open_packed(run.path, precision, weights_sha256(checkpoint))
    return unpacked_model(run.config.model, file)


def unpacked_model(config: ModelConfig, file: Packed) -> GPT:
    """`quantized_model` of a packed file."""
    numbers = {name: stored.unpack() for name, stored in file.tensors.items()}
    return quantized_model(config, numbers)


def quantized_model(config: ModelConfig, numbers: Mapping[str, Numbers]) -> GPT:
    """A `GPT` in evaluation mode that holds these values and scales.

    Raises `CheckpointError` where names or shapes are another model's.
    """
    with torch.device("meta"):  # no memory, no random numbers
        model = GPT(config)
    held = {name: (_tensor(values), _tensor(scale)) for name, (values, scale) in numbers.items()}
    if config.tie_embeddings:
        held["lm_head.weight"] = held["tok_emb.weight"]
    for name, tensor in model.state_dict().items():
        found = tuple(held[name][0].shape) if name in held else "not there"
        if found != tuple(tensor.shape):
            raise CheckpointError(f"{name} is {found}, the model's is {tuple(tensor.shape)}")
    names = {layer: name for name, layer in linear_layers(model)}
    swap_linear(
        model,
        lambda *_: True,
        lambda layer: QuantizedLinear(*held[f"{names[layer]}.weight"], layer.bias),
    )
    model.set_submodule("tok_emb", QuantizedEmbedding(*held["tok_emb.weight"]))
    rest = {name: values for name, (values, _) in held.items() if not is_matrix(name, values.shape)}
    model.load_state_dict(rest, strict=False, assign=True)
    if config.uses_rope:
        model.rope_cos, model.rope_sin = rope_table(config, torch.arange(config.block_size))
    return model.eval()


def _tensor(array: np.ndarray | None) -> Any:
    """The array's own memory, or a copy of what is mapped from a file."""
    return None if array is None else torch.from_numpy(np.require(array, requirements=["C", "W"]))
