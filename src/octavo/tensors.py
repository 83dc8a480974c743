"""Named tensors in one safetensors file: PyTorch's or numpy's on the way in, either on the way out.

Names that share one tensor (tied weights) are stored once and come back under each name. PyTorch
is imported only where PyTorch's tensors are written or asked for.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from octavo.errors import CheckpointError


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


def read_tensors(path: Path, framework: str = "np", device: str = "cpu") -> dict[str, Any]:
    """Read as numpy arrays ("np") or PyTorch tensors ("pt").

    numpy has no bfloat16: there it comes as float32, number for number. Raises `CheckpointError`
    for anything but a sound safetensors file.
    """
    try:
        with safe_open(path, framework=framework, device=device) as file:
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            plain = [n for n, kind in kinds.items() if framework == "pt" or kind != "BF16"]
            tensors = {name: file.get_tensor(name) for name in plain}
        if len(plain) < len(kinds):
            tensors |= _widened(path)
        return tensors | {name: tensors[owner] for name, owner in tied.items()}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read {path.name}: {reason}", f"in {path.parent}") from None


def _widened(path: Path) -> dict[str, np.ndarray]:
    """The bfloat16 tensors of a file as float32, whose upper half bfloat16 is."""
    tensors = {}
    for name, raw in deserialize(path.read_bytes()):
        if raw["dtype"] == "BF16":
            wide = np.frombuffer(raw["data"], "<u2").astype("<u4") << 16
            tensors[name] = wide.view("<f4").reshape(raw["shape"])
    return tensors


def read_parts(index: Path, find: Callable[[str], Path]) -> dict[str, Any]:
    """Put PyTorch tensors together that several files hold in parts.

    ``index`` is JSON: ``shapes``, of each whole tensor, and ``files``, by name what is in them and
    the indices at which each part begins. ``find`` gives a file by its name. Raises
    `CheckpointError` where the parts do not make up the wholes.
    """
    import torch

    whole: dict[str, Any] = {}
    filled: Counter[str] = Counter()
    try:
        content = json.loads(index.read_bytes())
        numbers = {name: math.prod(shape) for name, shape in content["shapes"].items()}
        for file, places in content["files"].items():
            parts = read_tensors(find(file), "pt")
            for name, place in places.items():
                part = parts[name]
                if name not in whole:
                    whole[name] = torch.zeros(content["shapes"][name], dtype=part.dtype)
                region = [slice(i, i + n) for i, n in zip(place, part.shape, strict=True)]
                whole[name][tuple(region)] = part
                filled[name] += part.numel()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read {index.name}: {reason}", f"in {index.parent}") from None
    for name, wanted in numbers.items():
        if filled[name] != wanted:
            what = f"{name} has {filled[name]:,} numbers in all parts, not {wanted:,}"
            raise CheckpointError(what, f"in {index.parent}")
    return whole
