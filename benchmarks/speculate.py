"""Speculative decoding beside plain: the same text, in what time.

    octavo train TEXT --draft --out runs/my
    python benchmarks/speculate.py runs/my --preset nucleus --record

The run's own draft, and what followed the last tokens where they stood before (lookup), against
plain decoding on the same engine. All must write the same characters before anything is timed.
"""

import functools
from pathlib import Path

from measure import Work, measure, options, timed
from record import versions

TOKENS, CHECKED, TIMED = 256, 8, 40  # in a text; texts compared before, texts of a round
HOWS = {"plain": "off", "its draft": None, "lookup": "lookup"}


def work(run: Path, how: str | None, preset: str, weights: str) -> Work:
    """A model that writes one text more each round."""
    import octavo

    lm = octavo.load(run, speculate=how, weights=weights or None)
    seeds = iter(range(10**6))

    def write() -> str:
        return lm.generate("The ", TOKENS, preset=preset, seed=next(seeds))

    texts = [write() for _ in range(CHECKED)]
    return Work(texts, functools.partial(timed, write, TOKENS * TIMED, TIMED))


def same_texts(answers: dict[str, list[str]]) -> None:
    """Raise unless all wrote the same."""
    for what, texts in answers.items():
        if texts != answers["plain"]:
            raise SystemExit(f"error: {what} writes something else")
    print(f"{CHECKED} texts of {TOKENS} tokens are the same")


if __name__ == "__main__":
    parser = options("speculative decoding beside plain")
    parser.add_argument("run", type=Path)
    parser.add_argument("--preset", default="nucleus")
    parser.add_argument("--weights", default="", help="packed weights, for all")
    asked = parser.parse_args()
    asked.versions = versions("octavo", "torch")
    peers = {
        what: functools.partial(work, asked.run, how, asked.preset, asked.weights)
        for what, how in HOWS.items()
    }
    pairs = [(what, "plain") for what in HOWS if what != "plain"]
    name = f"speculate-{asked.run.name}-{asked.preset}"
    measure(name, peers, same_texts, "tokens/s", asked, pairs)
