"""`octavo generate`: let a model write."""

import sys
from argparse import Namespace
from typing import Any

from octavo.commands.shared import Option, add_common, one_run

WORDS = "RUN"
PAGE = """\
Let a model write: prints the continuation of the prompt and nothing else.

  octavo generate runs/my --prompt "The "
  octavo generate runs/my --prompt "The " --temperature 0.8 --top-p 0.9 --stop "."
  octavo generate runs/my --preset greedy --max-new-tokens 50
  octavo generate runs/my --interactive
  octavo generate runs/my --weights int8          packed weights (octavo quantize runs/my --to int8)
  octavo generate runs/my --speculate lookup      the same text, faster where it repeats itself

Without RUN the newest one under runs/ is taken. The same seed writes the same text.
Presets: conservative (temperature 0.6, top-k 40), nucleus (0.8, top-p 0.9), greedy.

A draft guesses the next tokens and the model checks them together. The text never changes; what a
draft costs is measured, and one that does not pay is left alone. A draft trained beside the run
(octavo train RUN --draft) is used unless --speculate says otherwise."""
SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "flatter above 1, sharper below; 0 is greedy"),
    "top_k": (int, "keep the K likeliest tokens; 0 keeps all"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "min_p": (float, "keep tokens at least this share as likely as the likeliest"),
    "typical_p": (float, "keep the tokens closest to the expected surprise"),
    "repetition_penalty": (float, "above 1 makes tokens already there less likely"),
    "presence_penalty": (float, "subtracted once from tokens already written"),
    "frequency_penalty": (float, "subtracted for each time a token was written"),
    "seed": (int, "same seed, same text"),
}


def add_options(option: Option) -> None:
    option("--prompt", metavar="TEXT", help="what to write on from; default: begin a new text")
    add_writing_options(option)
    option("--n", type=int, default=1, metavar="K", help="write K texts")
    option("--stream", action="store_true", help="print as it is written; a terminal always does")
    option("--interactive", action="store_true", help="prompt after prompt; Ctrl-D ends")
    option(
        "--speculate",
        metavar="HOW",
        help="what guesses: off, lookup, auto (the run's draft, else lookup) or a smaller RUN",
    )
    add_common(option, "json")


def add_writing_options(option: Option) -> None:
    """How to write, and with which of the run's weights."""
    option("--max-new-tokens", "--max-tokens", type=int, default=200, metavar="N", help="length")
    option(
        "--preset", metavar="P", help="conservative, nucleus or greedy; what follows wins over it"
    )
    for name, (kind, meaning) in SAMPLING.items():
        option("--" + name.replace("_", "-"), type=kind, metavar="X", help=meaning)
    option("--stop", action="append", default=[], metavar="S", help="end before S; may be repeated")
    add_common(option, "weights", "base", "device")


def sampling_given(args: Namespace) -> dict[str, Any]:
    """The preset and the sampling settings that were named."""
    named = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return {"preset": args.preset, **named}


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.generating.terminal import talk, write_out
    from octavo.language_model import load

    path = one_run(args.words)
    lm = load(path, args.device, args.base, speculate=args.speculate, weights=args.weights)
    how = {"max_new_tokens": args.max_new_tokens, "stop": args.stop, **sampling_given(args)}
    if args.interactive:
        talk(lm, how)
    else:
        write_out(lm, args.prompt, args.n, how, args.stream, args.json)
    if args.speculate and lm.pace and not args.json:
        print(lm.pace, file=sys.stderr)
