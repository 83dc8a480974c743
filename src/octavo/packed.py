"""Packed weights: ``RUN/packed/PRECISION.safetensors``, made to be mapped into memory and read.

Tensors go by the names of ``GPT.state_dict``; a quantized ``NAME`` has ``NAME.scale`` beside it.
A matrix (rows, columns), one row an output, is kept as the native engine's kernels read it, in
panels of 16 rows; rows and columns that are missing are zeros. P is rows / 16, rounded up, and G
the group rounded up to a multiple of 8:

====  ====================================  ===========================  ====================
kind  values                                scales                       a number
====  ====================================  ===========================  ====================
int8  int8 (P, columns/2, 16, 2)            fp32 (16 P)                  value * scale
int4  uint8 (P, columns/group, G/8, 16, 4)  fp16 (P, columns/group, 16)  (nibble - 8) * scale
fp16  fp16 (rows, columns)                  none                         value
====  ====================================  ===========================  ====================

All else is fp32; scales may be negative. The metadata describes every tensor (`Storage` and shape),
names those that are tied, and holds the SHA-256 of the weights from which the file was made: it
serves no others. ``PRECISION.json`` beside it holds the file's own size and SHA-256, and what was
measured; it is written last and removed first. Needs no PyTorch.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from octavo import disk
from octavo.errors import CheckpointError, ConfigError
from octavo.manifest import compared, fingerprint, read_json, to_json
from octavo.tensors import DTYPES, map_tensors

FORMAT, VERSION = "octavo-packed", "1"
SCALE = ".scale"
ROWS = 16  # of a panel
ALIGNMENT = 64  # a cache line, and the widest vector register
PRECISIONS = ("fp16", "int8", "int4", "auto")  # auto: a mix of int8 and int4
SAFETENSORS_NAMES = {kind: name for name, kind in DTYPES.items()}
Kind = tuple[str, tuple[int, ...]]
"""The numpy type, e.g. ``<f4``, and the shape of an array."""
Numbers = tuple[np.ndarray, np.ndarray | None]
"""A tensor's values (rows, columns), and its scales: fp32 (rows,) of int8, fp16 (rows, groups) of
int4, whose values -8 .. 7 come as int8, too; None where the values are the numbers."""


class Storage(NamedTuple):
    """How a tensor is kept."""

    kind: Literal["fp32", "fp16", "int8", "int4"]
    group: int = 0
    """Columns that share a scale in int4."""

    def __str__(self) -> str:
        return f"{self.kind} in groups of {self.group}" if self.group else self.kind

    def layout(self, shape: tuple[int, ...]) -> dict[str, Kind]:
        """The arrays that keep a tensor of this shape, by what follows its name."""
        if self.kind in ("fp32", "fp16"):
            return {"": ("<f4" if self.kind == "fp32" else "<f2", shape)}
        rows, columns = shape
        panels = -(-rows // ROWS)
        if self.kind == "int8":
            values = (panels, -(-columns // 2), ROWS, 2)
            return {"": ("|i1", values), SCALE: ("<f4", (panels * ROWS,))}
        if self.kind != "int4" or columns % self.group:
            raise ValueError(f"{columns} columns cannot be {self.kind} in groups of {self.group}")
        groups = columns // self.group
        values = (panels, groups, -(-self.group // 8), ROWS, 4)
        return {"": ("|u1", values), SCALE: ("<f2", (panels, groups, ROWS))}

    def bytes(self, shape: tuple[int, ...]) -> int:
        """What a tensor of this shape takes."""
        return sum(map(_bytes, self.layout(shape).values()))


@dataclass(frozen=True)
class Stored:
    """One tensor of a packed file."""

    storage: Storage
    shape: tuple[int, ...]
    """Of the tensor, (rows, columns) for a matrix; `values` has another."""
    values: np.ndarray
    scale: np.ndarray | None

    def unpack(self) -> Numbers:
        """Values and scales in rows and columns."""
        if self.scale is None:
            return self.values, None
        rows, columns = self.shape
        if self.storage.kind == "int8":
            values = self.values.transpose(0, 2, 1, 3).reshape(len(self.scale), -1)
            return values[:rows, :columns], self.scale[:rows]
        nibbles = np.stack([self.values & 15, self.values >> 4], axis=4).astype(np.int8) - 8
        panels, groups = self.values.shape[:2]
        values = nibbles.transpose(0, 3, 1, 2, 4, 5).reshape(panels * ROWS, groups, -1)
        values = values[:rows, :, : self.storage.group].reshape(rows, columns)
        return values, self.scale.transpose(0, 2, 1).reshape(-1, groups)[:rows]


@dataclass(frozen=True)
class Packed:
    """A packed file whose SHA-256 was compared; its tensors are views of the mapped file."""

    path: Path
    tensors: dict[str, Stored]
    tied: dict[str, str]
    """For each name that shares another's tensor, that other."""


def dequantize(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The fp32 numbers for which these values and scales (see `Numbers`) stand."""
    if scale is None:
        return values.astype(np.float32)
    groups = values.reshape(*scale.shape, -1).astype(np.float32)
    return (groups * scale[..., None].astype(np.float32)).reshape(values.shape)


def pack(values: np.ndarray, scale: np.ndarray | None) -> Numbers:
    """Values and scales as the file has them; `Stored.unpack` is the inverse."""
    if scale is None:
        return values, None
    if scale.ndim == 1:
        q = _panels(np.pad(values, ((0, 0), (0, values.shape[1] % 2))))
        pairs = q.reshape(len(q), ROWS, -1, 2).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(pairs), _panels(scale).ravel()
    rows, groups = scale.shape
    grouped = values.reshape(rows, groups, -1)
    padding = -grouped.shape[2] % 8
    q = _panels(np.pad(grouped, ((0, 0), (0, 0), (0, padding)))) + np.int8(8)
    q = q.view(np.uint8).reshape(len(q), ROWS, groups, -1, 2, 4).transpose(0, 2, 3, 1, 4, 5)
    nibbles = q[..., 0, :] | q[..., 1, :] << 4
    return np.ascontiguousarray(nibbles), np.ascontiguousarray(_panels(scale).transpose(0, 2, 1))


def _panels(array: np.ndarray) -> np.ndarray:
    """(rows, ...) to (P, 16, ...), with zeros for the rows that are missing."""
    padding = [(0, -len(array) % ROWS)] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding).reshape(-1, ROWS, *array.shape[1:])


def stream_tensors(
    path: Path,
    layout: Mapping[str, Kind],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of a known ``layout``, holding one array at a time, and sync it.

    The library wants all of them at once, puts metadata in an order of chance, and data anywhere.
    Here equal arrays give equal bytes, and data lie at multiples of their items' size, and of 64
    bytes where their own size is one.
    """
    assert sys.byteorder == "little"

    def place(name: str) -> tuple[int, str]:
        aligned = _bytes(layout[name]) % ALIGNMENT == 0
        return (-ALIGNMENT if aligned else -np.dtype(layout[name][0]).itemsize, name)

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(layout, key=place):
        kind, shape = layout[name]
        first, end = end, end + _bytes(layout[name])
        dtype = SAFETENSORS_NAMES[kind]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, array in arrays:
            assert (array.dtype.str, array.shape) == layout[name], name
            file.seek(8 + len(head) + header[name]["data_offsets"][0])
            file.write(np.ascontiguousarray(array).data)
    disk.sync(path)


def _bytes(kind: Kind) -> int:
    return np.dtype(kind[0]).itemsize * int(np.prod(kind[1]))


def packed_path(run: Path, precision: str) -> Path:
    """Where a run's weights packed to ``precision`` lie."""
    return run / "packed" / f"{precision}.safetensors"


def write_packed(
    run: Path,
    plan: Mapping[str, tuple[Storage, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Numbers]],
    facts: Mapping[str, Any],
) -> None:
    """Write the packed file of tensors that are to be kept as ``plan`` says, and its JSON file.

    ``plan`` has the shape of every tensor, too. Of ``facts`` the file holds what is a string.
    """
    path = packed_path(run, facts["precision"])
    layout = {
        name + end: kind
        for name, (storage, shape) in plan.items()
        for end, kind in storage.layout(shape).items()
    }
    arrays = (
        (name + end, array)
        for name, numbers in tensors
        for end, array in zip(("", SCALE), pack(*numbers), strict=True)
        if array is not None
    )
    metadata = {name: value for name, value in facts.items() if isinstance(value, str)}
    metadata["tensors"] = json.dumps({name: [*kept, shape] for name, (kept, shape) in plan.items()})
    path.parent.mkdir(exist_ok=True)
    stream_tensors(path, layout, arrays, metadata)
    disk.write_atomic(path.with_suffix(".json"), to_json({**facts, "file": fingerprint(path)}))


def add_facts(path: Path, figures: Mapping[str, Any]) -> None:
    """Write ``figures`` into the JSON file beside the packed file ``path``, too."""
    facts = read_json(path.with_suffix(".json"))
    disk.write_atomic(path.with_suffix(".json"), to_json({**facts, **figures}))


def publish(made: Path, run: Path, precision: str) -> None:
    """Move what `write_packed` wrote in ``made`` to ``run``; a kill leaves it whole or absent."""
    source, target = packed_path(made, precision), packed_path(run, precision)
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".json").unlink(missing_ok=True)
    for suffix in (".safetensors", ".json"):
        source.with_suffix(suffix).replace(target.with_suffix(suffix))
        disk.sync(target.parent)
        disk.failpoint(f"packed{suffix}-moved")


def open_packed(run: Path, precision: str, weights_sha256: str) -> Packed:
    """The run's weights packed to ``precision``, every byte compared with what the JSON says.

    ``weights_sha256`` is that of the checkpoint they should have been made from. Raises
    `ConfigError` where nothing was packed and `CheckpointError` for a file that is damaged, of
    another version, or made from other weights.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}", fix=f"one of {', '.join(PRECISIONS)}")
    path = packed_path(run, precision)
    again = f"octavo quantize {run} --to {precision}"
    if not disk.exists(path.with_suffix(".json")):
        raise ConfigError(f"{run} holds no {precision} weights", fix=f"pack them: {again}")
    try:
        return _open(path, weights_sha256)
    except CheckpointError as error:
        raise CheckpointError(error.what, error.where, f"pack them again: {again}") from None


def _open(path: Path, weights_sha256: str) -> Packed:
    facts, where = read_json(path.with_suffix(".json")), f"in {path.parent}"
    version = facts.get("format"), facts.get("version")
    if version != (FORMAT, VERSION):
        what = f"{path.name} has the format {' '.join(map(str, version))}"
        raise CheckpointError(f"{what}, this octavo reads {FORMAT} {VERSION}", where)
    arrays, metadata = map_tensors(compared(path, facts.get("file", {})))
    made_from = metadata.get("weights_sha256", "")
    if made_from != weights_sha256:
        what = f"{path.name} was packed from weights with the SHA-256 {made_from[:16]}..."
        raise CheckpointError(f"{what}, the run's are now {weights_sha256[:16]}...", where)
    try:
        tensors = _described(arrays, json.loads(metadata["tensors"]))
        tied = json.loads(metadata["tied"])
        if not tensors.keys() >= set(tied.values()):
            raise ValueError("a name is tied to nothing")
        return Packed(path, tensors, tied)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path.name} is not ours: {error}", where) from None


def _described(arrays: Mapping[str, np.ndarray], described: Any) -> dict[str, Stored]:
    """Tensors by name; `ValueError` unless each is kept exactly as its description says."""
    tensors = {}
    for name, (kind, group, shape) in described.items():
        storage = Storage(kind, group)
        layout = storage.layout(tuple(shape))
        found = {end: arrays[name + end] for end in layout}
        if layout != {end: (array.dtype.str, array.shape) for end, array in found.items()}:
            raise ValueError(f"{name} is not kept as it says")
        tensors[name] = Stored(storage, tuple(shape), found[""], found.get(SCALE))
    return tensors
