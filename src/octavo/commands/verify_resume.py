"""`octavo verify-resume`: is a run that was killed the run it would have been."""

import dataclasses
import functools
import sys
from argparse import Namespace
from pathlib import Path

from octavo.commands.shared import Option, add_common, print_facts
from octavo.errors import ParityError

WORDS = "CONFIG.yaml | TEXT..."
TAKES_SETTINGS = True
PAGE = """\
Proof with your own configuration: trains it twice for some steps, kills one of the two at a random
step (SIGKILL), lets it go on, and compares every loss, the weights and the optimizer bit for bit.

  octavo verify-resume quickstart.yaml
  octavo verify-resume my.yaml --steps 200 --out runs/proof

The verdict is in OUT/resumed/verify-resume.json too. Exit code 8 where the two differ."""


def add_options(option: Option) -> None:
    option("--steps", type=int, default=24, metavar="N", help="steps to train; default: 24")
    option("--out", metavar="DIR", help="where the two runs go; default: runs/verify-NAME")
    option("--seed", type=int, metavar="N", help="kill at the same step again")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.studies.verify_resume import verify_resume
    from octavo.training.request import read_request

    request = read_request(args.words, settings)
    request = dataclasses.replace(request, name=f"verify-{request.name}", run=None)
    out = Path(request.directory(args.out, resume=False))
    say = functools.partial(print, file=sys.stderr)
    verdict = verify_resume(request.config, out, args.steps, args.seed, say)
    said = {"verdict": "bit for bit the same" if verdict.same else "NOT the same"}
    print_facts(vars(verdict) | ({} if args.json else said), args.json)
    if not verdict.same:
        raise ParityError(
            f"killed after step {verdict.killed_at} and resumed from {verdict.resumed_from}, the "
            f"run is another from step {verdict.first_difference} on",
            str(out),
            "compare what changed between the two starts; if nothing did, report it",
        )
