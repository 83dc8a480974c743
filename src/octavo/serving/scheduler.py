"""The engine thread: one for each model, the only one that touches its engine.

It takes turns. A turn lets go of rows that nobody waits for, gives free slots to rows that wait,
first come first served, and steps the engine once with all rows that have a slot: those that write
get their next tokens, those whose prompt is not read yet read CHUNK tokens of it between them. So
rows join and leave between two steps, and no prompt keeps the others waiting for long. What a row
gets does not depend on its neighbours: the engine and the keyed draws see to that.

A slot keeps what it held when its row ends. A row whose prompt begins as what any slot holds takes
that over instead of reading it, so copies of a prompt, and conversations that go on, read only
what is new.

The event loop's side is `Job`: it is made, awaited and cancelled there, and only there.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from octavo.errors import ResourceError
from octavo.generating.sampling import Sampling, top_logprobs
from octavo.generating.writing import STRIDE, Piece, Row, Slot, common_length, window_start
from octavo.language_model import LanguageModel
from octavo.serving.explanation import explain
from octavo.serving.limits import Limits
from octavo.serving.metrics import ModelMetrics
from octavo.serving.refusals import Refusal, closing

CHUNK = 64  # prompt tokens read in one step, at most
TURN = 128  # new tokens of one step, all rows together: so soon each row's next event comes
WORTH = 16  # so many tokens that another row is about to read are worth waiting for
READING = Sampling(temperature=0.0)  # what a step draws in the middle of a prompt is not wanted
Top = list[tuple[int, float]]


@dataclass(frozen=True)
class Written:
    """One new token of a row."""

    piece: Piece
    explanation: dict[str, Any] | None = None


class Job:
    """One request: its rows, and what they wrote that was not taken yet.

    Iterating gives what was written since the last look, until every row has ended; it raises the
    `Refusal` that ended the job early.
    """

    def __init__(self, rows: list[Row], seconds: float, score: bool = False) -> None:
        """``score`` asks for ``prompt_tops`` before anything is written."""
        self.rows, self.score = rows, score
        self.came = time.monotonic()
        self.deadline = self.came + seconds
        self.prompt_tops: dict[int, list[Top]] = {}
        """Where scored: for each row `Slot.top` of its prompt's tokens, empty for the first."""
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._left = len(rows)
        self._pending: list[Written] = []
        self._refusal: Refusal | None = None
        self._ready = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[Written]]:
        """What was written since the last look."""
        while self._left:
            if not self._pending and not self._refusal:
                self._ready.clear()
                await self._ready.wait()
            written, self._pending = self._pending, []
            self._left -= sum(each.piece.finished is not None for each in written)
            if written:
                yield written
            elif self._refusal:
                raise self._refusal

    def cancel(self) -> None:
        """Nobody waits for it any more: its rows leave before the next step."""
        self.hand_over([], Refusal(499, "cancelled", "the client is gone"))

    def hand_over(self, written: list[Written], refusal: Refusal | None = None) -> None:
        """In the event loop: more was written, or it ends with ``refusal``."""
        self._pending += written
        self._refusal = self._refusal or refusal
        self.over = self.over or refusal is not None
        self._ready.set()

    def send(self, written: list[Written], refusal: Refusal | None = None) -> None:
        """From another thread: `hand_over`."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self.hand_over, written, refusal)


@dataclass(eq=False)
class Seat:
    """A row that has a slot."""

    job: Job
    row: Row
    begun: bool = False
    """Whether its slot is its own, and no longer what the row before left there."""
    read: int = 0
    """How many ids of its prompt the slot holds."""
    size: int = 0
    """How many more of them this turn's step reads."""
    last: float = 0.0
    """When its last token came; 0 before the first."""

    @property
    def slot(self) -> Slot:
        """The row's slot; its ids are the prompt and what was written."""
        return self.row.slot

    def held(self, block_size: int) -> list[int]:
        """The ids that the engine's slot holds from position 0 on: all that were read."""
        if not self.last:
            return self.slot.ids[: self.read]
        slid = window_start(len(self.slot.ids), block_size)
        return [] if slid else self.slot.ids[:-1]  # the last was drawn and not read yet


@dataclass
class Scheduler:
    """Writes for many jobs at once with one model."""

    name: str
    lm: LanguageModel
    limits: Limits
    metrics: ModelMetrics

    def __post_init__(self) -> None:
        self.engine = self.lm.open_engine(self.limits.slots)
        self.free = list(range(self.limits.slots))  # the longest unused first
        self.left: dict[int, list[int]] = {}  # what free slots hold
        self.seats: list[Seat] = []
        self.waiting: deque[tuple[Job, Row]] = deque()
        self.closed = False
        self.turns = 0
        self._condition = threading.Condition()
        self.metrics.queue.set_function(lambda: self.queue)
        self.metrics.in_use.set_function(lambda: len(self.seats))
        self.thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self.thread.start()

    # ---- from the event loop

    @property
    def queue(self) -> int:
        """How many jobs wait for a first slot or a further one."""
        with self._condition:
            return len({id(job) for job, _ in self.waiting})

    @property
    def idle(self) -> bool:
        """Whether nothing is written and nothing waits."""
        return not self.seats and not self.waiting

    def submit(self, job: Job) -> None:
        """Put a job in line. Raises `Refusal` where the line is full or the server closes."""
        if self.closed:
            raise closing()
        if self.queue >= self.limits.queue + len(self.free):
            raise Refusal(
                429,
                "queue_full",
                f"{self.queue} requests wait for {self.name} already; ask again in a while",
                Retry_After="2",
            )
        with self._condition:
            self.waiting.extend((job, row) for row in job.rows)
            self._condition.notify()

    def close(self) -> None:
        """End every job and the thread, before its next step."""
        with self._condition:
            self.closed = True
            self._condition.notify()

    # ---- the engine thread

    def _run(self) -> None:
        while self._has_work():
            try:
                self._turn()
            except Exception as error:  # a bug: what was there fails, the server goes on
                refusal = _failed(error)
                self._drop(lambda job, refusal=refusal: refusal)
                self.left.clear()  # what slots hold is not to be trusted
        self._drop(lambda job: closing())

    def _has_work(self) -> bool:
        """Wait until there is work; False when there is to be no more."""
        with self._condition:
            while self.idle and not self.closed:
                self._condition.wait()
            return not self.closed

    def _turn(self) -> None:
        now = time.monotonic()
        seconds = self.limits.seconds
        late = Refusal(504, "too_long", f"this took more than {seconds:g} s, the server's limit")
        self._drop(lambda job: late if now > job.deadline else None)
        self._admit()
        planned = self._plan()
        slots = [slot for _, slot in planned]
        self.turns += 1
        shared = min(STRIDE, max(TURN // max(len(self.seats), 1), 1))
        most = shared if all(seat.last for seat in self.seats) else 1
        outcomes = self._step(slots, most) if slots else []
        told: dict[Job, list[Written]] = {}
        for (seat, slot), outcome in zip(planned, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(seat, outcome)
                continue
            seat.read += seat.size
            self.metrics.read.inc(seat.size)
            if slot is seat.slot:
                told.setdefault(seat.job, []).extend(self._take(seat, outcome))
        for job, written in told.items():
            job.send(written)

    def _drop(self, why: Callable[[Job], Refusal | None]) -> None:
        """Let go of jobs that are over, and of those that ``why`` has a refusal for."""
        with self._condition:
            jobs = [job for job, _ in self.waiting] + [seat.job for seat in self.seats]
            for job in set(jobs):
                if not job.over and (refusal := why(job)):
                    job.over = True
                    job.send([], refusal)
            self.waiting = deque(entry for entry in self.waiting if not entry[0].over)
        for seat in [seat for seat in self.seats if seat.job.over]:
            self._leave(seat)

    def _admit(self) -> None:
        """Give free slots to those in line, each the one that holds most of its prompt."""
        with self._condition:
            while self.waiting and self.free:
                job, row = self.waiting.popleft()
                ids = row.slot.ids
                kept = {i: common_length(self.left.get(i, []), ids) for i in self.free}
                row.slot.index = max(kept, key=lambda i: kept[i])
                self.free.remove(row.slot.index)
                self.seats.append(Seat(job, row))

    def _plan(self) -> list[tuple[Seat, Slot]]:
        """What this turn's step does: for a row in the middle of its prompt a slot of what it is
        to have read, for all others their own.
        """
        planned, budget = [], CHUNK
        for seat in list(self.seats):
            seat.size = 0
            if seat.last:
                planned.append((seat, seat.slot))
            elif budget and (seat.begun or self._begin(seat)):
                ids, index = seat.slot.ids, seat.slot.index
                seat.size = min(budget, len(ids) - seat.read)
                budget -= seat.size
                end = seat.read + seat.size
                part = Slot(index, ids[:end], 0, READING, end, left=1)
                planned.append((seat, part if end < len(ids) else seat.slot))
        return planned

    def _begin(self, seat: Seat) -> bool:
        """Make a row ready to be read; False where it must wait, or nothing is to be written."""
        job, row = seat.job, seat.row
        try:
            if job.score and row.row not in job.prompt_tops:
                job.prompt_tops[row.row] = self._score(seat.slot)
            if seat.slot.left:
                seat.begun = self._take_over(seat)
                return seat.begun
            job.send([Written(Piece(row.row, "", finished="length"))])
            self._leave(seat)
        except Exception as error:
            self._fail(seat, error)
        return False

    def _take_over(self, seat: Seat) -> bool:
        """Let a row's slot hold what any slot holds of its prompt; the last id is always read.

        False where another row is about to read much more of it.
        """
        index, wanted, block_size = seat.slot.index, seat.slot.ids[:-1], self.lm.config.block_size
        holding = {other.slot.index: other.held(block_size) for other in self.seats} | self.left
        common = {i: common_length(ids, wanted) for i, ids in holding.items()}
        source = max(common, key=lambda i: (common[i], i == index))
        soon = [common_length(s.slot.ids, wanted) for s in self.seats if s.begun and not s.last]
        if max(soon, default=0) >= common[source] + WORTH:
            return False
        if common[source]:
            self.engine.share(source, index, common[source])
        else:
            self.engine.release(index)
        self.left.pop(index, None)
        seat.read = common[source]
        self.metrics.shared.inc(seat.read)
        return True

    def _score(self, slot: Slot) -> list[Top]:
        """The likeliest tokens and the given one at each place of the prompt but the first."""
        logits = getattr(self.engine, "logits", self.lm.logits)(slot.ids)
        self.left.pop(0, None)  # the native engine reads it in its first slot
        vocab = self.lm.tokenizer.vocab_size
        pairs = zip(logits[:-1, :vocab], slot.ids[1:], strict=True)
        return [[], *(top_logprobs(row, slot.logprobs, token) for row, token in pairs)]

    def _step(self, slots: list[Slot], most: int) -> Sequence[list[int] | Exception]:
        """The engine's step; where that fails each slot's alone, so that only the sick one fails.

        A draw is a function of its key: what a failed step drew is drawn again.
        """
        try:
            return self.engine.step(slots, most)
        except Exception as error:
            if len(slots) == 1:
                return [error]
            return [self._step([slot], 1)[0] for slot in slots]

    def _take(self, seat: Seat, drawn: Iterable[int]) -> list[Written]:
        """What the drawn ids add to a row; what lies past its end is thrown away."""
        row, slot, now = seat.row, seat.slot, time.monotonic()
        timer = self.metrics.between if seat.last else self.metrics.first
        timer.observe(now - (seat.last or seat.job.came))
        seat.last = now
        written = []
        for nth, token in enumerate(drawn):
            explanation = None
            if slot.keep_logits:
                explanation = explain(slot.logits[nth], slot, token, self.lm.tokenizer)
            written.append(Written(row.push(token, slot.top[nth]), explanation))
            if written[-1].piece.finished:
                self._leave(seat)
                break
        self.metrics.written.inc(len(written))
        return written

    def _leave(self, seat: Seat) -> None:
        """Take a row's slot; what it holds stays for who may use it."""
        self.left[seat.slot.index] = seat.held(self.lm.config.block_size)
        self.seats.remove(seat)
        self.free.append(seat.slot.index)

    def _fail(self, seat: Seat, error: Exception) -> None:
        """End a row's job with what the model failed at."""
        seat.job.over = True
        seat.job.send([], _failed(error))
        self._leave(seat)
        self.engine.release(seat.slot.index)
        self.left.pop(seat.slot.index)


def _failed(error: Exception) -> Refusal:
    if isinstance(error, ResourceError):
        return Refusal(503, "no_memory", str(error), Retry_After="10")
    return Refusal(500, "model_error", f"the model failed at this text: {error}")
