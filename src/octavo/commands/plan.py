"""`octavo plan`: what a run will cost."""

from argparse import Namespace

from octavo.commands.shared import Option, print_facts

WORDS = "CONFIG.yaml | TEXT... | RUN"
TAKES_SETTINGS = True
PAGE = """\
What a run will cost, by arithmetic: parameters by group, operations, memory, disk, epochs.

  octavo plan my.txt model.n_layer=12
  octavo plan gpt2-124m.yaml --json"""


def add_options(option: Option) -> None:
    """What may be typed besides the words."""
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
    from octavo.training.plan import make_plan
    from octavo.training.request import read_request
    from octavo.training.task import prepare

    request = read_request(args.words, settings)
    out = request.directory(None, resume=False)
    print_facts(vars(make_plan(prepare(request.config, "cpu", out))), args.json)
