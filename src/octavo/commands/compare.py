"""`octavo compare`: is one better than the other, or is it chance."""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from octavo.commands.shared import Option, add_common, exactly, print_facts
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.studies.comparing import Comparison

WORDS = "RUN RUN"
PAGE = """\
Which of two runs is better, and is that evidence or chance? Both read the same windows of the text
they were validated on; their differences are paired, and an interval says how sure it is.

  octavo compare runs/learned runs/rope
  octavo compare runs/a runs/b --text other.txt      a text that neither learned from
  octavo compare 'runs/learned-*' 'runs/rope-*'      several seeds a side: in quotes,
  octavo compare runs/a1,runs/a2 runs/b1,runs/b2       with commas, or a folder of runs
  octavo compare runs/a runs/b --hellaswag hellaswag_val.jsonl
  octavo compare --scores 0.3036 0.3074 --items 10042
                                                     two published scores of a benchmark

Several runs on a side are taken for seeds of one method. Runs with different tokenizers or contexts
are compared in bits a byte of the same text."""


def add_options(option: Option) -> None:
    option("--text", metavar="FILE", help="judge on this text, not on the runs' validation part")
    option(
        "--windows", type=int, metavar="N", help="how many; default: as the runs were validated on"
    )
    option("--hellaswag", metavar="FILE", help="also on these items; download: the official ones")
    option("--protocol", default="completion", choices=("completion", "harness"), help="how")
    option("--limit", type=int, default=0, metavar="N", help="only the first N items")
    option("--scores", action="store_true", help="the two words are shares of right answers")
    option("--items", type=int, metavar="N", help="how many items those scores are of")
    add_common(option, "device", "json")


def run(args: Namespace, settings: list[str]) -> None:
    fix = "several runs of a side: a pattern in quotes, or commas between them"
    a, b = exactly(args.words, WORDS, fix)
    if args.scores:
        _published(args)
        return
    if args.items:
        raise ConfigError("--items belongs to --scores")
    if args.windows is not None and args.windows < 2:
        raise ConfigError(f"--windows is {args.windows}", fix="give 2 or more")
    from octavo.evaluating.hellaswag import read_items
    from octavo.studies.comparing import Benchmark, compare_runs

    items = read_items(args.hellaswag, args.limit) if args.hellaswag else []
    benchmark = Benchmark(items, args.protocol) if items else None
    found = compare_runs(a, b, args.text, args.windows, benchmark, args.device)
    facts = {
        "a": found.runs[0],
        "b": found.runs[1],
        "judged_on": found.judged_on,
        "findings": {finding.quantity: finding.to_dict() for finding in found.findings},
        "remarks": found.remarks,
    }
    print_facts(facts, args.json, "\n".join(_lines(found, args.words)))


def _lines(found: "Comparison", words: list[str]) -> Iterator[str]:
    """Each side's means, what they were judged on, and what that says."""
    for side, (word, runs) in enumerate(zip(words, found.runs, strict=True)):
        means = [
            f"{f.means[side]:.{2 if f.quantity.startswith('%') else 4}f} {f.quantity}"
            for f in found.findings
        ]
        several = f" ({len(runs)} runs)" if len(runs) > 1 else ""
        yield f"{'AB'[side]}  {word}{several}: {', '.join(means)}"
    yield f"on {found.judged_on}\n"
    yield from (finding.sentence for finding in found.findings)
    yield from (f"- {remark}" for remark in found.remarks)


def _published(args: Namespace) -> None:
    """Two shares of right answers from a table: what they say without the answers."""
    from octavo.evaluating.compare import published, published_sentence

    try:
        a, b = map(float, args.words)
    except ValueError:
        raise ConfigError(
            f"{' and '.join(args.words)} are no two scores", fix="give shares: 0.3036 0.3074"
        ) from None
    if args.items is None:
        raise ConfigError("how many items are these scores of?", fix="say --items N")
    result = published(a, b, args.items)
    sentence = published_sentence(result, a, b, args.items)
    facts = {"a": a, "b": b, "items": args.items, **vars(result), "sentence": sentence}
    known = {name: fact for name, fact in facts.items() if fact != math.inf}
    print_facts(known, args.json, sentence)
