"""`octavo doctor`: what is slow or wrong here, and the one thing to do."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.commands.shared import Option, add_common, print_facts
from octavo.errors import ConfigError, ResourceError
from octavo.studies.readable import aligned, amount, size

if TYPE_CHECKING:
    from octavo.studies.doctor import Finding, Machine, RunFacts

WORDS = "[RUN]"
PAGE = """\
What is slow or wrong, and the one thing to do: device, threads, precision, compilers, memory and
disk of this machine; with a run also its settings and metrics: a loss that does not fall, memory,
overfitting, speed, samples that repeat themselves.

  octavo doctor
  octavo doctor runs/my
  octavo doctor runs/my --json

Exit code 6 where something stands in the way of training, else 0."""


def add_options(option: Option) -> None:
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    if len(args.words) > 1:
        raise ConfigError("one run at a time", ", ".join(args.words))
    from octavo.checkpoint import Run
    from octavo.studies.doctor import examine_machine, examine_run, facts_of
    from octavo.studies.doctor_rules import diagnose

    chosen = Run.open(args.words[0]) if args.words else None
    machine = examine_machine(chosen.path if chosen else Path())
    facts = examine_run(chosen) if chosen else None
    findings = diagnose(machine, facts)
    found = {
        "machine": vars(machine),
        "run": facts_of(facts) if facts else None,
        "findings": [vars(finding) for finding in findings],
    }
    print_facts(found, args.json, "\n".join(_lines(machine, facts, findings)))
    if findings and findings[0].blocks:
        raise ResourceError(findings[0].what, fix=findings[0].fix)


def _lines(machine: "Machine", run: "RunFacts | None", findings: "list[Finding]") -> Iterator[str]:
    yield from aligned([*_machine(machine), *(_run(run) if run else [])], "<<")
    yield from (f"! {finding.what}: {finding.fix}" for finding in findings)
    yield f"\ndo this: {findings[0].fix}" if findings else "\nnothing is in the way"


def _machine(machine: "Machine") -> list[tuple[str, str]]:
    half = f"{machine.half} {machine.half_gain:.1f} x that"
    speed = f"fp32 products at {machine.gflops:,.0f} GFLOP/s, {half}"
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
    state = "finished" if run.finished else "not finished"
    rows = [("run", f"{run.path}, {state}, {amount(run.parameters)} parameters")]
    text = f"{amount(run.tokens_in_text)} tokens, {amount(run.tokens_seen)} seen"
    rows += [("text", text)] if run.tokens_in_text else []
    if run.losses:
        first, last = run.losses[0][1], run.losses[-1][1]
        rows.append(("loss", f"{first:.3f} at first, {last:.3f} at last"))
    if run.validations:
        step, loss = run.best
        rows.append(("validation", f"{loss:.3f} at best, step {step:,}"))
    return rows
