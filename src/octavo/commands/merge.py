"""`octavo merge`: one plain model of a base and its adapter."""

from argparse import Namespace

from octavo.commands.shared import Option, add_common, one_run, print_facts
from octavo.errors import ConfigError

WORDS = "RUN"
PAGE = """\
Fold a run's adapter into the weights of its base: a run like any other.

  octavo merge runs/my-voice --out runs/my-merged

Logits before and after are compared at once: if they differ by more than 1e-5 of the largest,
nothing is written and the exit code is 8."""


def add_options(option: Option) -> None:
    option("--out", metavar="RUN", help="the run directory to write")
    option("--base", metavar="RUN", help="where the base is, if it was moved")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    if not args.out:
        raise ConfigError("merge writes a new run", fix="name it with --out RUN")
    from octavo.language_model import load
    from octavo.training.merging import merge_run

    lm = load(one_run(args.words), device="cpu", base=args.base)
    print_facts({"run": args.out, **merge_run(lm, args.out)}, args.json)
