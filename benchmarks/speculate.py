"""Speculative decoding beside plain: the same text, in what time.

    octavo train TEXT --draft --out runs/my
    python benchmarks/speculate.py runs/my --preset nucleus --record

The run's own draft, and what followed the last tokens where they stood before (lookup), against
plain decoding on the same engine, of which there are two: what they differ by is what the
measure is worth. All are in one process and write text after text by turns, since processes beside
each other differ by a tenth with nothing changed; each round opens them anew, so that where their
memory happens to lie is part of the noise. All must write the same characters.
"""

import sys
import time
from pathlib import Path
from typing import Any

import record
from measure import ForeignCpu, finish, interval, options

TOKENS, TEXTS = 256, 16  # in a text; texts of a round, after one to warm up
PLAIN = "plain"
HOWS = {PLAIN: "off", "plain again": "off", "its draft": None, "lookup": "lookup"}


def one_round(number: int, asked: Any) -> dict[str, float]:
    """Tokens a second of each way."""
    import octavo

    shift = number % len(HOWS)
    order = [*HOWS, *HOWS][shift : shift + len(HOWS)]
    weights = asked.weights or None
    ways = {w: octavo.load(asked.run, speculate=HOWS[w], weights=weights) for w in order}
    seconds = dict.fromkeys(order, 0.0)
    for seed in range(TEXTS + 1):
        texts = {}
        for what in order if seed % 2 else reversed(order):
            started = time.perf_counter()
            texts[what] = ways[what].generate("The ", TOKENS, preset=asked.preset, seed=seed)
            seconds[what] += (time.perf_counter() - started) * bool(seed)
        for what, text in texts.items():
            if text != texts[PLAIN]:
                sys.exit(f"error: {what} writes something else with seed {seed}")
    return {what: TOKENS * TEXTS / seconds[what] for what in HOWS}


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--preset", default="nucleus")
    parser.add_argument("--weights", default="", help="packed weights, for all")
    asked = parser.parse_args()
    cpu = ForeignCpu([])
    rates: dict[str, list[float]] = {what: [] for what in HOWS}
    for number in range(asked.rounds):
        for what, rate in one_round(number, asked).items():
            rates[what].append(rate)
        print(f"round {number + 1} of {asked.rounds}", file=sys.stderr)
    rows = [record.row(what, "tokens/s", *of) for what, of in rates.items()]
    plain, again, *others = rates
    both = [(one + other) / 2 for one, other in zip(rates[plain], rates[again], strict=True)]
    rows.append(interval(f"{again} / {plain}, 95 % interval", rates[again], rates[plain]))
    rows += [interval(f"{what} / {plain}, 95 % interval", rates[what], both) for what in others]
    facts = {"versions": record.versions("octavo", "torch"), "rounds": asked.rounds}
    facts |= {"threads": asked.threads}
    finish(f"speculate-{asked.run.name}", asked, rows, facts, cpu.share())


if __name__ == "__main__":
    main()
