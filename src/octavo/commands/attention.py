"""`octavo attention`: a picture of what every head looks at."""

import sys
from argparse import Namespace
from pathlib import Path

from octavo.commands.explain import read_ids, text_of
from octavo.commands.shared import Option, add_common, one_run, print_facts
from octavo.errors import ConfigError

WORDS = "RUN"
PAGE = """\
Draw what each head looks at while it reads a text: one map a head, for a paper or a slide.

  octavo attention runs/my --text "To be, or not to be" --out heads.png
  octavo attention runs/my --text "To be, or not to be" --layer 2 --out layer.png
  octavo attention runs/my --text "To be, or not to be" --layer 2 --head 0 --out head.png

Layers and heads count from 0, as in the names of the weights. octavo explain has the same on a page
to hover over; training with log.attention=true keeps the attention of its samples in the run."""


def add_options(option: Option) -> None:
    option("--text", metavar="TEXT", help="the text")
    option("--file", metavar="FILE", help="the text, from a file; - is standard input")
    option("--out", default="attention.png", metavar="FILE", help="default: attention.png")
    option("--layer", type=int, metavar="N", help="only this layer")
    option("--head", type=int, metavar="N", help="only this head")
    add_common(option, "base", "device", "json")


def run(args: Namespace, settings: list[str]) -> None:
    if (args.text is None) == (args.file is None):
        raise ConfigError("which text?", fix="give --text or --file")
    if Path(args.out).suffix != ".png":
        raise ConfigError(f"--out is {args.out}", fix="give a name that ends in .png")
    from octavo.explaining.heads import MOST_TOKENS, attention_of, draw_heads, labels
    from octavo.language_model import load

    lm = load(one_run(args.words), args.device, args.base)
    ids = read_ids(lm, text_of(args.text, args.file))
    most = min(lm.config.block_size, MOST_TOKENS)
    if len(ids) > most:
        print(f"the text has {len(ids):,} tokens: the first {most:,} are drawn", file=sys.stderr)
    drawn = ids[:most]
    weights = attention_of(lm, drawn)
    title = f"Attention in {lm.home.resolve().name}" if lm.home else "Attention"
    draw_heads(weights, labels(lm, drawn), args.out, title, args.layer, args.head)
    facts = {"picture": args.out, "tokens": len(drawn), "left_out": len(ids) - len(drawn)}
    print_facts(facts, args.json, f"drawn: {args.out}, {len(drawn):,} tokens")
