"""A server under load, under clients that leave, and beside its peers.

    python benchmarks/serve.py load RUN --streams 32 --minutes 10 --record
    python benchmarks/serve.py leave RUN --clients 10000 --record
    python benchmarks/serve.py throughput --work DIR --record      (DIR as benchmarks/generate.py's)

Every server is a process of its own, every client a socket: each event's arrival is timed. `load`
lets so many clients ask one text after another; `leave` lets clients hang up in the middle; and
`throughput` lets 1, 8 and 32 clients ask for greedy texts of a GPT-2 of 124 M random parameters.
A peer that is not installed is named and left out.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
import write_peers
from measure import FEWEST_ROUNDS, ForeignCpu, finish, options

PROMPTS = ("The ", "A class is ", "When ", "If the value", "This module ", "See also ", "In ")
STREAMS = (1, 8, 32)
NEW_TOKENS = 32


@dataclass
class Heard:
    """What one client heard."""

    first: float = 0.0
    """Seconds to the first event."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between events."""
    tokens: int = 0
    text: str = ""
    error: str = ""


async def ask(port: int, path: str, body: dict[str, Any], stop_after: int = 0) -> Heard:
    """Stream one answer; hang up after so many events, if not 0."""
    heard, data = Heard(), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    last, events, done = time.perf_counter(), 0, False
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            heard.error = status.decode().strip()
        while not heard.error and (line := await reader.readline()):
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            now = time.perf_counter()
            event = json.loads(line[5:])
            heard.error = str(event.get("error") or "")
            heard.tokens = (event.get("usage") or {}).get("completion_tokens", heard.tokens)
            for choice in event.get("choices", ()):
                heard.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                done |= choice.get("finish_reason") is not None
                heard.gaps.append(now - last)
                last, events = now, events + 1
            if stop_after and events >= stop_after:
                return heard
    finally:
        writer.transport.abort() if stop_after else writer.close()
    if not done and not heard.error:
        heard.error = "the stream broke off"
    heard.first, heard.gaps = (heard.gaps or [0.0])[0], heard.gaps[1:]
    return heard


@contextlib.contextmanager
def server(command: list[str], port: int, ready: str, **environment: str) -> Iterator[int]:
    """Run a server until the block ends; gives its process id once it answers."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"error: this server does not start: {' '.join(command)}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def octavo(run: str | Path, port: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "octavo", "serve", str(run), "--port", str(port), *more]


def resident(pid: int) -> float:
    """Megabytes of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def metric(port: int, name: str) -> float:
    """The sum of an octavo server's metric."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


def load(asked: Any) -> list[dict[str, Any]]:
    """Clients that ask one text after another."""
    port, seconds = free_port(), asked.minutes * 60
    memory: list[float] = []

    async def client(number: int, until: float) -> list[Heard]:
        rng, all_heard = random.Random(number), []
        while time.monotonic() < until:
            body = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(50, 300)}
            body |= {"seed": rng.randrange(2**32), "stream": True, "temperature": 0.8}
            body["stream_options"] = {"include_usage": True}
            all_heard.append(await ask(port, "/v1/completions", body))
        return all_heard

    async def crowd(pid: int) -> list[Heard]:
        await asyncio.gather(*(client(-1 - n, time.monotonic() + 3) for n in range(asked.streams)))
        memory.append(resident(pid))
        until = time.monotonic() + seconds
        heard = await asyncio.gather(*(client(n, until) for n in range(asked.streams)))
        memory.append(resident(pid))
        return [each for some in heard for each in some]

    with server(octavo(asked.run, port), port, "/ready") as pid:
        began = time.monotonic()
        heard = asyncio.run(crowd(pid))
        seconds = time.monotonic() - began - 3
    gaps = sorted(gap for each in heard for gap in each.gaps)
    firsts = sorted(each.first for each in heard)
    middle = statistics.median(gaps)
    for problem in {each.error for each in heard if each.error}:
        print(f"error: {problem}", file=sys.stderr)
    return [
        row("requests", len(heard), ""),
        row("errors", sum(bool(each.error) for each in heard), ""),
        row("tokens a second, all streams", sum(each.tokens for each in heard) / seconds, "tok/s"),
        row("first token, median", 1e3 * statistics.median(firsts), "ms", firsts),
        row("first token, 99th percentile", 1e3 * share(firsts, 0.99), "ms"),
        row("between events, median", 1e3 * middle, "ms", gaps),
        row("between events, 99th percentile", 1e3 * share(gaps, 0.99), "ms"),
        row("99th percentile over median", share(gaps, 0.99) / middle, "×"),
        row("memory after over before", memory[1] / memory[0], "×"),
    ]


def leave(asked: Any) -> list[dict[str, Any]]:
    """Clients that hang up after a few events, or before the first."""
    port, memory = free_port(), []

    async def client(number: int) -> None:
        rng = random.Random(number)
        body = {"prompt": rng.choice(PROMPTS) * rng.randint(1, 5), "max_tokens": 2000}
        body |= {"seed": number, "stream": True, "n": rng.choice((1, 1, 2))}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.choice((0.001, 0.02, 0.1, 5))):
                await ask(port, "/v1/completions", body, stop_after=rng.randint(1, 4))

    async def crowd(numbers: range) -> None:
        gate = asyncio.Semaphore(16)

        async def one(number: int) -> None:
            async with gate:
                await client(number)

        await asyncio.gather(*map(one, numbers))

    async def fill() -> None:
        body = {"prompt": PROMPTS[0], "max_tokens": 2000, "stream": True}
        await asyncio.gather(*(ask(port, "/v1/completions", body) for _ in range(asked.streams)))

    with server(octavo(asked.run, port), port, "/ready") as pid:
        asyncio.run(fill())  # every slot as full as it gets: what a server at work holds
        memory.append(resident(pid))
        fifth = max(asked.clients // 5, 1)
        for numbers in (range(fifth), range(fifth, asked.clients)):
            asyncio.run(crowd(numbers))
            memory.append(resident(pid))
        memory.append(resident(pid))
        time.sleep(2)
        lost = metric(port, "octavo_slots_in_use") + metric(port, "octavo_queue")
        whole = asyncio.run(ask(port, "/v1/completions", {"max_tokens": 20, "stream": True}))
    return [
        row("clients that left", asked.clients, ""),
        row("slots lost", lost, ""),
        row("errors afterwards", float(bool(whole.error)), ""),
        row("memory after the last over after the first fifth", memory[2] / memory[1], "×"),
        row("memory after the last over before the first", memory[2] / memory[0], "×"),
    ]


@dataclass(frozen=True)
class Peer:
    """A server, and how it is asked."""

    command: Callable[[int], list[str]]
    ready: str
    module: str
    """What must be importable for it to be there."""
    own: dict[str, Any] = field(default_factory=lambda: {"model": "run"})
    """What a request to it holds besides."""


def peers(work: Path) -> dict[str, Peer]:
    """Every server by its name."""

    def llama_cpp(kind: str) -> Callable[[int], list[str]]:
        words = [sys.executable, "-m", "llama_cpp.server", "--model", str(work / f"{kind}.gguf")]
        words += ["--n_ctx", "1024", "--interrupt_requests", "False"]  # else one ends the other
        return lambda port: [*words, "--port", str(port)]

    def transformers(port: int) -> list[str]:
        program = str(Path(sys.executable).parent / "transformers")
        words = [program, "serve", str(work / "hf"), "--port", str(port), "--device", "cpu"]
        return [*words, "--dtype", "float32", "--continuous-batching"]

    plain = {"repeat_penalty": 1.0}  # its own default is another
    return {
        "octavo fp32": Peer(lambda port: octavo(work / "run", port), "/ready", "octavo"),
        "octavo int8": Peer(
            lambda port: octavo(work / "run", port, "--weights", "int8"), "/ready", "octavo"
        ),
        "llama.cpp F32": Peer(llama_cpp("F32"), "/v1/models", "llama_cpp.server.app", plain),
        "llama.cpp Q8_0": Peer(llama_cpp("Q8_0"), "/v1/models", "llama_cpp.server.app", plain),
        "transformers serve fp32": Peer(
            transformers, "/health", "transformers.cli.serve", {"model": str(work / "hf")}
        ),
    }


def throughput(asked: Any) -> list[dict[str, Any]]:
    """Tokens a second of 1, 8 and 32 greedy streams, servers by turns."""
    if asked.rounds < FEWEST_ROUNDS and not asked.allow_noise:
        sys.exit(f"error: {asked.rounds} rounds are too few; at least {FEWEST_ROUNDS}")
    write_peers.prepare(asked.work, "124m")
    environment = {"PYTHONPATH": asked.llama} if asked.llama else {}
    ports: dict[str, int] = {}
    figures: dict[tuple[str, int], list[float]] = {}
    failed: set[tuple[str, int]] = set()
    with contextlib.ExitStack() as running:
        pids = []
        found = peers(asked.work)
        for what, peer in found.items():
            probe = [sys.executable, "-c", f"import {peer.module}"]
            if subprocess.run(
                probe, env={**os.environ, **environment}, capture_output=True, check=False
            ).returncode:
                print(f"{what} is not here: python -c 'import {peer.module}' fails", flush=True)
                continue
            ports[what] = free_port()
            command = peer.command(ports[what])
            pids.append(
                running.enter_context(server(command, ports[what], peer.ready, **environment))
            )
        check_answers(ports, found)
        cpu = ForeignCpu(pids)
        for number in range(asked.rounds):
            for streams in STREAMS:
                for what, port in ports.items():
                    rate = crowd_rate(port, streams, found[what].own)
                    if isinstance(rate, str):  # no figure for it, then
                        print(f"{what} fails at {streams} streams: {rate}", flush=True)
                        failed.add((what, streams))
                    else:
                        figures.setdefault((what, streams), []).append(rate)
            print(f"round {number + 1} of {asked.rounds}", file=sys.stderr)
        foreign = cpu.share()
    asked.foreign = foreign
    rows = []
    for (what, streams), rates in sorted(figures.items(), key=lambda item: item[0][1]):
        if (what, streams) in failed:
            continue
        rows.append(record.row(f"{what}, {streams} streams", "tok/s", *rates))
    return rows


def crowd_rate(port: int, streams: int, own: dict[str, Any]) -> float | str:
    """Tokens a second of so many greedy streams at once, or what went wrong."""

    async def crowd() -> list[Heard]:
        return await asyncio.gather(
            *(ask(port, "/v1/completions", greedy(n, own)) for n in range(streams))
        )

    began = time.perf_counter()
    heard = asyncio.run(crowd())
    seconds = time.perf_counter() - began
    if errors := [each.error for each in heard if each.error]:
        return f"{len(errors)} of {streams}, {errors[0]}"
    return sum(each.tokens or NEW_TOKENS for each in heard) / seconds


def greedy(number: int, own: dict[str, Any]) -> dict[str, Any]:
    """A request for a greedy text; each stream has a prompt of its own."""
    return {
        "prompt": f"Number {number} " + PROMPTS[number % len(PROMPTS)] * 4,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **own,
    }


def check_answers(ports: dict[str, int], found: dict[str, Peer]) -> None:
    """Raise unless the fp32 servers write the same; warms all up."""
    texts = {}
    for what, port in ports.items():
        heard = asyncio.run(ask(port, "/v1/completions", greedy(0, found[what].own)))
        if heard.error:
            raise SystemExit(f"error: {what}: {heard.error}")
        texts[what] = heard.text.replace("\ufffd", "")  # some leave out what is no character
    for what, text in texts.items():
        same = text == texts["octavo fp32"]
        print(f"{what:26} writes {'the same' if same else 'something else'}", file=sys.stderr)
        if not same and what.endswith(("fp32", "F32")):
            raise SystemExit(f"error: {what} writes {text!r}, octavo {texts['octavo fp32']!r}")


def share(ordered: list[float], part: float) -> float:
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def row(what: str, value: float, unit: str, seconds: list[float] | None = None) -> dict[str, Any]:
    """A result; its range is that of ``seconds``, in milliseconds, where they are given."""
    low, high = (1e3 * seconds[0], 1e3 * seconds[-1]) if seconds else (value, value)
    return {"what": what, "value": value, "unit": unit, "low": low, "high": high}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("what", choices=["load", "leave", "throughput"])
    parser.add_argument("run", nargs="?", help="for load and leave")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument(
        "--work", type=Path, help="for throughput: where the models are, or will be"
    )
    parser.add_argument(
        "--llama", default="", help="a folder that has llama_cpp, if Python has not"
    )
    asked = parser.parse_intermixed_args()
    if not (asked.work if asked.what == "throughput" else asked.run):
        sys.exit("error: name the run, or for throughput --work DIR")
    asked.foreign = None
    rows = {"load": load, "leave": leave, "throughput": throughput}[asked.what](asked)
    facts = {
        "versions": record.versions("octavo", "torch", "uvicorn", "fastapi"),
        "rounds": asked.rounds if asked.what == "throughput" else 1,
        "threads": asked.threads,
    }
    finish(f"serve-{asked.what}", asked, rows, facts, asked.foreign)


if __name__ == "__main__":
    main()
