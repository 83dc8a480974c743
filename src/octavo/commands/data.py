"""`octavo data`: texts become tokens on disk; what is in such files; whether they are whole."""

import dataclasses
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, add_common, print_facts
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.text.pipeline import Step
    from octavo.text.tokenizer import Tokenizer

WORDS = "prepare SOURCE... | inspect PATH | verify PATH"
PAGE = """\
Texts too large for memory become tokens on disk, which train then reads as they lie there.

  octavo data prepare my.jsonl more/ --out data/my             GPT-2's tokens
  octavo data prepare books.txt --out data/books --tokenizer bpe --vocab-size 16384
  octavo data prepare fineweb-edu --out data/fineweb --limit 100000
  octavo data prepare hf:NAME:CONFIG:SPLIT --field content --out data/it
  octavo data inspect data/my                                  counts, types, a piece of text
  octavo data verify data/my                                   every byte, every id
  octavo train data/my                                         a model of it

SOURCE is a text, a folder, a glob, .jsonl or .csv (also .gz), .parquet, - for standard input, or a
Hugging Face dataset; fineweb-edu is hf:HuggingFaceFW/fineweb-edu:sample-10BT. An end-of-text token
follows every document. Interrupted, even by kill -9, the same command goes on, and the dataset is
the same to the byte. PATH is a prepared dataset, or files of others: nanoGPT's and llm.c's .bin,
any .npy of integers."""
PLAIN_INTERVAL = 15.0  # seconds between progress lines where there is no terminal


def add_options(option: Option) -> None:
    option("--out", metavar="DIR", help="prepare: the directory to write")
    option("--tokenizer", metavar="T", help="gpt2 (default), byte, char, bpe, or a path")
    option("--vocab-size", type=int, default=8192, metavar="N", help="tokens of bpe; default: 8192")
    option("--field", default="text", metavar="NAME", help="where records have it; default: text")
    option("--val-fraction", type=float, metavar="X", help="of the documents; default: 0.01")
    option("--val", action="append", default=[], metavar="SOURCE", help="instead: validate on this")
    option("--shard-tokens", type=int, default=100_000_000, metavar="N", help="default: 100000000")
    option("--format", default="npy", choices=("npy", "bin"), help="bin is .npy without its header")
    option("--processes", type=int, metavar="N", help="default: as many as there are cores")
    option("--limit", type=int, metavar="N", help="only the first N documents")
    option(
        "--drop-duplicates", action="store_true", help="leave out what came before; else counted"
    )
    option(
        "--benchmark",
        action="append",
        dest="benchmarks",
        default=[],
        metavar="FILE",
        help="say how much of this test stands in training: HellaSwag's .jsonl or any text",
    )
    add_common(option, "json")


def run(args: Namespace, settings: list[str]) -> None:
    actions = {"prepare": _prepare, "inspect": _inspect, "verify": _verify}
    action, *words = args.words or [""]
    if action not in actions:
        what = f"cannot {action!r} data" if action else "do what with data?"
        raise ConfigError(what, fix=f"octavo data {', '.join(actions)}")
    actions[action](args, words)


def _prepare(args: Namespace, words: list[str]) -> None:
    from octavo.text.inspecting import inspect
    from octavo.text.prepare_request import Request
    from octavo.text.preparing import prepare

    if not args.out:
        raise ConfigError("prepare into what?", fix="--out DIR")
    if args.val and args.val_fraction is not None:
        raise ConfigError("--val and --val-fraction exclude each other", fix="leave one out")
    names = [field.name for field in dataclasses.fields(Request)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    request = Request(**given | {"sources": words, "out": Path(args.out)})
    try:
        with _progress() as show:
            dataset = prepare(request, _say, show)
    except KeyboardInterrupt:
        _say(f"what was done is kept; go on with: {request.command()}")
        raise
    _print(inspect(dataset), args.json)


def _inspect(args: Namespace, words: list[str]) -> None:
    from octavo.text.inspecting import inspect
    from octavo.text.shards import Dataset

    _print(inspect(Dataset.open(_one(words)), _tokenizer(args)), args.json)


def _verify(args: Namespace, words: list[str]) -> None:
    from octavo.text.files import byte_size, counted
    from octavo.text.shards import Dataset, verify

    dataset = Dataset.open(_one(words))
    verify(dataset)
    size = sum(shard["bytes"] for shard in dataset.shards)
    known = all(shard["sha256"] for shard in dataset.shards)
    facts = {"files": len(dataset.shards), "file_bytes": size, "compared": known}
    what = f"{counted(len(dataset.shards), 'file')}, {byte_size(size)}"
    compared = "every byte and every id compared" if known else "whole; there are no hashes of them"
    print_facts(facts, args.json, f"all well: {what}, {compared}")


def _print(facts: dict[str, Any], as_json: bool) -> None:
    begins = None if as_json else facts.pop("begins", None)
    print_facts(facts, as_json)
    if begins is not None:
        print(f"it begins with\n\n{begins}")


def _one(words: list[str]) -> str:
    if len(words) != 1:
        raise ConfigError(f"one dataset is wanted, {len(words)} were named", ", ".join(words))
    return words[0]


def _tokenizer(args: Namespace) -> "Tokenizer | None":
    from octavo.text.corpus import ready_tokenizer

    return ready_tokenizer(args.tokenizer, separator=True) if args.tokenizer else None


@contextmanager
def _progress() -> Iterator[Callable[["Step"], None]]:
    """A progress bar on a terminal, a line now and then elsewhere: call what it gives."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console, last = Console(stderr=True), time.monotonic()
    columns = "{task.description}", BarColumn(bar_width=None), "{task.fields[facts]}", "ETA"
    off = not console.is_terminal
    bar = Progress(*columns, TimeRemainingColumn(), console=console, expand=True, disable=off)

    def draw(step: "Step") -> None:
        bar.start()  # not before: others may draw theirs first
        for task in bar.tasks:
            if task.description != step.doing:
                bar.remove_task(task.id)
        if not bar.tasks:
            bar.add_task(step.doing, total=None, completed=step.done, facts="")
        total = step.total or None
        bar.update(bar.task_ids[0], completed=step.done, total=total, facts=step.facts)

    def tell(step: "Step") -> None:
        nonlocal last
        if time.monotonic() - last > PLAIN_INTERVAL:
            last = time.monotonic()
            share = f" {step.done / step.total:.0%}" if step.total else ""
            _say(f"{step.doing}{share}  {step.facts}".rstrip())

    try:
        yield tell if off else draw
    finally:
        bar.stop()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
