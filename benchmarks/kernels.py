"""The native engine's matrix products beside the bandwidth of memory: GPT-2 124M, all 49 matrices.

One token reads every weight once, so at one token the limit is a plain read with as many threads:
a pass over 494 MB or more, which no cache holds. With ``--tokens N`` the same products, less the
head, for N tokens at once, where the limit is a matrix product (the witness, PyTorch's).

    python benchmarks/kernels.py [--isa avx2] [--tokens 512]
"""

import ctypes
import functools
import subprocess
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from measure import WITNESS, Work, measure, options, timed
from record import versions

SOURCE = Path(__file__).with_name("kernels.cpp")
PRODUCTS = {"fp32": (0, 0), "fp16": (1, 0), "int8": (2, 0), "int4": (3, 32), "int4 / 64": (3, 64)}
"""The storage's number in kernels.h and the columns of a group, by name."""
ENOUGH = 490_000_000  # bytes
PASSES = 20
"""In a round, after one that wakes the threads up: one alone takes 20 ms, which is too short."""
MULTIPLICATIONS = 12 * (2304 * 768 + 768 * 768 + 2 * 3072 * 768)  # a token's, without the head


def compile_to(folder: str) -> Path:
    """kernels.cpp as a library, compiled with the engine's own flags."""
    from octavo.generating.native_build import FLAGS, find_compiler

    path = Path(folder) / "kernels.so"
    subprocess.run([*find_compiler(), *FLAGS, str(SOURCE), "-o", str(path)], check=True)
    return path


def load(library: Path) -> ctypes.CDLL:
    """Its functions and their types."""
    loaded = ctypes.CDLL(str(library))
    loaded.open_pass.restype = ctypes.c_void_p
    loaded.run_pass.restype = ctypes.c_double
    loaded.pass_bytes.restype = ctypes.c_int64
    loaded.run_pass.argtypes = ctypes.c_void_p, ctypes.c_int
    loaded.pass_bytes.argtypes = (ctypes.c_void_p,)
    return loaded


def work(library: Path, asked: Namespace, what: tuple[int, int], read: bool = False) -> Work:
    """Passes over as many copies of the weights as no cache holds, in GB/s; or in GFLOP/s."""
    loaded, alone = load(library), asked.tokens == 1
    settings = asked.isa.encode(), asked.threads, *what, ctypes.c_int64(asked.tokens), alone
    opened = functools.partial(loaded.open_pass, *settings)
    passes = [opened()]
    if passes[0] is None:
        raise SystemExit(f"error: this processor lacks {asked.isa}")
    size = loaded.pass_bytes(passes[0])
    while alone and size * len(passes) < ENOUGH:
        passes.append(opened())

    def run() -> None:
        for each in passes:
            loaded.run_pass(each, read)

    amount = size * len(passes) if alone else 2 * MULTIPLICATIONS * asked.tokens
    times = PASSES if alone else 1

    def awake() -> float:
        run()
        return timed(run, times * amount / 1e9, times)

    return Work(None, awake)


def nothing(answers: dict[str, Any]) -> None:
    """The kernels' answers are compared in their tests."""


if __name__ == "__main__":
    parser = options("the native engine's matrix products")
    parser.add_argument("--isa", default="", help="scalar, neon, avx2, avx512, avx512vnni")
    parser.add_argument("--tokens", type=int, default=1)
    asked = parser.parse_args()
    asked.versions = versions("octavo", "torch")
    with tempfile.TemporaryDirectory() as folder:
        make = functools.partial(work, compile_to(folder), asked)
        peers = {name: functools.partial(make, what) for name, what in PRODUCTS.items()}
        if asked.tokens == 1:
            read = "a plain read"
            peers[read] = functools.partial(make, PRODUCTS["fp32"], read=True)
            pairs = [(name, read) for name in PRODUCTS]
            measure("kernels", peers, nothing, "GB/s", asked, pairs)
        else:
            pairs = [(name, WITNESS) for name in PRODUCTS]
            measure("kernels-batch", peers, nothing, "GFLOP/s", asked, pairs)
