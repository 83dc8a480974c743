"""`octavo grow`: a larger model that computes the same, to be trained on."""

import shlex
from argparse import Namespace

from octavo.commands.shared import Option, add_common, one_run, print_facts
from octavo.errors import ConfigError

WORDS = "RUN"
TAKES_SETTINGS = True
PAGE = """\
Begin a new run with a larger model that computes what the old one did, and train it on.

  octavo grow runs/my --out runs/larger model.n_layer=8 model.d_ff=2048
  octavo grow runs/my --out runs/longer model.block_size=1024
  octavo grow runs/my --out runs/grouped model.n_kv_head=2
  octavo train runs/larger --resume

Can grow: n_layer, d_ff, block_size, vocab_size (more ids than the tokenizer has are never written),
n_kv_head (up or down). Other sections, such as optim.lr=3e-4, become the new run's settings. Logits
are compared at once; where they cannot stay the same, the loss is printed, before and after."""


def add_options(option: Option) -> None:
    option("--out", metavar="RUN", help="the run directory to write")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    if not args.out:
        raise ConfigError("grow writes a new run", fix="name it with --out RUN")
    from octavo.language_model import load
    from octavo.training.growing import grow_run

    lm = load(one_run(args.words), device="cpu")
    print_facts({"run": args.out, **grow_run(lm, args.out, settings)}, args.json)
    if not args.json:
        print(f"train it on: octavo train {shlex.quote(args.out)} --resume")
