"""Drawing a token from 50,257 logits: octavo's sampler beside transformers', exact both.

    python benchmarks/sampling.py --record

The logits are random, once peaked as a trained model's are (99 % of the probability in a few
hundred ids) and once so flat that a nucleus of 0.9 holds most of the vocabulary. One thread.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import Work, measure, options, timed
from record import row, versions

SOURCE = Path(__file__).with_name("sampling.cpp")
VOCABULARY, DRAWS = 50257, 50
LOGITS = {"peaked": 3.0, "flat": 0.5}  # their standard deviation
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0.8": {"temperature": 0.8},
    "top-k 40": {"top_k": 40},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "typical-p 0.9": {"typical_p": 0.9},
}
RIVAL = "top-p 0.9, transformers"


def logits(spread: float) -> np.ndarray:
    """Random logits (V,)."""
    return np.random.default_rng(0).normal(0, spread, VOCABULARY).astype(np.float32)


def compile_to(folder: str) -> Path:
    """sampling.cpp as a library, compiled with the engine's own flags."""
    from octavo.generating.native_build import FLAGS, find_compiler

    path = Path(folder) / "sampling.so"
    subprocess.run([*find_compiler(), *FLAGS, str(SOURCE), "-o", str(path)], check=True)
    return path


def octavo_work(library: Path, spread: float, settings: dict[str, Any]) -> Work:
    """Draws by the native engine's sampler."""
    from octavo.generating.native_structures import SAMPLING
    from octavo.generating.native_structures import Sampling as Structure
    from octavo.generating.sampling import Sampling

    scores, drawn = logits(spread), np.zeros(DRAWS, np.int32)
    wanted = Sampling(**settings, seed=1)
    asked = Structure(*(getattr(wanted, name) for name in SAMPLING))
    pointers = (scores.ctypes.data_as(ctypes.c_void_p), drawn.ctypes.data_as(ctypes.c_void_p))
    loaded = ctypes.CDLL(str(library))

    def draw() -> None:
        loaded.draw(
            pointers[0], ctypes.c_int64(VOCABULARY), ctypes.byref(asked), ctypes.c_int64(DRAWS),
            pointers[1],
        )  # fmt: skip

    return Work(None, functools.partial(timed, draw, 4 * DRAWS, 4))


def transformers_work(spread: float) -> Work:
    """Draws as transformers' generate makes them: a nucleus by sorting, then a multinomial."""
    import torch
    from transformers.generation.logits_process import TopPLogitsWarper

    torch.set_num_threads(1)
    warper, scores = TopPLogitsWarper(0.9), torch.from_numpy(logits(spread))[None]
    ids = torch.ones(1, 3, dtype=torch.long)

    def draw() -> None:
        torch.multinomial(warper(ids, scores).softmax(-1), 1)

    return Work(None, functools.partial(timed, draw, DRAWS, DRAWS))


def milliseconds(figures: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What a token takes, by each."""
    return [
        row(f"{what}: a token", "ms", *(1e3 / rate for rate in rates))
        for what, rates in figures.items()
        if what.startswith(tuple(LOGITS))
    ]


def nothing(answers: dict[str, Any]) -> None:
    """That the draws are exact, tests show."""


if __name__ == "__main__":
    parser = options("drawing a token")
    asked = parser.parse_args()
    asked.versions = versions("octavo", "torch", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        library = compile_to(folder)
        peers: dict[str, Any] = {}
        for kind, spread in LOGITS.items():
            for what, settings in SETTINGS.items():
                make = functools.partial(octavo_work, library, spread, settings)
                peers[f"{kind}, {what}"] = make
            peers[f"{kind}, {RIVAL}"] = functools.partial(transformers_work, spread)
        pairs = [(f"{kind}, top-p 0.9", f"{kind}, {RIVAL}") for kind in LOGITS]
        measure("sampling", peers, nothing, "tokens/s", asked, pairs, milliseconds)
