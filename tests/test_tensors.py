"""What goes into a safetensors file comes out again, bit by bit; what is none is refused."""

import json
import struct

import numpy as np
import pytest
import torch

from octavo.errors import CheckpointError
from octavo.tensors import first_non_finite, read_arrays, read_tensors, write_tensors

TENSORS = {
    "fp32": torch.randn(3, 4),
    "bf16": torch.randn(3, 4).bfloat16(),
    "fp16": torch.randn(5).half(),
    "step": torch.tensor(7.0),
    "count": torch.tensor(2**40),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "turned": torch.randn(3, 4).T,
    "parameter": torch.nn.Parameter(torch.randn(2)),
}


def test_every_kind_of_tensor_round_trips_bitwise(tmp_path):
    write_tensors(tmp_path / "t", TENSORS)
    read = read_tensors(tmp_path / "t")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_numpy_reads_what_torch_wrote_and_the_other_way_round(tmp_path):
    write_tensors(tmp_path / "t", TENSORS)
    arrays = read_arrays(tmp_path / "t")
    for name, tensor in TENSORS.items():
        wide = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        assert np.array_equal(arrays[name], wide.numpy()), name
        assert arrays[name].dtype == wide.numpy().dtype
    write_tensors(tmp_path / "n", arrays | {"turned": arrays["turned"].T})
    again = read_tensors(tmp_path / "n")
    assert torch.equal(again["turned"], TENSORS["turned"].T)
    assert torch.equal(again["step"], TENSORS["step"])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_tied_tensors_are_stored_once_and_come_back_under_each_name(tmp_path, kind):
    shared = torch.randn(1000) if kind == "torch" else np.random.randn(1000)
    tensors = {"tok_emb": shared, "other": shared[:1000] + 0, "head": shared, "tail": shared}
    write_tensors(tmp_path / "t", tensors)
    twice = 2 * shared.nbytes
    assert twice < (tmp_path / "t").stat().st_size < twice + 500
    read = read_tensors(tmp_path / "t")
    assert read["head"] is read["tail"] is read["tok_emb"]
    assert read["other"] is not read["tok_emb"]
    assert torch.equal(read["head"], torch.as_tensor(shared))


def test_different_views_of_one_buffer_are_not_taken_for_tied(tmp_path):
    buffer = np.arange(12.0)
    square = buffer[:4].reshape(2, 2)
    views = {"row": buffer[:4], "square": square, "turned": square.T, "rest": buffer[4:]}
    write_tensors(tmp_path / "t", views)
    read = read_arrays(tmp_path / "t")
    for name, view in views.items():
        assert np.array_equal(read[name], view)


def test_equal_tensors_give_equal_bytes(tmp_path):
    shared = torch.randn(8)
    tensors = {f"t{i}": torch.randn(3) for i in range(6)} | {f"tied{i}": shared for i in range(6)}
    files = set()
    for attempt in range(8):
        write_tensors(tmp_path / str(attempt), tensors)
        files.add((tmp_path / str(attempt)).read_bytes())
    assert len(files) == 1


def test_the_first_tensor_that_is_not_finite_is_named():
    good = {"a": torch.randn(3), "ids": torch.arange(3), "np": np.ones(3), "n": np.arange(2)}
    assert first_non_finite(good) is None
    for bad in (torch.tensor([1.0, float("nan")]), np.array([np.inf]), torch.tensor(-np.inf)):
        assert first_non_finite(good | {"bad": bad}) == "bad"
    assert first_non_finite({"b": torch.tensor([float("nan")]).bfloat16()}) == "b"


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x00",
    "header longer than the file": _file(_tensor(), bytes(8), length=2**20),
    "header of 2^63 bytes": _file(_tensor(), bytes(8), length=2**63),
    "no JSON": _file(b"\xff{{{", bytes(8)),
    "deep JSON": _file(b"[" * 100_000, bytes(8)),
    "offsets beyond the data": _file(_tensor(data_offsets=[0, 800]), bytes(8)),
    "offsets backwards": _file(_tensor(data_offsets=[8, 0]), bytes(8)),
    "shape overflows": _file(_tensor(shape=[2**40, 2**40]), bytes(8)),
    "shape larger than the data": _file(_tensor(shape=[3]), bytes(8)),
    "overlap": _file({**_tensor(), "b": _tensor()["a"]}, bytes(8)),
    "hole": _file(_tensor(data_offsets=[8, 16]), bytes(16)),
    "unknown dtype": _file(_tensor(dtype="F33"), bytes(8)),
    "tied to nothing": _file({**_tensor(), "__metadata__": {"tied": '{"b": "c"}'}}, bytes(8)),
    "tied is no JSON": _file({**_tensor(), "__metadata__": {"tied": "{"}}, bytes(8)),
    "tied is a list": _file({**_tensor(), "__metadata__": {"tied": "[1]"}}, bytes(8)),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
}


@pytest.mark.parametrize("read", [read_arrays, read_tensors])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, case, read):
    (tmp_path / "m.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"cannot read m\.safetensors") as caught:
        read(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
