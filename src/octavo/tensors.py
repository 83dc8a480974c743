"""Named tensors in one safetensors file: PyTorch's or numpy's on the way in, either on the way out.

Names that share one tensor (tied weights) are stored once and come back under each name. PyTorch
is imported only where PyTorch's tensors are written or asked for.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from octavo.errors import CheckpointError

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I8": "|i1",
    "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""numpy's types by the format's names; of bfloat16, which it has not, the bits."""


def first_non_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None when all are finite."""
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            finite = value.dtype.kind not in "fc" or np.isfinite(value).all()
        else:
            finite = not value.is_floating_point() or value.isfinite().all()
        if not finite:
            return name
    return None


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file; equal tensors give equal bytes."""
    stored, tied = _untie(tensors)
    # One key, because safetensors writes several in random order.
    metadata = {"tied": json.dumps(tied)} if tied else None
    if all(isinstance(value, np.ndarray) for value in stored.values()):
        from safetensors.numpy import save_file

        save_file({n: np.asarray(v, order="C") for n, v in stored.items()}, path, metadata)
    else:
        import torch
        from safetensors.torch import save_file

        dense = {n: torch.as_tensor(v).detach().cpu().contiguous() for n, v in stored.items()}
        save_file(dense, path, metadata)


def _untie(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors without repetition, and for each name left out the name that has its tensor."""
    stored: dict[str, Any] = {}
    tied: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            memory = (value.ctypes.data, value.shape, value.strides, value.dtype.str)
        else:
            memory = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        owner = owners.setdefault(memory, name)
        if owner == name:
            stored[name] = value
        else:
            tied[name] = owner
    return stored, tied


def read_tensors(path: Path) -> dict[str, Any]:
    """As PyTorch's. Raises `CheckpointError` for anything but a sound safetensors file."""
    with _reading(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _tie(tensors, file.metadata() or {})


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The views of `map_tensors`, whose errors these are; but bfloat16, which numpy has not, comes
    as float32, number for number.
    """
    arrays, metadata = map_tensors(path)
    for name, array in arrays.items():
        if array.dtype == np.uint16:  # the upper half of a float32
            arrays[name] = (array.astype(np.uint32) << 16).view(np.float32)
    with _reading(path):
        return _tie(arrays, metadata)


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A safetensors file's tensors, as read-only views of the mapped file, and its metadata.

    bfloat16 comes as its bits, uint16. Raises `CheckpointError` for anything but a sound file.
    """
    with _reading(path):
        with safe_open(path, framework="np"):  # the library looks for overlaps, gaps and ends
            mapped = np.memmap(path, mode="r")
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        metadata = header.pop("__metadata__", {})
        arrays = {}
        for name, tensor in header.items():
            first, end = (start + offset for offset in tensor["data_offsets"])
            view = np.asarray(mapped[first:end]).view(DTYPES[tensor["dtype"]])
            arrays[name] = view.reshape(tensor["shape"])
        return arrays, metadata


def _tie(tensors: dict[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    tied = json.loads(metadata.get("tied", "{}"))
    return tensors | {name: tensors[owner] for name, owner in tied.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a broken file leads to into a `CheckpointError`."""
    try:
        yield
    except (
        SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read {path.name}: {reason}", f"in {path.parent}") from None


def read_parts(index: Path, find: Callable[[str], Path]) -> dict[str, Any]:
    """Put PyTorch tensors together that several files hold in parts.

    ``index`` is JSON: ``shapes``, of each whole tensor, and ``files``, by name what is in them and
    the indices at which each part begins. ``find`` gives a file by its name. Raises
    `CheckpointError` where the parts do not make up the wholes.
    """
    import torch

    whole: dict[str, Any] = {}
    filled: Counter[str] = Counter()
    with _reading(index):
        content = json.loads(index.read_bytes())
        numbers = {name: math.prod(shape) for name, shape in content["shapes"].items()}
        for file, places in content["files"].items():
            parts = read_tensors(find(file))
            for name, place in places.items():
                part = parts[name]
                if name not in whole:
                    whole[name] = torch.zeros(content["shapes"][name], dtype=part.dtype)
                region = [slice(i, i + n) for i, n in zip(place, part.shape, strict=True)]
                whole[name][tuple(region)] = part
                filled[name] += part.numel()
    for name, wanted in numbers.items():
        if filled[name] != wanted:
            what = f"{name} has {filled[name]:,} numbers in all parts, not {wanted:,}"
            raise CheckpointError(what, f"in {index.parent}")
    return whole
