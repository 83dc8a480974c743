"""The kernels give the numbers of plain arithmetic, the same bits on every instruction set."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from octavo.packed import dequantize, pack

DRIVER = Path(__file__).with_name("native_driver.cpp")
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fPIC")
F32, F16, I8, I4 = range(4)
GELU, GELU_TANH, RELU, RELU2, SILU = range(5)
NAMES = ("scalar", "neon", "avx2", "avx512", "avx512vnni")
rng = np.random.default_rng(1337)


class Matrix(ctypes.Structure):
    _fields_ = [
        ("storage", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


class Kernels:
    """One instruction set's functions, on numpy arrays."""

    def __init__(self, library, name):
        self.library, self.name, self.reason = library, name, ctypes.c_char_p()
        library.driver_pick.restype = ctypes.c_void_p
        self.set = library.driver_pick(name.encode(), ctypes.byref(self.reason))

    def call(self, function, *arguments):
        pointers = [
            ctypes.c_void_p(a.ctypes.data) if hasattr(a, "ctypes") else a for a in arguments
        ]
        getattr(self.library, function)(ctypes.c_void_p(self.set), *pointers)

    def product(self, matrix, x, threads=1):
        """(T, cols) to (T, rows)."""
        y = np.empty((len(x), matrix.rows), dtype=np.float32)
        count, first, last = map(ctypes.c_int64, (len(x), 0, matrix.rows))
        self.call("driver_product", ctypes.byref(matrix), x, count, first, last, y, threads)
        return y

    def rows(self, matrix):
        """The dequantized weights."""
        out = np.empty((matrix.rows, matrix.cols), dtype=np.float32)
        for r in range(matrix.rows):
            self.call("driver_row", ctypes.byref(matrix), ctypes.c_int64(r), out[r])
        return out

    def activate(self, kind, x, up=None):
        y = x.astype(np.float32)
        self.call("driver_activate", kind, y, up, ctypes.c_int64(y.size))
        return y


def make_matrix(storage, values, scale=None):
    """The matrix of these numbers (see `octavo.packed`), packed, with its arrays kept alive."""
    rows, cols = values.shape
    data, scales = pack(values, scale)
    group = 0 if scale is None or storage == I8 else cols // scale.shape[1]
    pointers = [data.ctypes.data, None if scales is None else scales.ctypes.data]
    matrix = Matrix(storage, group, rows, cols, *pointers)
    matrix.arrays = (data, scales)
    return matrix


def random_int8(rows, cols):
    values = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
    return values, rng.normal(size=rows).astype(np.float32)


def random_int4(rows, cols, group):
    values = rng.integers(-8, 8, (rows, cols)).astype(np.int8)
    return values, rng.normal(size=(rows, cols // group)).astype(np.float16)


def compile_to(output, *what, compiler="g++"):
    subprocess.run([compiler, "-pthread", *what, "-o", str(output)], check=True)
    return output


def check_by_program(program, *runner):
    """What the driver printed; it stops at the first thing that is wrong."""
    result = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The driver, compiled once, as a program and as a library."""
    folder = tmp_path_factory.mktemp("driver")
    code = compile_to(folder / "driver.o", *FLAGS, "-O1", "-c", str(DRIVER))
    library = compile_to(folder / "library.so", "-shared", str(code))
    return compile_to(folder / "program", str(code)), ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def sets(compiled):
    """Every instruction set this processor has."""
    found = [kernels for name in NAMES if (kernels := Kernels(compiled[1], name)).set]
    assert found[0].name == "scalar"
    return found


def test_the_driver_finds_nothing_wrong(compiled):
    printed = check_by_program(compiled[0])
    assert "1,000 pools started and stopped" in printed
    assert "a forked child" in printed


BUILDS = {
    "optimized": ("g++", ["-O3"], []),
    "address": ("g++", ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
    "thread": ("g++", ["-O1", "-fsanitize=thread"], []),
    "clang": ("clang++", ["-O3"], []),
    "neon": ("aarch64-linux-gnu-g++", ["-O2", "-static"], ["qemu-aarch64"]),
}
HERE = [name for name, (tool, _, tools) in BUILDS.items() if all(map(shutil.which, [tool, *tools]))]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("build", HERE)
def test_the_driver_finds_nothing_wrong_as_it_is_shipped_and_under_scrutiny(build, tmp_path):
    compiler, flags, runner = BUILDS[build]
    program = compile_to(tmp_path / "program", *FLAGS, *flags, str(DRIVER), compiler=compiler)
    printed = check_by_program(program, *runner)
    assert build != "neon" or "neon       products: within their bounds" in printed


def test_an_instruction_set_that_is_not_here_is_refused_with_the_reason(compiled):
    nonsense, best = Kernels(compiled[1], "mmx"), Kernels(compiled[1], "")
    assert not nonsense.set
    assert nonsense.reason.value == b"no such instruction set in this build"
    assert best.set


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 7), (33, 64), (50, 385), (17, 1200)])
def test_int8_is_exact_after_the_activations_are_rounded(sets, rows, cols):
    values, scale = random_int8(rows, cols)
    matrix = make_matrix(I8, values, scale)
    outliers = rng.choice([1, 40], size=(9, cols), p=[0.95, 0.05])  # as GELU lets them through
    x = (rng.normal(size=(9, cols)) * outliers).astype(np.float32)
    largest = np.abs(x).max(axis=1, keepdims=True)
    rounded = np.rint(x * (np.float32(32767) / largest))
    sums = rounded.astype(np.int64) @ values.T.astype(np.int64)
    scales = (largest / np.float32(32767)).astype(np.float64) * scale.astype(np.float64)
    for kernels in sets:
        assert (kernels.product(matrix, x, threads=3) == (sums * scales).astype(np.float32)).all()
        assert (kernels.rows(matrix) == dequantize(values, scale)).all()


@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(1, 4, 4), (5, 21, 7), (33, 90, 15), (18, 384, 32), (20, 512, 128)]
)
def test_int4_sums_each_group_exactly_and_the_groups_in_order(sets, rows, cols, group):
    values, scale = random_int4(rows, cols, group)
    matrix = make_matrix(I4, values, scale)
    x = rng.normal(size=(9, cols)).astype(np.float32)
    groups = x.reshape(9, -1, group)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    rounded = np.rint(groups * (np.float32(127) / largest))
    sums = np.einsum("tgc,rgc->trg", rounded, values.reshape(rows, -1, group)).astype(np.float32)
    scales = scale.astype(np.float32) * (largest / np.float32(127)).reshape(9, 1, -1)
    expected = (sums * scales).cumsum(axis=2, dtype=np.float32)[:, :, -1]
    for kernels in sets:
        assert (kernels.product(matrix, x, threads=2) == expected).all()
        assert (kernels.rows(matrix) == dequantize(values, scale)).all()


@pytest.mark.parametrize("cols", [768, 3072, 6400])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_wrap(sets, cols, sign):
    """32 bits overflow from 517 columns of largest products on; random weights never show it."""
    scale = np.full(16, 0.5, np.float32)
    int8 = make_matrix(I8, np.full((16, cols), sign * 127, np.int8), scale)
    q = 7 if sign > 0 else -8
    int4 = make_matrix(I4, np.full((16, cols), q, np.int8), np.ones((16, cols // 32), np.float16))
    x = np.full((1, cols), 3, np.float32)
    exact = sign * cols * 127 * 32767  # Python's integers have no end
    expected = np.float32(exact * (float(np.float32(3) / np.float32(32767)) * 0.5))
    for kernels in sets:
        assert (kernels.product(int8, x) == expected).all()
        np.testing.assert_allclose(kernels.product(int4, x), cols * q * 3, rtol=1e-6)


def test_activations_that_are_all_zero_or_tiny_or_huge_are_no_trouble(sets):
    int8 = make_matrix(I8, *random_int8(16, 64))
    int4 = make_matrix(I4, *random_int4(16, 64, 32))
    for kernels in sets:
        for matrix in (int8, int4):
            for size in (0.0, 1e-45, 1e-38, 1e-30, 1e35):
                y = kernels.product(matrix, np.full((1, 64), size, np.float32))
                exact = kernels.rows(matrix).sum(axis=1, dtype=np.float64) * np.float32(size)
                np.testing.assert_allclose(y[0], exact, rtol=1e-5, atol=1e-25)


def test_every_half_becomes_the_float_it_is(sets):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    for kernels in sets:
        widened = kernels.rows(make_matrix(F16, halves))
        np.testing.assert_array_equal(widened, halves.astype(np.float32))


def test_the_cache_rounds_to_the_nearest_half(sets):
    """One position's attention is its value: what a value became in the cache comes out."""
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    close = rng.integers(0x33000000, 0x48000000, 4000).astype(np.uint32)
    ties = np.arange(0x38000000, 0x39000000, 0x1000, dtype=np.uint32)
    values = np.concatenate([bits, close, ties]).view(np.float32)
    values = values[np.isfinite(values)]
    zeros, out = np.zeros_like(values), np.empty_like(values)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    sizes = [ctypes.c_int64(n) for n in (values.size, 1, 1)]
    for kernels in sets:
        kernels.call("driver_attend", F16, *sizes, zeros, values, zeros, ctypes.c_float(1), out)
        finite = np.isfinite(expected)
        assert (out[finite] == expected[finite]).all()
        assert not np.isfinite(out[~finite]).any()


def test_activations_are_within_a_few_units_of_the_true_ones(sets):
    x = np.concatenate([rng.normal(size=5000) * 4, np.linspace(-90, 90, 5003), [0.0, -0.0, 1e-30]])
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in wide])
    tanh = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-wide))
    expected = {
        GELU: wide * phi,
        GELU_TANH: 0.5 * wide * (1 + tanh),
        RELU: np.maximum(wide, 0),
        RELU2: np.maximum(wide, 0) ** 2,
        SILU: wide * sigmoid,
    }
    up = rng.normal(size=x.size).astype(np.float32)
    for kernels in sets:
        for kind, exact in expected.items():
            error = np.abs(kernels.activate(kind, x) - exact)
            assert (error <= 4e-7 * np.abs(wide) + 4e-7 * np.abs(exact)).all()
            assert np.isnan(kernels.activate(kind, np.full(3, np.nan)))[0]
        assert (kernels.activate(SILU, x, up) == kernels.activate(SILU, x) * up).all()
        # SiLU(x) / x is 1 / (1 + exp(-x)): for negative x it shows exp's own error
        some = (wide < -1) & (wide > -80)
        ratio = kernels.activate(SILU, x)[some] / (wide * sigmoid)[some]
        assert np.abs(ratio - 1).max() < 5e-7
        edges = kernels.activate(SILU, np.array([-1e38, 1e38, -3.0, 200.0, -200.0]))
        assert edges[0] == 0
        assert edges[1] == np.float32(1e38)
        assert edges[3] == 200
        assert abs(edges[4]) < 1e-30


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("n", [1, 3, 16, 65, 768])
def test_norms(sets, kind, n):
    x = (rng.normal(size=n) + 3).astype(np.float32)
    weight, bias = rng.normal(size=(2, n)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - (wide.mean() if kind == 0 else 0)
    normed = centred / np.sqrt((centred**2).mean() + 1e-5)
    for kernels in sets:
        for w, b in [(None, None), (weight, None), (weight, bias)]:
            exact = normed * (1 if w is None else w) + (0 if b is None else b)
            out, eps, size = np.empty_like(x), ctypes.c_float(1e-5), ctypes.c_int64(n)
            kernels.call("driver_norm", kind, x, w, b, eps, size, out)
            np.testing.assert_allclose(out, exact, rtol=2e-6, atol=4e-5 if n < 4 else 4e-6)
