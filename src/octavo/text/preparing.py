"""From texts to a dataset of tokens on disk, however large, and however often interrupted.

A directory is prepared once. While that goes on ``progress.json`` lies in it, and a process killed
at any moment is gone on with by the same command: the dataset is the same to the byte. Another
request is refused where anything was done, and so is a directory that holds something else.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo import disk
from octavo.errors import ConfigError, DataError, OctavoError
from octavo.text.files import byte_size, counted
from octavo.text.pipeline import Preparation, State, Step, pieces, save_progress, total_bytes
from octavo.text.prepare_request import Request, refuse_changes
from octavo.text.shard_writer import PART
from octavo.text.shards import MANIFEST, PROGRESS, Dataset
from octavo.text.streaming import Source, after_word, find_sources, with_ends_for_validation
from octavo.text.tokenizer import Tokenizer

PIPED, TOKENIZER = "standard-input", "tokenizer.json"
LEARN_FROM = 100_000_000  # bytes of text at most that a BPE is trained on
Say = Callable[[str], None]
Show = Callable[[Step], None]


def prepare(request: Request, say: Say = lambda _: None, show: Show = lambda _: None) -> Dataset:
    """Make the dataset that ``request`` asks for, or go on making it.

    ``say`` gets lines for people, ``show`` what a progress bar shows. Raises `ConfigError` for a
    directory that holds something else, `DataError` for texts that cannot be read, and
    `ResourceError` where disk or network fail; what was done until then is kept.
    """
    with _held(request.out):
        if (request.out / MANIFEST).exists():
            return _finished(request, say)
        begun, state = _read_progress(request.out), State()
        try:
            if begun is None:
                _begin_anew(request)
            sources = _sources(request)
            identity = request.identity(sources)
            if begun is None:
                save_progress(request, identity, state)
                say(_described(sources))
            else:
                before, state = begun
                refuse_changes(request.out, before, identity)
                say(_going_on(state, sources))
            tokenizer = _tokenizer(request, sources, state, say, show)
            dataset = Preparation(request, sources, identity, tokenizer, state, show).run()
        except OctavoError:
            if begun is None and not state.documents:  # nothing that would bind the next request
                _clear(request.out, [*LEFTOVERS, *RESULTS])
            raise
        _clear(request.out, LEFTOVERS)
        return dataset


LEFTOVERS = (PROGRESS, PIPED, f"*{PART}")
RESULTS = (TOKENIZER, "train-*", "val-*")


@contextmanager
def _held(home: Path) -> Iterator[None]:
    """The directory, made where there is none, for this process alone."""
    import fcntl  # POSIX only, and only this needs it

    existed = disk.exists(home)
    if existed and not home.is_dir():
        raise ConfigError(f"{home} is a file", fix="choose another --out")
    if existed and not any((home / name).exists() for name in (MANIFEST, PROGRESS, PIPED)):
        _refuse_occupied(home)
    with disk.errors(f"write {home}"):
        home.mkdir(parents=True, exist_ok=True)
        held = os.open(home, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ConfigError(f"{home} is being prepared by another process", fix="wait") from None
    try:
        yield
    finally:
        os.close(held)
        if not existed:
            with suppress(OSError):
                home.rmdir()  # where nothing came of it


def _refuse_occupied(home: Path) -> None:
    there = sorted(path.name for path in home.iterdir() if path.name[0] != ".")
    if there:
        kind = "a run" if "config.yaml" in there else f"not empty: it holds {there[0]}"
        raise ConfigError(f"{home} is {kind}", fix="choose another --out")


def _finished(request: Request, say: Say) -> Dataset:
    dataset = Dataset.open(request.out)
    if "-" not in request.names:
        refuse_changes(
            request.out, dataset.report.get("request", {}), request.identity(_sources(request))
        )
    _clear(request.out, LEFTOVERS)
    say(f"{request.out} is prepared already")
    return dataset


def _read_progress(home: Path) -> tuple[dict[str, Any], State] | None:
    """The request that was begun and what is done of it; None where that is nothing."""
    try:
        content = json.loads((home / PROGRESS).read_bytes())
        request, state = dict(content["request"]), State(**content["state"])
        return (request, state) if state.documents else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{PROGRESS} cannot be read ({type(error).__name__}: {error})",
            f"in {home}",
            "delete that directory and begin anew",
        ) from None


def _begin_anew(request: Request) -> None:
    """Clear away an attempt that did nothing, and keep standard input so that it can be reread."""
    home = request.out
    _clear(home, [*LEFTOVERS, *RESULTS])
    if "-" in request.names:
        temp = home / f".tmp-{PIPED}"
        with disk.errors(f"write {temp}"), temp.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        os.replace(temp, home / PIPED)


def _described(sources: list[Source]) -> str:
    names = list(dict.fromkeys(source.name for source in sources))
    total = total_bytes(sources)
    listed = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
    return f"reading {listed}" + (f", {byte_size(total)}" if total else "")


def _going_on(state: State, sources: list[Source]) -> str:
    shards = sum(map(len, state.shards.values()))
    read, total = byte_size(state.bytes), total_bytes(sources)
    of = f" of {byte_size(total)}" if total else ""
    documents = counted(state.documents, "document")
    return f"going on after {counted(shards, 'shard')}, {documents}, {read}{of}"


def _clear(home: Path, patterns: list[str] | tuple[str, ...]) -> None:
    """Delete our own files; progress.json last, without which they would be somebody else's."""
    with disk.errors(f"write {home}"):
        disk.sweep(home)
        found = {path for pattern in patterns for path in home.glob(pattern)}
        for path in sorted(found, key=lambda path: path.name == PROGRESS):
            path.unlink()
            disk.failpoint("cleared")


def _sources(request: Request) -> list[Source]:
    """Validation first: --drop-duplicates then takes its documents out of training."""
    piped = request.out / PIPED
    val = [replace(source, split="val") for source in find_sources(request.val, piped)]
    texts = find_sources(request.sources, piped)
    if val:
        both = {source.path for source in val} & {source.path for source in texts}
        if shared := sorted(str(path) for path in both if path != Path()):
            raise ConfigError(f"{shared[0]} would be trained on and validated", fix="name another")
        return val + [replace(source, split="train") for source in texts]
    return with_ends_for_validation(texts, request.val_fraction)


def _tokenizer(
    request: Request, sources: list[Source], state: State, say: Say, show: Show
) -> Tokenizer:
    """The one in the directory, or the one asked for, learned if it has to be, and kept there."""
    file = request.out / TOKENIZER
    if state.documents:
        with suppress(DataError):
            return Tokenizer.load(file)
    tokenizer = request.ready_tokenizer or _learned(request, sources, state, say, show)
    if tokenizer.eot_id is None:
        say("this tokenizer has no end-of-text token: documents follow one another without")
    tokenizer.save(file)
    return tokenizer


def _learned(
    request: Request, sources: list[Source], state: State, say: Say, show: Show
) -> Tokenizer:
    """Characters from the whole text, a BPE from its beginning."""
    total = total_bytes(sources)
    if request.tokenizer == "char":
        characters: set[str] = set()
        done = 0
        for _, piece in pieces(sources, request.field, len):
            characters |= set(piece.text)
            done += len(piece.text.encode())
            show(Step("collecting characters", done, total))
        return Tokenizer.char("".join(characters), separator=True)

    def beginning() -> Iterator[str]:
        for _, piece in pieces(sources, request.field, after_word):
            if state.learned_from >= LEARN_FROM:
                return
            state.learned_from += len(piece.text.encode())
            show(Step("reading what the tokenizer learns from", state.learned_from, 0))
            yield piece.text

    state.learned_from = 0
    tokenizer = Tokenizer.train_bpe(beginning(), request.vocab_size)
    learned = byte_size(state.learned_from)
    say(f"trained a BPE of {counted(tokenizer.vocab_size, 'token')} on the first {learned}")
    return tokenizer
