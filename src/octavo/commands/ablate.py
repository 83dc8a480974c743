"""`octavo ablate`: which settings are worth having, by a small fair study."""

import contextlib
import sys
from argparse import Namespace

from octavo.commands.shared import Option, add_common, print_facts, progress
from octavo.disk import write_atomic
from octavo.errors import MissingExtraError
from octavo.manifest import to_json
from octavo.text.files import counted

WORDS = "CONFIG.yaml | TEXT..."
TAKES_SETTINGS = True
PAGE = """\
Which settings are worth having: every combination is trained under several seeds, for the same
tokens or the same time, and judged on the same windows, with intervals.

  octavo ablate my.txt                            {learned, rope} x {gelu, swiglu} x
                                                  {layernorm, rmsnorm}, 3 seeds: 24 runs
  octavo ablate small.yaml --vary model.position=learned,rope --seeds 5
  octavo ablate small.yaml --vary optim.lr=1e-3,3e-3 --vary model.n_layer=4,6 --equal time
  octavo ablate small.yaml train.max_steps=500    a setting without --vary holds for all arms

Values are apart by commas; a value that is a list keeps its brackets. The same command again goes
on where it was stopped, and with more --seeds it adds runs. Each arm's runs are a folder, so
octavo compare DIR/learned DIR/rope reads them too. With --equal time a short probe measures each
arm's speed first; train.max_steps follows from it, so that every schedule ends."""


def add_options(option: Option) -> None:
    option(
        "--vary", action="append", default=[], metavar="S.N=A,B", help="a setting and its values"
    )
    option("--seeds", type=int, default=3, metavar="N", help="runs of each arm")
    option("--equal", default="tokens", choices=("tokens", "time"), help="what all arms get")
    option("--minutes", type=float, metavar="M", help="of each run, with --equal time")
    option("--windows", type=int, metavar="N", help="to judge on; default: eval.windows")
    option("--out", metavar="DIR", help="the study's directory; default: runs/ablation-NAME")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.studies.ablate import begin, plan_study, read_vary, train_runs
    from octavo.studies.ablation import judge_study
    from octavo.studies.ablation_picture import draw_ablation

    vary = read_vary(args.vary, settings)
    study = plan_study(args.words, settings, vary, args.seeds, args.out, args.equal, args.minutes)
    runs, seeds = counted(len(study.jobs), "run"), counted(len(study.seeds), "seed")
    print(f"{len(study.arms)} arms, {seeds}: {runs} in {study.out}", file=sys.stderr)
    study = begin(study)
    with progress("training") as watch:
        for number, line in train_runs(study):
            print(line, file=sys.stderr)
            watch(number, len(study.jobs))
    found = judge_study(study, args.windows)
    write_atomic(study.out / "ablation.json", to_json(found.to_dict()))
    with contextlib.suppress(MissingExtraError):  # a picture more, where matplotlib is
        draw_ablation(found, study.out / "ablation.png")
    said = [*found.lines(), "", f"the same in {study.out / 'ablation.json'} and ablation.png"]
    print_facts(found.to_dict(), args.json, "\n".join(said))
