"""Packed files hold what they were given, where the kernels look for it, and nothing by halves."""

import os

import numpy as np
import pytest
from command_kit import python
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from octavo import packed
from octavo.errors import CheckpointError
from octavo.packed import Storage, Stored, dequantize, map_tensors, pack, stream_tensors


def example(rows, columns, group=0, seed=0):
    """Values and scales of a matrix, int8 or, in groups, int4."""
    draw = np.random.default_rng(seed)
    if not group:
        values = draw.integers(-127, 128, (rows, columns), dtype=np.int8)
        return values, draw.normal(size=rows).astype(np.float32)
    values = draw.integers(-8, 8, (rows, columns), dtype=np.int8)
    return values, draw.normal(size=(rows, columns // group)).astype(np.float16)


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 1, 7, 16, 18, 32]))
def test_panels_hold_every_number_where_the_kernels_look_for_it(rows, count, group):
    values, scale = example(rows, count * (group or 1), group)
    data, scales = pack(values, scale)
    for r in range(rows):
        for c in range(values.shape[1]):
            if not group:
                assert data[r // 16, c // 2, r % 16, c % 2] == values[r, c]
                assert scales[r] == scale[r]
            else:
                g, v, b = c // group, c % group // 8, c % group % 8
                byte = data[r // 16, g, v, r % 16, b % 4]
                assert (byte >> 4 if b >= 4 else byte & 15) == values[r, c] + 8
                assert scales[r // 16, g, r % 16] == scale[r, g]
    stored = Stored(
        Storage("int4", group) if group else Storage("int8"), values.shape, data, scales
    )
    for wanted, found in zip((values, scale), stored.unpack(), strict=True):
        assert (wanted.dtype, wanted.tolist()) == (found.dtype, found.tolist())


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 1, 7, 16, 18, 32]))
def test_what_is_missing_in_a_panel_is_zero(rows, count, group):
    values, scale = example(rows, count * (group or 1), group)
    data, scales = pack(values, scale)
    assert np.abs(scales.astype(float)).sum() == pytest.approx(np.abs(scale.astype(float)).sum())
    if not group:
        assert np.abs(data.astype(int)).sum() == np.abs(values.astype(int)).sum()
    else:
        nibbles = np.stack([data & 15, data >> 4]).astype(int) - 8
        assert np.abs(nibbles).sum() == np.abs(values.astype(int)).sum()


@pytest.mark.parametrize("shape", [(65, 192), (7, 33), (16, 16), (1, 130)])
def test_a_layout_is_what_pack_gives_and_its_bytes_are_the_files(shape):
    for storage in (Storage("int8"), Storage("int4", shape[1]), Storage("fp16"), Storage("fp32")):
        if storage.kind.startswith("fp"):
            values, scale = np.zeros(shape, storage.layout(shape)[""][0]), None
        else:
            values, scale = example(*shape, storage.group)
        arrays = [array for array in pack(values, scale) if array is not None]
        kinds = [(array.dtype.str, array.shape) for array in arrays]
        assert kinds == list(storage.layout(shape).values())
        assert storage.bytes(shape) == sum(array.nbytes for array in arrays)


def test_a_group_that_does_not_divide_the_columns_is_refused():
    with pytest.raises(ValueError, match="33 columns"):
        Storage("int4", 32).layout((4, 33))


def test_dequantizing_multiplies_each_group_by_its_scale():
    values = np.array([[1, -2, 3, 4], [5, 6, -7, 8]], dtype=np.int8)
    by_row = dequantize(values, np.array([0.5, -2], dtype=np.float32))
    assert by_row.tolist() == [[0.5, -1, 1.5, 2], [-10, -12, 14, -16]]
    by_group = dequantize(values, np.array([[1, 2], [3, -4]], dtype=np.float16))
    assert by_group.tolist() == [[1, -2, 6, 8], [15, 18, 28, -32]]
    assert by_group.dtype == np.float32


ARRAYS = {
    "odd": np.arange(3, dtype=np.int8),
    "half": np.arange(5, dtype=np.float16),
    "bytes": np.arange(130, dtype=np.uint8).reshape(13, 10),
    "wide": np.arange(33, dtype=np.float32),
    "even": np.arange(128, dtype=np.int8).reshape(2, 64),
}


def write(path, arrays=ARRAYS, metadata=None):
    layout = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    stream_tensors(path, layout, arrays.items(), metadata or {"b": "1", "a": "ä"})


def test_the_library_reads_what_was_streamed_and_the_map_reads_what_the_library_wrote(tmp_path):
    write(tmp_path / "streamed")
    save_file(ARRAYS, tmp_path / "saved", {"a": "ä"})
    mapped, metadata = map_tensors(tmp_path / "streamed")
    assert metadata == {"a": "ä", "b": "1"}
    for found in (load_file(tmp_path / "streamed"), mapped, map_tensors(tmp_path / "saved")[0]):
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert (found[name].dtype, found[name].tolist()) == (array.dtype, array.tolist())


def test_equal_arrays_give_equal_bytes_in_whatever_order_they_come(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "other", dict(reversed(ARRAYS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_every_array_lies_where_a_vector_can_be_loaded(tmp_path):
    """The library puts data behind a header of any length: each load would cross a cache line."""
    for name in ("a", "ab", "abc"):
        write(tmp_path / "file", metadata={name: "x"})
        for array in map_tensors(tmp_path / "file")[0].values():
            start = array.ctypes.data % 64  # a mapped file begins with a page
            assert start % array.itemsize == 0
            assert start == 0 or array.nbytes % 64


def test_mapped_arrays_cannot_be_written_to(tmp_path):
    write(tmp_path / "file")
    with pytest.raises(ValueError, match="read-only"):
        map_tensors(tmp_path / "file")[0]["odd"][0] = 1


@pytest.mark.parametrize("cut", [0, 4, 8, 40, 300])
def test_a_file_that_ends_early_is_refused(tmp_path, cut):
    write(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="cannot read file"):
        map_tensors(tmp_path / "file")


def packed_run(folder, number):
    """A packed file whose only tensor is made of ``number``."""
    values = np.full((2, 2), number, dtype=np.float32)
    facts = {"format": packed.FORMAT, "version": packed.VERSION, "precision": "int8"}
    facts |= {"group": "0", "tied": "{}", "weights_sha256": "abc"}
    folder.mkdir(exist_ok=True)
    plan = {"w": (Storage("fp32"), values.shape)}
    packed.write_packed(folder, plan, [("w", (values, None))], facts)


POINTS = ("packed.safetensors-moved", "packed.json-moved")


@pytest.mark.parametrize("point", POINTS)
def test_a_process_killed_while_it_publishes_leaves_old_new_or_nothing(tmp_path, point):
    """What it never leaves is the old JSON beside new weights, which would look like damage."""
    packed_run(tmp_path / "run", 1.0)
    packed_run(tmp_path / "made", 2.0)
    program = (
        "from pathlib import Path; from octavo.packed import publish; "
        f"publish(Path({str(tmp_path / 'made')!r}), Path({str(tmp_path / 'run')!r}), 'int8')"
    )
    python(program, ends=137, env=os.environ | {"OCTAVO_FAILPOINT": point})
    if point == POINTS[0]:
        with pytest.raises(Exception, match="holds no int8 weights"):
            packed.open_packed(tmp_path / "run", "int8", "abc")
    else:
        file = packed.open_packed(tmp_path / "run", "int8", "abc")
        assert file.tensors["w"].values.tolist() == [[2, 2], [2, 2]]
