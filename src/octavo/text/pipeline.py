"""The pipeline of a preparation: pieces are read, tokenized, appended; what is done is saved.

Everything that happens to a batch happens after its tokens came back, in order: so what is saved
is the state behind one piece, and the same whatever the number of processes. Which documents are
for validation is decided by a keyed hash of their text, not of their number: equal documents then
never lie in both parts, and their order does not matter.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from octavo import disk
from octavo.errors import DataError, OctavoError, ResourceError
from octavo.manifest import to_json
from octavo.text.encoding import Encoded, cut_for, encode_all
from octavo.text.overlap import Seen, share_found
from octavo.text.prepare_request import Request
from octavo.text.shard_writer import ShardWriter, open_at
from octavo.text.shards import PROGRESS, Dataset, Shard, Split, write_manifest
from octavo.text.streaming import Cut, Piece, Source, benchmark_texts, find_sources, read
from octavo.text.token_files import Tokens, choose_dtype
from octavo.text.tokenizer import Tokenizer

DIGESTS = "digests.part"
BATCH = 1 << 20  # characters that a process gets at once
SAVE_EVERY = 10.0  # seconds
FEW_SOURCES = 10  # up to which each one's share is told
SMALL = 4_000_000  # bytes of text that one process has done before others have started
TRAIN, VAL, DROPPED = range(3)
SPLITS: tuple[Split, ...] = ("train", "val")
NUMBERS = {None: -1, "train": TRAIN, "val": VAL}
KEPT = "what was done is kept, and the same command goes on"


@dataclass(frozen=True)
class Step:
    """How far something is, for people."""

    doing: str
    done: int
    total: int
    """0: nobody knows."""
    facts: str = ""


@dataclass
class State:
    """What is done; progress.json holds it."""

    position: list[Any] | None = None
    """The source, and the place in it behind the last piece whose tokens are written."""
    open: int = TRAIN
    """Where the document belongs that the position may be in the middle of."""
    taken: int = 0
    """Documents that count against the limit."""
    learned_from: int = 0
    """Bytes of text that the tokenizer was trained on, if it was."""
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    duplicates: int = 0
    empty: int = 0
    repaired: int = 0
    digests: int = 0
    tokens_of: dict[str, int] = field(default_factory=dict)
    """Tokens of each source, where they are few."""
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {"train": [], "val": []})
    waiting: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    """Tokens in the file that becomes a part's next shard."""


@dataclass
class Batch:
    """Pieces that are tokenized together, and what is so when they are written."""

    pieces: list[Piece] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    position: list[Any] | None = None
    characters: int = 0
    taken: int = 0
    empty: int = 0
    repaired: int = 0
    done: int = 0


@dataclass
class Preparation:
    """One request at work in its directory, whose lock the caller holds."""

    request: Request
    sources: list[Source]
    identity: dict[str, Any]
    tokenizer: Tokenizer
    state: State
    show: Callable[[Step], None]

    def __post_init__(self) -> None:
        request, state, self.home = self.request, self.state, self.request.out
        self.threshold = np.uint64(0 if request.val else int(request.val_fraction * 2**64))
        dtype, eot_id = choose_dtype(self.tokenizer.vocab_size - 1), self.tokenizer.eot_id
        form = (f".{request.format}", dtype, request.shard_tokens, eot_id)
        self.writers = {
            split: ShardWriter(self.home, split, *form, state.shards[split], state.waiting[split])
            for split in SPLITS
        }
        self.digests = open_at(self.home / DIGESTS, 8 * state.digests)
        self._safe = state.documents > 0  # whether anything would be left after a failure
        self._whole = True  # whether files and state agree: not while a batch is being written

    def run(self) -> Dataset:
        """Do what is left to do."""
        try:
            self._tokenize()
        except BaseException as error:  # Ctrl-C too
            if self._whole and self.state.documents:
                with suppress(OctavoError):
                    self.save()
            if isinstance(error, ResourceError) and self._safe:
                fix = f"{error.fix}; {KEPT}" if error.fix else KEPT
                raise ResourceError(error.what, error.where, fix) from error
            raise
        finally:
            for file in (self.digests, *self.writers.values()):
                with suppress(OSError):  # a full disk refuses once more what it refused
                    file.close()
        return self._finish()

    def _tokenize(self) -> None:
        """Read, tokenize and append all that is not done, and make it shards."""
        known, first_byte = total_bytes(self.sources), self.state.bytes
        processes = 1 if 0 < known < SMALL else self.request.processes
        seen = Seen(np.fromfile(self.home / DIGESTS, "<u8", self.state.digests))
        began = self._saved = time.monotonic()
        batches = ((batch, batch.pieces) for batch in self._batches())
        with closing(encode_all(batches, self.home / "tokenizer.json", processes)) as results:
            for batch, encoded in results:
                due = time.monotonic() - self._saved > SAVE_EVERY
                if self._take(batch, encoded, seen) or due:
                    self.save()
                speed = (self.state.bytes - first_byte) / 1e6 / (time.monotonic() - began)
                self._show(batch, known, speed)
        for writer in self.writers.values():
            writer.finish()
        self.save()

    def save(self) -> None:
        """Make what was done safe, then say how far it went: a kill goes back to here at most."""
        for split, writer in self.writers.items():
            writer.sync()
            self.state.shards[split], self.state.waiting[split] = writer.shards, writer.waiting
        with disk.errors(f"write {self.home / DIGESTS}"):
            self.digests.flush()
            disk.sync(self.home / DIGESTS)
        save_progress(self.request, self.identity, self.state)
        for writer in self.writers.values():
            writer.sweep()
        self._saved, self._safe = time.monotonic(), True

    def _batches(self) -> Iterator[Batch]:
        """All that is not done yet, in portions."""
        batch, taken, limit = Batch(), self.state.taken, self.request.limit
        cut = cut_for(self.tokenizer)
        for number, piece in pieces(self.sources, self.request.field, cut, self.state.position):
            counts = not (self.request.val and self.sources[number].split == "val")
            if counts and limit is not None and taken >= limit:
                break
            batch.position, batch.done = [number, piece.position], piece.done
            batch.repaired += piece.repaired
            if piece.text:
                batch.pieces.append(piece)
                batch.sources.append(number)
                batch.characters += len(piece.text)
                taken += piece.last and counts
            batch.taken, batch.empty = taken, batch.empty + (not piece.text)
            if batch.characters >= BATCH:
                yield batch
                batch = Batch()
        if batch.position is not None:
            yield batch

    def _take(self, batch: Batch, encoded: Encoded, seen: Seen) -> bool:
        """Write a batch's tokens and count them; whether a shard was finished."""
        self._whole = False
        tokens, size, characters = encoded.sizes.T
        state, begins = self.state, np.array([p.first for p in batch.pieces], dtype=bool)
        again = seen.add(encoded.digests)
        forced = np.array([NUMBERS[self.sources[n].split] for n in batch.sources], dtype=np.int64)
        to = np.where(encoded.digests < self.threshold, VAL, TRAIN)
        to = np.where(forced[begins] < 0, to, forced[begins])
        if self.request.drop_duplicates:
            to[again] = DROPPED
        # One answer a document, spread over its pieces; the first may have begun in another batch.
        to = np.concatenate([[state.open], to])[np.cumsum(begins)]
        target = np.repeat(to, tokens)
        finished = [
            writer.append(encoded.ids[target == NUMBERS[split]])
            for split, writer in self.writers.items()
        ]
        new = encoded.digests[~again]
        with disk.errors(f"write {self.home / DIGESTS}"):
            self.digests.write(new.tobytes())
        kept = to != DROPPED
        state.position, state.taken = batch.position, batch.taken
        state.open = int(to[-1]) if len(to) else state.open
        state.documents += int((kept & begins).sum())
        state.bytes += int(size[kept].sum())
        state.characters += int(characters[kept].sum())
        state.duplicates += int(again.sum())
        state.empty += batch.empty
        state.repaired += batch.repaired
        state.digests += len(new)
        if len(self.sources) <= FEW_SOURCES:
            for number in set(batch.sources):
                name, of_it = self.sources[number].name, np.array(batch.sources) == number
                state.tokens_of.setdefault(name, 0)
                state.tokens_of[name] += int(tokens[kept & of_it].sum())
        self._whole = True
        return any(finished)

    def _show(self, batch: Batch, known: int, speed: float) -> None:
        assert batch.position is not None
        state, limit = self.state, self.request.limit
        done = sum(source.size for source in self.sources[: batch.position[0]]) + batch.done
        if limit or not known:
            done = state.taken if limit else state.bytes
        tokens = sum(sum(s["tokens"] for s in w.shards) + w.waiting for w in self.writers.values())
        facts = f"{state.documents:,} documents  {tokens:,} tokens  {speed:.1f} MB/s"
        self.show(Step("tokenizing", done, limit or known, facts))

    def _finish(self) -> Dataset:
        """Look at the whole and write dataset.json."""
        state, shards = self.state, [*self.state.shards["train"], *self.state.shards["val"]]
        if not shards:
            names = ", ".join(source.name for source in self.sources[:3])
            raise DataError("there is no text", f"in {names}", "give a text to learn from")
        report = {name: getattr(state, name) for name in FIGURES} | {
            "dropped": self.request.drop_duplicates,
            "overlap": self._overlap(Dataset("", shards, self.home)),
            "tokens_of": state.tokens_of,
            "request": self.identity,
        }
        with disk.errors(f"write {self.home}"):
            write_manifest(self.home, shards, self.tokenizer, report=report)
        return Dataset.open(self.home)

    def _overlap(self, dataset: Dataset) -> dict[str, Any]:
        """What share of the validation part's and each benchmark's 13-grams stands in training."""
        train, val = dataset.tokens("train"), dataset.tokens("val")
        cut = cut_for(self.tokenizer)
        texts: dict[str, Iterable[np.ndarray | Tokens]] = {"validation": [val]}
        for source in find_sources(self.request.benchmarks, self.home):
            found = benchmark_texts(source, self.request.field, cut)
            texts[source.name] = map(self.tokenizer.encode_array, found)

        def show(done: int) -> None:
            self.show(Step("looking for what stands in both parts", done, len(train)))

        return share_found(texts, train, self.tokenizer.eot_id, self.request.processes, show)


FIGURES = (
    "documents", "bytes", "characters", "duplicates", "empty", "repaired", "learned_from",
)  # fmt: skip


def pieces(
    sources: list[Source], field: str, cut: Cut | None, position: list[Any] | None = None
) -> Iterator[tuple[int, Piece]]:
    """The pieces of all sources behind ``position``, each with its source's number."""
    first, place = position or (0, None)
    for number in range(first, len(sources)):
        for piece in read(sources[number], field, cut, place):
            yield number, piece
        place = None


def total_bytes(sources: list[Source]) -> int:
    """Bytes of all; 0 where one's are not known."""
    known = all(source.size or source.kind == "text" for source in sources)
    return sum(source.size for source in sources) if known else 0


def save_progress(request: Request, identity: dict[str, Any], state: State) -> None:
    """Write progress.json: the request, the command that goes on with it, and what is done."""
    content = {"go_on": request.command(), "request": identity, "state": asdict(state)}
    disk.write_atomic(request.out / PROGRESS, to_json(content))
