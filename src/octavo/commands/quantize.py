"""`octavo quantize`: pack a run's weights, and say what that costs and gives."""

import math
import re
from argparse import Namespace

from octavo.commands.shared import Option, add_common, one_run, print_facts
from octavo.errors import ConfigError

WORDS = "RUN"
PAGE = """\
Pack a run's weights: a quarter (int8) or a seventh (int4) of the size, for writing faster.

  octavo quantize runs/my --to int8
  octavo quantize runs/my --to auto --max-perplexity-increase 1%
  octavo generate runs/my --weights int8 --prompt "The "

Prints size, perplexity, divergence and tokens a second, before and after. Measured on --text FILE,
else on the run's validation text, else on what the model itself writes. auto looks for the smallest
mix of int8 and int4 that keeps to the bound; where there is none it exits with code 8. The others
only warn. Weights are packed into RUN/packed and serve the checkpoint they were made from alone."""


def add_options(option: Option) -> None:
    option("--to", metavar="P", help="fp16, int8, int4 or auto")
    option(
        "--max-perplexity-increase",
        metavar="X",
        help="how much auto may raise perplexity, e.g. 0.5%%; default: 1%%",
    )
    option("--text", metavar="FILE", help="measure on this; default: the run's validation text")
    add_common(option, "base", "json")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.packed import PRECISIONS

    if args.to not in PRECISIONS:
        what = f"cannot pack to {args.to!r}" if args.to else "pack to what?"
        raise ConfigError(what, fix=f"--to {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")
    bound = args.max_perplexity_increase
    if bound is not None and args.to != "auto":
        raise ConfigError("only auto keeps to a bound", fix="add --to auto")
    share = read_share(bound or "1%")
    from octavo.studies.quantize_search import quantize_run

    facts = quantize_run(one_run(args.words), args.to, args.text, share, args.base)
    hidden = ("format", "version", "tied", "weights_sha256", "versions", "file")
    print_facts({name: value for name, value in facts.items() if name not in hidden}, args.json)


def read_share(text: str) -> float:
    """``1%`` or ``0.01`` as 0.01; a `ConfigError` for what is no share."""
    number = re.fullmatch(r"(\d*\.?\d+) *(%?)", text.strip())
    share = float(number[1]) / (100 if number[2] else 1) if number else math.nan
    if not 0 <= share < 1:
        raise ConfigError(f"{text!r} is no share", fix="write 1% or 0.01")
    return share
