"""`octavo doctor`: what is slow or wrong here, and the one thing to do."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.commands.shared import Option
from octavo.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from octavo.studies.doctor import Machine, RunFacts

WORDS = "[RUN]"
TAKES_SETTINGS = False
PAGE = """\
What is slow or wrong, and the one thing to do: device, threads, precision, compilers, memory and
disk of this machine; with a run also its settings and metrics: a loss that does not fall, memory,
overfitting, speed, samples that repeat themselves.

  octavo doctor
  octavo doctor runs/my
  octavo doctor runs/my --json

Exit code 6 where something stands in the way of training, else 0."""


def add_options(option: Option) -> None:
    """What may be typed besides the words."""
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
    if len(args.words) > 1:
        raise ConfigError("one run at a time", ", ".join(args.words))
    from octavo.checkpoint import Run
    from octavo.studies.doctor import examine_machine, examine_run, facts_of
    from octavo.studies.doctor_rules import diagnose

    chosen = Run.open(args.words[0]) if args.words else None
    machine = examine_machine(chosen.path if chosen else Path())
    facts = examine_run(chosen) if chosen else None
    findings = diagnose(machine, facts)
    if args.json:
        found = {
            "machine": dataclasses.asdict(machine),
            "run": facts_of(facts) if facts else None,
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(machine, facts, [(finding.what, finding.fix) for finding in findings])
    if findings and findings[0].blocks:
        raise ResourceError(findings[0].what, fix=findings[0].fix)


def _show(machine: "Machine", run: "RunFacts | None", said: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    page = Console(highlight=False)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    for name, value in [*_machine(machine), *(_run(run) if run else [])]:
        rows.add_row(name, value)
    page.print(rows)
    for what, fix in said:
        page.print(f"! {what}: {fix}", markup=False, soft_wrap=True)
    todo = said[0][1] if said else "nothing is in the way"
    page.print(f"\ndo this: {todo}" if said else f"\n{todo}", style="bold", soft_wrap=True)


def _machine(machine: "Machine") -> list[tuple[str, str]]:
    from octavo.studies.plan_remarks import size

    speed = f"fp32 products at {machine.gflops:,.0f} GFLOP/s, bf16 {machine.bf16_gain:.1f} x that"
    native = machine.native_problem or f"built, {machine.instructions}"
    free, total = size(machine.memory_free), size(machine.memory_total)
    return [
        ("device", f"{machine.device}: {machine.device_name}"),
        ("torch", f"{machine.torch}, {machine.threads} threads on {machine.cores} cores"),
        ("precision", speed if machine.gflops else "no figures for this device"),
        ("compiler", machine.compiler or "none"),
        ("torch.compile", machine.compile_problem or "can work"),
        ("native engine", native),
        ("memory", f"{free} free of {total}"),
        ("disk", f"{size(machine.disk_free)} free"),
    ]


def _run(run: "RunFacts") -> list[tuple[str, str]]:
    from octavo.studies.plan_remarks import amount

    state = "finished" if run.finished else "not finished"
    rows = [("run", f"{run.path}, {state}, {amount(run.parameters)} parameters")]
    text = f"{amount(run.tokens_in_text)} tokens, {amount(run.tokens_seen)} seen"
    rows += [("text", text)] if run.tokens_in_text else []
    if run.losses:
        loss = f"{run.losses[0][1]:.3f} at first, {run.losses[-1][1]:.3f} at last"
        rows.append(("loss", loss))
    if run.validations:
        best = min(run.validations, key=lambda point: point[1])
        rows.append(("validation", f"{best[1]:.3f} at best, step {best[0]:,}"))
    return rows
