"""`octavo finetune`: teach a model that can write something more."""

import shlex
from argparse import Namespace

from octavo.commands.shared import Option, is_quiet, said_once

WORDS = "RUN TEXT..."
TAKES_SETTINGS = True
PAGE = """\
Teach a model something more: low-rank adapters beside its frozen weights (LoRA), or all of it.

  octavo finetune runs/my voice.txt                 adapters, in runs/my-voice
  octavo finetune runs/my voice.txt --all           every weight
  octavo finetune runs/my answers.jsonl             {"prompt", "completion"}: the completion
  octavo finetune runs/my talk.jsonl                {"messages": [...]}: the assistant's turns
  octavo finetune runs/my mail.csv --labels         text, label: a classifier
  octavo finetune runs/my mail.csv --labels --head  only its head is trained
  octavo merge runs/my-voice --out runs/merged      one plain model of both

The new run holds the adapter alone and names its base by path and SHA-256. Every setting of train
applies, e.g. lora.rank=16 lora.targets=[q_proj,k_proj]; unless said otherwise
train.max_steps=300 train.micro_batch_size=16 eval.every=50 checkpoint.every=100."""


def add_options(option: Option) -> None:
    option("--out", metavar="RUN", help="the run directory to write; default: runs/BASE-DATA")
    option("--resume", action="store_true", help="go on with the run that is there")
    option("--all", action="store_true", help="train every weight, without adapters")
    option("--labels", action="store_true", help="learn to tell the records' labels")
    option("--head", action="store_true", help="with --labels: train the head alone")
    option("--quiet", action="store_true", help="print nothing but errors")


def run(args: Namespace, settings: list[str]) -> None:
    args.quiet = is_quiet(args)
    from octavo.training.loop import train
    from octavo.training.request import finetune_request

    with said_once():
        request = finetune_request(args.words, settings, args.all, args.head, args.labels)
        out = request.directory(args.out, args.resume)
    result = train(request.config, out, resume=args.resume, quiet=args.quiet)
    if not args.quiet:
        run = shlex.quote(str(result.run))
        print(f"curves and samples:  {result.run / 'report.html'}")
        if args.labels:
            print(f"which for which:     {result.run / 'confusion.png'}")
        else:
            print(f"let it write:        octavo generate {run} --preset nucleus --stream")
            print(f"one plain model:     octavo merge {run} --out {run}-merged")
