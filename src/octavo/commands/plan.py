"""`octavo plan`: what a run will cost."""

import dataclasses
import datetime
import time
from argparse import BooleanOptionalAction, Namespace
from typing import TYPE_CHECKING

from octavo.commands.shared import Option, add_common, print_facts
from octavo.errors import DataError, ResourceError
from octavo.studies.readable import aligned, amount, scaled, size
from octavo.text.files import counted

if TYPE_CHECKING:
    from octavo.studies.plan import Plan

Rows = list[tuple[str, str, str]]
"""What a figure is, the figure, and a note on it."""
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
    option("--out", metavar="RUN", help="the run directory to be written; default: runs/NAME")
    option("--probe", action=BooleanOptionalAction, help="measure by a run in small, or do not")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    from rich.console import Console

    from octavo.checkpoint import Run
    from octavo.language_model import choose_device
    from octavo.manifest import read_manifest
    from octavo.studies.plan import make_plan, without_text
    from octavo.training.request import read_request
    from octavo.training.task import prepare

    request = read_request(args.words, settings)
    out = request.directory(args.out, resume=False)
    there = Run.find(out) if request.run else None
    device = choose_device(request.config.train.device)
    started = time.monotonic()
    try:
        task = prepare(request.config, device.type, out, there.tokenizer if there else None)
    except (DataError, ResourceError) as error:
        if not request.config.model.vocab_size:
            raise
        task = without_text(request.config, f"counted without the text: {error}")
    prepared = time.monotonic() - started
    done = read_manifest(there.latest).step if there and there.latest else 0
    beside = next(folder for folder in out.resolve().parents if folder.is_dir())  # the same disk
    with Console(stderr=True).status("measuring a run in small ..."):
        plan = make_plan(task, device, beside, done, args.probe, prepared)
    groups = {"model": _model, "text": _text, "memory": _memory, "disk": _disk, "time": _time}
    rows = [
        (name if number == 0 else "", *cells)
        for name, group in groups.items()
        for number, cells in enumerate(group(plan))
    ]
    said = [*aligned(rows, "<<><"), *(f"! {remark}" for remark in plan.remarks)]
    print_facts(dataclasses.asdict(plan), args.json, "\n".join(said))


def _model(plan: "Plan") -> Rows:
    total = plan.parameters_total
    rows = [("parameters", f"{total:,}", "")]
    rows += [
        (f"  {name.replace('_', ' ')}", f"{n:,}", f"{n / total:.1%}")
        for name, n in plan.parameters.items()
        if n
    ]
    if plan.parameters_trainable != total:
        rows.append(("trained", f"{plan.parameters_trainable:,}", "the rest is frozen"))
    rows.append(("operations a token", f"{scaled(plan.flops_a_token)}FLOP", "thrice in training"))
    return [*rows, ("operations in all", f"{scaled(plan.training_flops)}FLOP", "")]


def _text(plan: "Plan") -> Rows:
    there = plan.tokens_in_text > 0
    return [
        ("tokens to learn from", f"{plan.tokens_in_text:,}" if there else "unknown", ""),
        ("tokens a step", f"{plan.tokens_a_step:,}", f"{amount(plan.tokens_in_all)} in all"),
        ("epochs", f"{plan.epochs:,.2f}" if there else "unknown", ""),
        ("tokens a parameter", f"{plan.tokens_a_parameter:,.3g}", "20 spend compute best"),
    ]


def _memory(plan: "Plan") -> Rows:
    found, memory = plan.measured, plan.memory
    rows = [("a step, predicted", size(memory.step), "not all of it at once:")]
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
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
    return [
        ("a checkpoint", size(plan.checkpoint_bytes), f"weights {size(plan.weights_bytes)}"),
        ("all that are kept", size(plan.disk_bytes), f"{size(plan.disk_free_bytes)} are free"),
    ]


def _time(plan: "Plan") -> Rows:
    steps = f"{plan.steps_left:,} steps"
    if plan.measured is None:
        return [("in all, a guess", span(plan.seconds), f"for {steps}; --probe measures")]
    parts = [(f"  {what}", span(took), "") for what, took in plan.times.items() if took >= 0.5]
    ends = datetime.datetime.fromisoformat(plan.ends)
    return [
        ("tokens a second", f"{plan.tokens_per_s:,.0f}", f"{plan.measured.step:.3g} s a step"),
        ("in all", span(plan.seconds), steps),
        *parts,
        ("ends at", f"{ends:%H:%M}", f"{ends:%A, %d %B %Y}"),
    ]


def span(seconds: float) -> str:
    """A length of time in its two largest units: 41 s, 3 min 20 s, 2 h 5 min, 3.2 days."""
    if (days := seconds / 86400) >= 2:
        return f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
