"""`octavo profile`: where the time goes."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, add_common, one_run, print_facts, progress
from octavo.errors import ConfigError
from octavo.studies.readable import scaled

if TYPE_CHECKING:
    from octavo.explaining.profile import Profile

WORDS = "RUN | CONFIG.yaml | TEXT..."
TAKES_SETTINGS = True
PAGE = """\
Where the time of a training step goes, or of writing: by part of the model, forward and backward,
beside what this machine could do at best.

  octavo profile runs/my                               a step of its training
  octavo profile runs/my train.micro_batch_size=64     of another
  octavo profile gpt2-124m.yaml --steps 2 --trace step.json
  octavo profile runs/my --what generate               a prompt, and what is written after it

A part is bound by compute or by memory where it comes near to the machine's limit, measured at
once: its roof, and how near it comes. The limits meet where a byte brings so many operations that
both take as long. A part far from both is held up by overhead: many small operations. --trace
writes every operation for Perfetto (ui.perfetto.dev) or chrome://tracing. Nothing is trained: the
run stays as it is."""


def add_options(option: Option) -> None:
    option("--what", choices=("train", "generate"), default="train", help="what to take apart")
    option("--steps", type=int, metavar="N", help="training steps (3), or tokens to write (64)")
    option("--trace", metavar="FILE.json", help="write a Chrome trace")
    option("--weights", metavar="P", help="generate: packed weights: int8, int4, auto or fp16")
    option("--base", metavar="RUN", help="generate: where an adapter's base is, if it was moved")
    option("--device", metavar="D", help="cuda, cpu or auto; default: as the run says")
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    if args.steps is not None and args.steps < 1:
        raise ConfigError("--steps counts from 1", fix="leave it out for a few")
    trace = Path(args.trace) if args.trace else None
    if trace and not trace.parent.is_dir():
        raise ConfigError(f"{trace.parent} is no directory", fix="choose another path")
    found = (_writing if args.what == "generate" else _training)(args, settings, trace)
    if args.json:
        print_facts(_facts(found), as_json=True)
    else:
        _show(found)


def _training(args: Namespace, settings: list[str], trace: Path | None) -> "Profile":
    from octavo.explaining.profile import profile_training, random_task
    from octavo.training.request import read_request
    from octavo.training.task import prepare

    if args.weights or args.base:
        raise ConfigError("--weights and --base are for writing", fix="add --what generate")
    if args.device:
        settings = [*settings, f"train.device={args.device}"]
    request = read_request(args.words or [one_run([])], settings)
    config = request.config
    plain = config.model.vocab_size and not config.finetune.base
    task = random_task(config) if plain else prepare(config, "cpu", request.directory(None, False))
    with progress("stepping") as watch:
        return profile_training(task, args.steps or 3, trace, watch)


def _writing(args: Namespace, settings: list[str], trace: Path | None) -> "Profile":
    from octavo.explaining.profile import profile_writing
    from octavo.language_model import load

    if settings:
        raise ConfigError(f"{settings[0]!r} is a training setting", fix="leave it out here")
    run, device = one_run(args.words), args.device or "auto"
    lm = load(run, device, args.base, speculate="off", weights=args.weights)
    return profile_writing(lm, args.steps or 64, trace)


def _facts(found: "Profile") -> dict[str, Any]:
    facts = dataclasses.asdict(found)
    machine = facts.pop("machine")
    return facts | {
        "tokens_per_s": found.writing.get("tokens_per_s", found.tokens / found.seconds),
        "flops": found.flops,
        "flops_per_s": found.flops / found.seconds,
        "machine_flops_per_s": machine["flops"],
        "machine_bytes_per_s": machine["bandwidth"],
        "machine_flops_per_byte": found.machine.ridge,
        "conclusion": found.conclusion,
    }


def _show(found: "Profile") -> None:
    """The facts, a table of the parts and the conclusion, in 80 columns."""
    from rich.console import Console

    done, machine = found.flops / found.seconds, found.machine
    step = "a step: " if found.what == "train" else ""
    print(f"{step}{found.tokens:,} tokens in {1e3 * found.seconds:,.1f} ms; {found.where}")
    print(
        _written(found) if found.writing else f"speed: {found.tokens / found.seconds:,.0f} tokens/s"
    )
    print(
        f"arithmetic: {scaled(done)}FLOP/s = {done / machine.flops:.0%} of this machine's "
        f"{scaled(machine.flops)}FLOP/s"
    )
    print(f"memory: {found.memory_bytes / 1e6:,.0f} MB more than before the model")
    print(
        f"this machine reads {scaled(machine.bandwidth)}B/s; below {machine.ridge:.1f} operations "
        "a byte that is the limit\n"
    )
    Console(highlight=False, width=80).print(_table(found))
    if times := found.layers.values():
        least, most = _milliseconds(min(times)), _milliseconds(max(times))
        print(f"\n{len(times)} layers: {least} to {most} ms each")
    if found.operations:
        first = list(found.operations.items())[:5]
        parts = [f"{n.split('::')[1].strip('_')} {s / found.seconds:.0%}" for n, s in first]
        print(f"operations: {', '.join(parts)}")
    busy = "a machine that was busy with something else while it was measured"
    for remark in [*[busy] * (done > machine.flops), *found.remarks]:
        print(f"looked at: {remark}")
    print(f"\n{found.conclusion}")


def _written(found: "Profile") -> str:
    """Tokens a second, and what reading so many bytes for each is of the machine's."""
    speed, size = found.writing["tokens_per_s"], found.writing["bytes_per_token"]
    share = speed * size / found.machine.bandwidth
    return (
        f"prompt: {found.writing['prompt_tokens_per_s']:,.0f} tokens/s\n"
        f"writing: {speed:,.0f} tokens/s, each reads {scaled(size)}B: {scaled(speed * size)}B/s = "
        f"{share:.0%} of this machine's{' (it stays in a cache)' if share > 1 else ''}"
    )


def _table(found: "Profile") -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("part")
    train = found.what == "train"
    names = ["forward", "backward"] if train else ["ms"]
    for name in [*names, "share", "FLOP/s", "B/s", "FLOP/B"]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by")
    table.add_column("of roof", justify="right")
    for row in sorted(found.rows, key=lambda row: -row.share):
        times = [row.forward, row.backward] if train else [row.forward]
        rates = [number / (row.forward + row.backward) for number in (row.flops, row.bytes)]
        table.add_row(
            row.part,
            *(_milliseconds(seconds) for seconds in times),
            f"{row.share:.1%}",
            *(scaled(rate) if rate else "" for rate in rates),
            f"{row.flops / row.bytes:.1f}" if all(rates) else "",
            row.bound,
            f"{row.of_roof:.0%}" if row.bytes else "",
        )
    return table


def _milliseconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    ms = 1e3 * seconds
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"
