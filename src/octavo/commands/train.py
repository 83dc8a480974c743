"""`octavo train`: learn from a text, or go on with a run."""

import dataclasses
import shlex
import time
from argparse import SUPPRESS, Namespace

from octavo.commands.shared import Option, is_quiet, said_once
from octavo.settings import no_data_parallel

WORDS = "CONFIG.yaml | TEXT... | RUN"
TAKES_SETTINGS = True
PAGE = """\
Learn from a text, or go on with a run.

  octavo train my.txt                             a model of your own text, in runs/my
  octavo train notes/ 'more/*.md' book.txt        folders, globs and several files
  octavo train posts.jsonl data.field=text        a field of .jsonl or .csv
  cat *.txt | octavo train -                      standard input
  octavo train shakespeare                        a corpus by name: python-docs, shakespeare
  octavo train quickstart.yaml train.max_steps=500 --out runs/short
  octavo train runs/my --resume                   go on where it was stopped
  octavo train my.txt --budget 15m                a model chosen for a quarter of an hour
  octavo train my.txt --draft                     and a tiny model that makes it write faster
  torchrun --nproc-per-node 4 -m octavo train my.txt      on four GPUs: docs/distributed.md

A configuration names only what differs from the defaults below; a text named here wins over the
configuration's. Ctrl-C saves and exits with code 75. The run directory holds report.html. A draft
costs about a tenth of the training; octavo train RUN --draft gives one to a run that is there."""


def add_options(option: Option) -> None:
    option("--out", metavar="RUN", help="the run directory to write; default: runs/NAME")
    option("--resume", action="store_true", help="go on with the run that is there")
    option("--draft", action="store_true", help="then train a draft: it writes the same, faster")
    option("--budget", metavar="T", help="15m, 90s, 2h: end by then, with a model for that time")
    option("--config", metavar="FILE", help="the same as naming CONFIG.yaml")
    option("--wandb-project", metavar="P", help="log to W&B: log.to=[wandb] log.project=P")
    option("--wandb-run-name", metavar="R", help="log.run_name=R")
    option("--quiet", action="store_true", help="print nothing but errors")
    option("--data-parallel", action="store_true", help=SUPPRESS)


def run(args: Namespace, settings: list[str]) -> None:
    began, source = time.monotonic(), None
    from octavo.training.display import Display, seconds_of
    from octavo.training.draft import train_draft
    from octavo.training.loop import train
    from octavo.training.request import read_request

    args.quiet = is_quiet(args)
    if args.wandb_project:
        settings += ["log.to=[wandb]", f"log.project={args.wandb_project}"]
    if args.wandb_run_name:
        settings.append(f"log.run_name={args.wandb_run_name}")
    with said_once():
        if args.data_parallel:
            raise no_data_parallel()
        if args.budget:
            settings.insert(0, f"train.budget={seconds_of(args.budget)}")
        request = read_request([*args.words, *([args.config] if args.config else [])], settings)
        out = request.directory(args.out, args.resume)
        config = request.config
        if args.budget and request.texts and not out.exists():
            from octavo.studies.budget import choose

            with Display(args.quiet) as display:
                config, source = choose(config, settings, out, began, display)
    resume = args.resume or request.run is not None
    if args.draft and request.run is None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, draft=True))
    result = train(config, out, resume=resume, quiet=args.quiet, began=began, source=source)
    if args.draft and request.run is not None:  # a new run's is trained with it
        train_draft(result.run, quiet=args.quiet)
    if not args.quiet:
        run = shlex.quote(str(result.run))
        print(f"curves and samples:  {result.run / 'report.html'}")
        if (result.run / "tokenizer.json").exists():
            print(f"let it write:        octavo generate {run} --preset nucleus --stream")
        print("your own text next:  octavo train my.txt")
