"""`octavo plan`: what a run will cost."""

import dataclasses
import json
import time
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.commands.shared import Option
from octavo.text.files import counted

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.studies.plan import Plan

WORDS = "CONFIG.yaml | TEXT... | RUN"
TAKES_SETTINGS = True
PAGE = """\
What a run will cost, before it begins. Parameters, operations, memory, disk and epochs are counted;
then a run in small measures its memory and speed on this machine, which says when it will end.

  octavo plan my.txt model.n_layer=12
  octavo plan gpt2-124m.yaml --no-probe           count only
  octavo plan runs/my train.max_steps=5000        what is left of a run
  octavo plan my.yaml --json

It takes what octavo train takes; where model.vocab_size is named, the text need not be there yet.
Memory is what training adds to the process. The probe leaves nothing behind; where it would take
over a minute it is left out, unless --probe asks for it."""


def add_options(option: Option) -> None:
    """What may be typed besides the words."""
    option("--out", metavar="RUN", help="the run directory to be written; default: runs/NAME")
    option("--probe", action=BooleanOptionalAction, help="measure by a run in small, or do not")
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
    from rich.console import Console

    from octavo.checkpoint import Run
    from octavo.errors import DataError, ResourceError
    from octavo.language_model import choose_device
    from octavo.manifest import read_manifest
    from octavo.studies.plan import make_plan, without_text
    from octavo.training.request import read_request
    from octavo.training.task import prepare

    request = read_request(args.words, settings)
    out = request.directory(args.out, resume=False)
    there = Run.find(out) if request.run else None
    device = choose_device(request.config.train.device)
    console, started = Console(stderr=True), time.monotonic()
    try:
        task = prepare(request.config, device.type, out, there.tokenizer if there else None)
    except (DataError, ResourceError) as error:
        if not request.config.model.vocab_size:
            raise
        task = without_text(request.config, f"counted without the text: {error}")
    prepared = time.monotonic() - started
    done = read_manifest(there.latest).step if there and there.latest else 0
    with console.status("measuring a run in small ..."):
        plan = make_plan(task, device, _existing(out), done, args.probe, prepared)
    if args.json:
        print(json.dumps(dataclasses.asdict(plan), ensure_ascii=False))
        return
    page = Console(highlight=False)
    page.print(table(plan))
    for remark in plan.remarks:
        page.print(f"! {remark}", markup=False, soft_wrap=True)


def _existing(out: Path) -> Path:
    """The nearest folder above ``out`` that is there: on the disk that the run will use."""
    return next(folder for folder in out.resolve().parents if folder.is_dir())


def table(plan: "Plan") -> "Table":
    """The figures in five groups, for 80 columns and without colour."""
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(style="dim")
    for group in (_model, _text, _memory, _disk, _time):
        for number, cells in enumerate(group(plan)):
            name = group.__name__.removeprefix("_") if number == 0 else ""
            rows.add_row(name, *cells)
    return rows


Rows = list[tuple[str, str, str]]


def _model(plan: "Plan") -> Rows:
    from octavo.studies.plan_remarks import operations

    groups = {name.replace("_", " "): n for name, n in plan.parameters.items() if n}
    rows = [("parameters", f"{plan.parameters_total:,}", "")]
    rows += [
        (f"  {name}", f"{n:,}", f"{n / plan.parameters_total:.1%}") for name, n in groups.items()
    ]
    if plan.parameters_trainable != plan.parameters_total:
        rows.append(("trained", f"{plan.parameters_trainable:,}", "the rest is frozen"))
    training = f"three times that in training, {operations(plan.training_flops)} in all"
    return [*rows, ("operations a token", operations(plan.flops_a_token), training)]


def _text(plan: "Plan") -> Rows:
    from octavo.studies.plan_remarks import amount

    there = plan.tokens_in_text > 0
    return [
        ("tokens to learn from", f"{plan.tokens_in_text:,}" if there else "unknown", ""),
        ("tokens a step", f"{plan.tokens_a_step:,}", f"{amount(plan.tokens_in_all)} in all"),
        ("epochs", f"{plan.epochs:,.2f}" if there else "unknown", ""),
        ("tokens a parameter", f"{plan.tokens_a_parameter:,.3g}", "20 spend compute best"),
    ]


def _memory(plan: "Plan") -> Rows:
    from octavo.studies.plan_remarks import size

    found, memory = plan.measured, plan.memory
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    rows = [("a step, predicted", size(memory.step), "not all of it at once:")]
    rows += [(f"  {name}", size(getattr(memory, name)), "") for name in parts]
    if found is not None:
        off = memory.step / found.step_bytes - 1
        rows.append(("a step, measured", size(found.step_bytes), f"predicted {off:+.0%}"))
    most = found.peak_bytes if found else memory.peak
    rows.append(("with validation", size(most), f"{size(plan.memory_free_bytes)} are free"))
    if plan.fitting:
        rows_a_pass, passes = plan.fitting.values()
        note = f"the largest that fits; {passes:,} a step"
        rows.append(("micro-batch", counted(rows_a_pass, "row"), note))
    return rows


def _disk(plan: "Plan") -> Rows:
    from octavo.studies.plan_remarks import size

    free = f"{size(plan.disk_free_bytes)} are free"
    return [
        ("a checkpoint", size(plan.checkpoint_bytes), f"weights {size(plan.weights_bytes)}"),
        ("all that are kept", size(plan.disk_bytes), free),
    ]


def _time(plan: "Plan") -> Rows:
    steps = f"{plan.steps_left:,} steps"
    if plan.measured is None:
        return [("in all, a guess", span(plan.seconds), f"for {steps}; --probe measures")]
    parts = [(f"  {what}", span(took), "") for what, took in plan.times.items() if took >= 0.5]
    return [
        ("tokens a second", f"{plan.tokens_per_s:,.0f}", f"{plan.measured.step:.3g} s a step"),
        ("in all", span(plan.seconds), steps),
        *parts,
        ("ends at", *_clock(plan.ends)),
    ]


def _clock(ends: str) -> tuple[str, str]:
    from datetime import datetime

    moment = datetime.fromisoformat(ends)
    return f"{moment:%H:%M}", f"{moment:%A, %d %B %Y}"


def span(seconds: float) -> str:
    """A length of time in its two largest units: 41 s, 3 min 20 s, 2 h 5 min, 3.2 days."""
    if (days := seconds / 86400) >= 2:
        return f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
