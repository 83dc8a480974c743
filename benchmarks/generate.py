"""Tokens a second of writing: octavo at each precision beside the engines people use, on one CPU.

    python benchmarks/generate.py decode --shape 124m --work DIR --nanogpt CLONE --record

The same random GPT-2 in every engine (its files are made once, in DIR): `decode` writes after 16
tokens, `decode-768` after 768, `prefill` reads 512, `batch-8` and `batch-32` write rows side by
side, `resources` is about load time, first token and resident memory, and `cache` draws the gain
of the key/value cache against the length. All fp32 engines must write the same tokens first; of 32
rows one may part where two tokens are as good as tied. The bandwidth limit is a plain read of as
many bytes as a token needs, by as many threads.
"""

import functools
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels
import record
import write_peers
from measure import Peers, Work, finish, measure, options, timed

WORKLOADS = {  # rows, prompt, new tokens
    "decode": (1, 16, 48),
    "decode-768": (1, 768, 160),  # many: the time of reading the prompt is taken off
    "prefill": (1, 512, 1),
    "batch-8": (8, 16, 24),
    "batch-32": (32, 16, 16),
}
LIMIT = "bandwidth limit of fp32"


def work(make: Callable[..., write_peers.Writer], name: str, folder: Path, threads: int) -> Work:
    """One engine at one workload."""
    rows, length, new = WORKLOADS[name]
    prompts = write_peers.prompts(folder, rows, length)
    engine = make(folder, threads)
    answer = engine.write(prompts, min(new, 16))
    if name == "decode-768":  # less the time of reading the prompt

        def rate() -> float:
            whole = timed(lambda: engine.write(prompts, new), 1.0)
            return (new - 1) / (1 / whole - 1 / timed(lambda: engine.write(prompts, 1), 1.0))

        return Work(answer, rate)
    amount = rows * length if name == "prefill" else rows * new
    return Work(answer, functools.partial(timed, lambda: engine.write(prompts, new), amount))


def limit_work(folder: Path, threads: int, library: Path) -> Work:
    """How many times a second the bytes of one fp32 token can be read."""
    settings = Namespace(isa="", threads=threads, tokens=1)
    read = kernels.work(library, settings, kernels.PRODUCTS["fp32"], read=True)
    size = bytes_a_token(folder)["fp32"] / 1e9
    return Work(None, lambda: read.round() / size)


def bytes_a_token(folder: Path) -> dict[str, float]:
    """Bytes of weights that one token reads, by precision: every matrix once, the head's too."""
    from octavo.checkpoint import Run
    from octavo.model.counts import count_parameters

    config = Run.open(folder / "run").config.model
    matrices = count_parameters(config).total - config.block_size * config.d_model
    return {
        "fp32": matrices * 4.0,
        "fp16": matrices * 2.0,
        "int8": matrices * 1.0,
        "int4": matrices * (0.5 + 2 / 32),
    }


def compare(answers: dict[str, Any]) -> None:
    """Raise unless the fp32 engines write the same rows; say how far the others agree."""
    reference = answers["octavo fp32"]
    may_part = len(reference) // 32
    for what, rows in answers.items():
        if rows is None:
            continue
        same = sum(
            a == b for r, s in zip(rows, reference, strict=True) for a, b in zip(r, s, strict=True)
        )
        of = sum(map(len, reference))
        print(f"{what:32} {same} of {of} greedy tokens as octavo fp32", file=sys.stderr)
        parted = sum(r != s for r, s in zip(rows, reference, strict=True))
        if parted > may_part and ("fp32" in what or "F32" in what or "nanoGPT" in what):
            raise SystemExit(f"error: {what} writes something else")


def shares(folder: Path, figures: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each octavo precision's share of what reading its weights alone would allow."""
    reads = bytes_a_token(folder)
    found = []
    for precision in ("fp32", *write_peers.PACKED):
        scale = reads["fp32"] / reads[precision]
        pairs = zip(figures[f"octavo {precision}"], figures[LIMIT], strict=True)
        ratios = [rate / (limit * scale) for rate, limit in pairs]
        found.append(record.row(f"octavo {precision}, share of its bandwidth limit", "×", *ratios))
    return found


PAIRS = [
    ("fp32", "transformers fp32, dynamic"), ("fp32", "llama.cpp F32"), ("fp32", "ctranslate2 fp32"),
    ("fp16", "llama.cpp F16"), ("int8", "transformers fp32, dynamic"), ("int8", "llama.cpp Q8_0"),
    ("int8", "ctranslate2 int8"), ("int4", "transformers fp32, dynamic"),
    ("int4", "llama.cpp Q4_0"),
]  # fmt: skip


def resources(folder: Path, asked: Any, peers: Peers) -> None:
    """Seconds to load, to the first token, and resident memory, each engine in a fresh process."""
    rows = []
    for what in peers:
        if what == LIMIT:
            continue
        program = (
            "import generate, sys, time, re, pathlib, write_peers\n"
            "t = time.perf_counter(); f = pathlib.Path(sys.argv[1])\n"
            "e = generate.makers(None if sys.argv[4] == '-' else pathlib.Path(sys.argv[4]))"
            "[sys.argv[2]](f, int(sys.argv[3]))\n"
            "loaded = time.perf_counter() - t; p = write_peers.prompts(f, 1, 16)\n"
            "t = time.perf_counter(); e.write(p, 1); first = time.perf_counter() - t\n"
            "e.write(p, 16); s = pathlib.Path('/proc/self/status').read_text()\n"
            "print(loaded, first, int(re.search(r'VmRSS:\\s+(\\d+)', s)[1]) / 1024)\n"
        )
        clone = str(asked.nanogpt or "-")
        words = [sys.executable, "-c", program, str(folder), what, str(asked.threads), clone]
        tries = []
        for _ in range(3):
            done = subprocess.run(
                words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            )
            tries.append([float(word) for word in done.stdout.split()[-3:]])
        units = (("load", "s"), ("first token", "s"), ("resident memory", "MB"))
        for (quantity, unit), values in zip(units, zip(*tries, strict=True), strict=True):
            rows.append(record.row(f"{what}, {quantity}", unit, *values))
    finish(f"generate-{asked.shape}-resources", asked, rows, facts(asked, 3))


def facts(asked: Any, rounds: int) -> dict[str, Any]:
    """What a record says besides, of what `measure` has no part in."""
    return {"versions": asked.versions, "rounds": rounds, "threads": asked.threads}


def cache(folder: Path, asked: Any) -> None:
    """The PyTorch engine with and without its cache, against the length."""
    import torch

    from octavo.generating.engine import TorchEngine
    from octavo.generating.sampling import PRESETS
    from octavo.generating.writing import write
    from octavo.language_model import load

    torch.set_num_threads(asked.threads)
    lm = load(folder / "run", device="cpu")
    prompt, rows = write_peers.prompts(folder, 1, 1)[0], []
    for length in (16, 64, 128, 256, 512):
        ratios = []
        for _ in range(3 if length < 256 else 1):  # without a cache the longest takes minutes
            seconds = []
            for use_cache in (True, False):
                engine = TorchEngine(lm.model, use_cache=use_cache)
                started = time.perf_counter()
                for _ in write(engine, None, [prompt], PRESETS["greedy"], length - 1):
                    pass
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[1] / seconds[0])
        what = f"{length} tokens, without over with the cache"
        rows.append(record.row(what, "×", *ratios))
    finish(f"generate-{asked.shape}-cache", asked, rows, facts(asked, 3))


def makers(nanogpt: Path | None) -> dict[str, Callable[..., write_peers.Writer]]:
    """All engines; nanoGPT where there is a clone of it."""
    found = dict(write_peers.WRITERS)
    if nanogpt:
        found["nanoGPT"] = functools.partial(write_peers.nanogpt_writer, clone=nanogpt)
    return found


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*WORKLOADS, "resources", "cache"])
    parser.add_argument("--shape", choices=write_peers.SHAPES, default="124m")
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--only", help="engines by name, separated by ;")
    asked = parser.parse_args()
    folder = asked.work / asked.shape
    write_peers.prepare(folder, asked.shape)
    packages = ("octavo", "torch", "transformers", "llama-cpp-python", "ctranslate2")
    asked.versions = record.versions(*packages)
    chosen = makers(asked.nanogpt)
    if asked.only:
        chosen = {name: chosen[name] for name in asked.only.split(";")}
    if asked.what == "cache":
        return cache(folder, asked)
    peers = {
        name: functools.partial(work, make, asked.what, folder, asked.threads)
        for name, make in chosen.items()
    }
    if asked.what == "resources":
        return resources(folder, asked, peers)
    library = kernels.compile_to(str(folder))
    peers[LIMIT] = functools.partial(limit_work, folder, asked.threads, library)
    pairs = [(f"octavo {p}", other) for p, other in PAIRS if {f"octavo {p}", other} <= set(peers)]
    derive = functools.partial(shares, folder) if asked.what.startswith("decode") else None
    name = f"generate-{asked.shape}-{asked.what}"
    return measure(name, peers, compare, "tokens/s", asked, pairs=pairs, derive=derive)


if __name__ == "__main__":
    main()
