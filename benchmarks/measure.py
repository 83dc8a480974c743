"""How a benchmark is run: interleaved rounds of resident peers, medians, and no figure from noise.

Each peer is one process that builds its model once and then waits at a pipe; rounds go A B C A B C,
so what slows the machine slows all. Answers are compared before anything is timed. A matrix product
takes part as a witness of the machine: a round in which it falls below 85 % of its fastest is set
aside, whatever the peers did in it, and measured again. A result is refused (exit code 1) when
other processes took more than 3 % of the CPU, or when twice as many rounds leave too few.
"""

import argparse
import contextlib
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record

WITNESS = "matrix product"
FEWEST_ROUNDS, FOREIGN_LIMIT, STEADY_LIMIT = 10, 0.03, 0.85


@dataclass(frozen=True)
class Work:
    """What a peer's process has ready."""

    answer: Any
    """Compared with the other peers' before timing."""
    round: Callable[[], float]
    """Does the work once more; gives a rate, higher is better."""


Peers = Mapping[str, Callable[[], Work]]
"""By name, importable functions (or partials of them) that build the work in their process."""


def options(description: str) -> argparse.ArgumentParser:
    """What every benchmark is asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/...json")
    parser.add_argument("--allow-noise", action="store_true", help="keep, and mark, a noisy result")
    parser.set_defaults(witness=matrix_product)
    return parser


def measure(
    name: str,
    peers: Peers,
    check: Callable[[dict[str, Any]], None],
    unit: str,
    asked: Any,
    pairs: list[tuple[str, str]] | None = None,
    derive: Callable[[dict[str, list[float]]], list[dict[str, Any]]] | None = None,
) -> None:
    """Run the benchmark ``name``, print it, record it if asked; exits with 1 where it is refused.

    ``check`` raises unless the peers' answers agree. ``pairs`` are compared round by round, the
    first peer with each other unless they are named; ``derive`` makes more results of the rounds.
    """
    if asked.rounds < FEWEST_ROUNDS and not asked.allow_noise:
        sys.exit(f"error: {asked.rounds} rounds are too few; at least {FEWEST_ROUNDS}")
    makers = {**peers, WITNESS: asked.witness}
    residents = {what: Resident(what, make, asked.threads) for what, make in makers.items()}
    answers = {what: resident.ask() for what, resident in residents.items()}
    check({what: answers[what] for what in peers})
    for resident in residents.values():
        resident.ask()  # a round to warm up
    cpu = ForeignCpu([resident.process.pid for resident in residents.values()])
    figures: dict[str, list[float]] = {what: [] for what in residents}
    kept: list[int] = []
    for number in range(2 * asked.rounds):
        for what, resident in residents.items():
            figures[what].append(resident.ask())
        kept = steady_rounds(figures[WITNESS])
        print(f"round {number + 1}, {len(kept)} of {asked.rounds} steady", file=sys.stderr)
        if len(kept) >= asked.rounds:
            break
    foreign, rounds = cpu.share(), len(figures[WITNESS])
    if len(kept) >= asked.rounds:
        figures = {what: [rates[i] for i in kept] for what, rates in figures.items()}
    measured = {
        "name": name,
        "machine": record.machine(),
        "versions": asked.versions,
        "command": record.command(),
        "rounds": len(figures[WITNESS]),
        "set_aside": rounds - len(kept),
        "threads": asked.threads,
        "foreign_cpu": round(foreign, 4),
        "noisy": foreign > FOREIGN_LIMIT or len(kept) < asked.rounds,
        "results": results(figures, list(peers), unit, pairs) + (derive(figures) if derive else []),
    }
    show(measured)
    refuse(measured, asked)
    if asked.record:
        print(record.write(measured))


def steady_rounds(witness: list[float]) -> list[int]:
    """The rounds in which the machine was nearly as fast as it ever was, by its witness alone."""
    return [i for i, rate in enumerate(witness) if rate >= STEADY_LIMIT * max(witness)]


class Resident:
    """A peer's process; it works only while it is asked."""

    def __init__(self, what: str, make: Callable[[], Work], threads: int) -> None:
        self.what = what
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited by the process
        self.process = context.Process(target=_work, args=(other, make), daemon=True)
        self.process.start()
        other.close()

    def ask(self) -> Any:
        """The answer the first time, then the rate of one more round."""
        try:
            self.pipe.send("go on")
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            sys.exit(f"error: {self.what} failed; its traceback is above")


def _work(pipe: Connection, make: Callable[[], Work]) -> None:
    with contextlib.suppress(EOFError):  # nobody asks any more
        pipe.recv()
        work = make()
        pipe.send(work.answer)
        while True:
            pipe.recv()
            pipe.send(work.round())


def matrix_product(device: str = "cpu") -> Work:
    """How fast the machine multiplies large matrices now, in GFLOP/s: the faster way of PyTorch's
    two in fp32, and on a GPU bf16.
    """
    import torch

    from octavo.linear import product

    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = torch.rand(2, side, side, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(20):
            product(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return Work(None, functools.partial(timed, multiply, 20 * 2 * side**3 / 1e9))


def timed(step: Callable[[], Any], amount: float, times: int = 1) -> float:
    """``amount`` of work a second, where ``times`` calls of ``step`` do it all."""
    started = time.perf_counter()
    for _ in range(times):
        step()
    return amount / (time.perf_counter() - started)


class ForeignCpu:
    """How much of the CPU others took since this was made: Linux's count less our processes'."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = [os.getpid(), *pids]
        self.before = self._read()

    def share(self) -> float:
        """Between 0 and 1; where the system does not say, 1, which is refused."""
        busy, total, own = (now - then for now, then in zip(self._read(), self.before, strict=True))
        return max(busy - own, 0) / total if total else 1.0

    def _read(self) -> tuple[int, int, int]:
        """Ticks of the machine busy, of the machine in all, and of our processes."""
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
            own = sum(self._ticks(pid) for pid in self.pids)
        except OSError:
            return 0, 0, 0
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks), own  # without idle and iowait

    def _ticks(self, pid: int) -> int:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, after_name[11:15]))  # user and system, with children that ended


def results(
    figures: dict[str, list[float]],
    peers: list[str],
    unit: str,
    pairs: list[tuple[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Medians with ranges, and the ratios of ``pairs`` (default: the first over each other)."""
    rows = [(what, figures[what], unit) for what in peers]
    rows.append((WITNESS, figures[WITNESS], "GFLOP/s"))
    for one, other in pairs or [(peers[0], other) for other in peers[1:]]:
        both = zip(figures[one], figures[other], strict=True)
        rows.append((f"{one} / {other}", [a / b for a, b in both], "×"))
    return [record.row(what, unit, *of) for what, of, unit in rows]


def interval(what: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The geometric mean of the rounds' ratios, and where it is, by Student's t."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean, rounds = statistics.fmean(logs), len(logs)
    reach = student(rounds - 1) * statistics.stdev(logs) / math.sqrt(rounds)
    value, low, high = map(math.exp, (mean, mean - reach, mean + reach))
    return {"what": what, "value": value, "unit": "×", "low": low, "high": high}


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5).

    >>> [round(student(n), 3) for n in (9, 19, 1000)]  # in tables 2.262, 2.093, 1.962
    [2.262, 2.093, 1.962]
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / freedom**power for power, term in enumerate(terms))


def show(measured: dict[str, Any]) -> None:
    """Print a record for people."""
    print(f"{measured['machine']}, {measured['threads']} threads, {measured['rounds']} rounds")
    show_rows(measured["results"])
    print(f"foreign CPU {measured['foreign_cpu']:.1%}, at most {FOREIGN_LIMIT:.0%}")
    print(f"rounds set aside because the machine was slow in them: {measured['set_aside']}")


def finish(
    name: str,
    asked: Any,
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    foreign: float | None = None,
) -> None:
    """Print results that `measure` has no part in, and write their record where it is asked for.

    Exits with 1 where others took too much of the CPU, if a share of theirs is given.
    """
    show_rows(rows)
    measured = {"name": name, "machine": record.machine(), "command": record.command(), **facts}
    if foreign is not None:
        print(f"foreign CPU {foreign:.1%}, at most {FOREIGN_LIMIT:.0%}")
        measured |= {"foreign_cpu": round(foreign, 4), "noisy": foreign > FOREIGN_LIMIT}
        refuse(measured, asked)
    if asked.record:
        print(record.write(measured | {"results": rows}))


def refuse(measured: dict[str, Any], asked: Any) -> None:
    """Exit with 1 where the result is noisy, unless that was allowed."""
    if measured["noisy"] and not asked.allow_noise:
        sys.exit("error: refused, the machine was not quiet; wait until it is, or --allow-noise")


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Print results for people."""
    for row in rows:
        value, low, high = (f"{row[name]:,.2f}" for name in ("value", "low", "high"))
        print(f"{row['what']:60} {value:>12} {row['unit']:12} ({low} to {high})")
