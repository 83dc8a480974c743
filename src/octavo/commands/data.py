"""`octavo data`: texts become tokens on disk; what is in such files; whether they are whole."""

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, print_facts
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from octavo.text.pipeline import Step
    from octavo.text.tokenizer import Tokenizer

WORDS = "prepare SOURCE... | inspect PATH | verify PATH"
TAKES_SETTINGS = False
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
    """What may be typed besides the words."""
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
        default=[],
        metavar="FILE",
        help="say how much of this test stands in training: HellaSwag's .jsonl or any text",
    )
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
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
    given = {
        "val_fraction": args.val_fraction,
        "processes": args.processes,
        "tokenizer": args.tokenizer,
    }
    request = Request(
        sources=words,
        out=Path(args.out),
        vocab_size=args.vocab_size,
        field=args.field,
        val=args.val,
        shard_tokens=args.shard_tokens,
        format=args.format,
        limit=args.limit,
        drop_duplicates=args.drop_duplicates,
        benchmarks=args.benchmark,
        **{name: value for name, value in given.items() if value is not None},
    )
    with _Bar() as bar:
        try:
            dataset = prepare(request, bar.say, bar.show)
        except KeyboardInterrupt:
            bar.say(f"what was done is kept; go on with: {request.command()}")
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
    if args.json:
        print_facts({"files": len(dataset.shards), "file_bytes": size, "compared": known}, True)
        return
    what = f"{counted(len(dataset.shards), 'file')}, {byte_size(size)}"
    compared = "every byte and every id compared" if known else "whole; there are no hashes of them"
    print(f"all well: {what}, {compared}")


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_facts(facts, True)
        return
    begins = facts.pop("begins", None)
    print_facts(facts, False)
    if begins is not None:
        print(f"it begins with\n\n{begins}")


def _one(words: list[str]) -> str:
    if len(words) != 1:
        raise ConfigError(f"one dataset is wanted, {len(words)} were named", ", ".join(words))
    return words[0]


def _tokenizer(args: Namespace) -> "Tokenizer | None":
    from octavo.text.corpus import ready_tokenizer

    return ready_tokenizer(args.tokenizer, separator=True) if args.tokenizer else None


class _Bar:
    """A progress bar on a terminal, a line now and then elsewhere, both on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._doing, self._last = "", time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, line: str) -> None:
        """One line, above the bar."""
        self._console.print(line, markup=False)

    def show(self, step: "Step") -> None:
        """How far it is now."""
        if self._console.is_terminal:
            self._draw(step)
        elif time.monotonic() - self._last > PLAIN_INTERVAL:
            self._last = time.monotonic()
            share = f" {step.done / step.total:.0%}" if step.total else ""
            self.say(f"{step.doing}{share}  {step.facts}".rstrip())

    def _draw(self, step: "Step") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._progress is None:
            columns = ("{task.description}", BarColumn(bar_width=None), "{task.fields[facts]}")
            ends = (TextColumn("ETA"), TimeRemainingColumn())
            self._progress = Progress(*columns, *ends, console=self._console, expand=True)
            self._progress.start()
        if step.doing != self._doing:
            self._doing = step.doing
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(step.doing, completed=step.done, facts="")
        assert self._task is not None
        total = step.total or None
        self._progress.update(self._task, completed=step.done, total=total, facts=step.facts)
