"""`octavo report`: a run's page drawn anew, or several runs laid over each other."""

from argparse import Namespace

from octavo.commands.shared import Option, one_run, print_facts
from octavo.errors import ConfigError

WORDS = "RUN..."
PAGE = """\
Draw a run's report.html anew, or lay several runs over each other on one page.

  octavo report runs/my                     runs/my/report.html: curves, samples, settings, spikes
  octavo report runs/a runs/b runs/c        comparison.html: their curves, and where they differ
  octavo report runs/* --out all.html
  octavo report runs/a/metrics.jsonl runs/b a metrics file does for a run

The page is one file, opens offline, and is drawn from metrics.jsonl alone. Of a run that is being
trained it shows what was logged so far; a last line that a kill left torn is passed over."""


def add_options(option: Option) -> None:
    option("--out", metavar="FILE.html", help="of several runs: the page; default: comparison.html")
    option("--json", action="store_true", help="print the page's path as a JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.reporting.report import draw_run, write_comparison

    if len(args.words) > 1:
        page = write_comparison(args.words, args.out or "comparison.html")
    elif args.out:
        raise ConfigError("the page of one run lies in the run", fix=f"leave out --out {args.out}")
    else:
        page = draw_run(one_run(args.words))
    print_facts({"page": str(page)}, args.json, str(page))
