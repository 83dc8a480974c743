"""`octavo grow`: a larger model that computes the same, to be trained on."""

import shlex
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, one_run, print_facts
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.adapting.grow import Growth
    from octavo.language_model import LanguageModel
    from octavo.training.task import Task

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
    """What may be typed besides the words."""
    option("--out", metavar="RUN", help="the run directory to write")
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
    if not args.out:
        raise ConfigError("grow writes a new run", fix="name it with --out RUN")
    import torch

    from octavo.adapting.grow import grow
    from octavo.config import load_config
    from octavo.language_model import load
    from octavo.training.task import prepare

    lm = load(one_run(args.words), device="cpu")
    if lm.run is None:
        raise ConfigError("only a run can grow", fix="bring it in first: octavo import")
    config = load_config(lm.run.path / "config.yaml", settings)
    task = prepare(config, "cpu", lm.run.path, lm.tokenizer)
    before, after = vars(lm.config), vars(task.config.model)
    changes = {name: value for name, value in after.items() if value != before[name]}
    torch.manual_seed(config.train.seed)
    growth = grow(lm.model, **changes)
    facts: dict[str, Any] = {
        "run": args.out,
        "grown": {name: f"{before[name]} -> {value}" for name, value in changes.items()},
        "parameters": sum(parameter.numel() for parameter in growth.model.parameters()),
        "computes_the_same": growth.exact,
        "largest_change_of_a_logit": growth.difference,
    }
    if not growth.exact:
        facts |= _losses(lm, growth)
    _write_run(args.out, lm, task, growth, facts)
    print_facts(facts, args.json)
    if not args.json:
        print(f"train it on: octavo train {shlex.quote(args.out)} --resume")


def _losses(lm: "LanguageModel", growth: "Growth") -> dict[str, Any]:
    """The loss on the old run's validation windows, before and after."""
    from octavo.evaluating.perplexity import score_windows
    from octavo.training.task import prepare

    assert lm.run is not None
    task = prepare(lm.run.config, "cpu", lm.run.path, lm.tokenizer)
    if task.val is None:
        return {"remarks": ["there is no validation text to say what the change costs"]}
    before, after = (score_windows(model, *task.val).loss for model in (lm.model, growth.model))
    return {"loss_before": before, "loss_after": after, "change_in_loss": after - before}


def _write_run(
    out: str, lm: "LanguageModel", task: "Task", growth: "Growth", facts: dict[str, Any]
) -> None:
    """A new run whose only checkpoint, at step 0, holds the grown model and no optimizer state."""
    from dataclasses import replace

    import torch

    from octavo.checkpoint import Run
    from octavo.training.learner import Progress

    assert lm.checkpoint is not None
    config = replace(task.config, model=growth.model.config)
    run = Run.create(out, config, task.tokenizer, files=task.files)
    state = vars(Progress()) | {"scaler": {}, "threads": torch.get_num_threads()}
    facts = {"grown_from": str(lm.checkpoint.resolve()), **facts}
    with run.locked():
        run.save(0, growth.model.state_dict(), {}, state, keep=config.checkpoint.keep, facts=facts)
