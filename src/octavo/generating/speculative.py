"""Speculative decoding: a cheap guess at the next tokens, read by the model in one pass.

The rule (in the manner of Leviathan et al. 2023, but exact draw by draw):
  a draft proposes k tokens; the model reads them all in one pass,
  draws the token of each position with that position's own number, as it does without a draft,
  and goes on while its token is the draft's. So the text is the same, whatever the draft.

What a draft costs and brings is measured while it runs, and it is left alone where it does not
pay: `Pace` says how. Needs no torch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo.generating.writing import Engine, Slot, common_length, window_start

LENGTHS = (1, 2, 4, 8)  # of drafts; each is tried before a longer one
HOPE, HOPE_AGAIN = 0.7, 0.5  # the agreement expected of a draft at first, and when tried again
MEMORY = 1 / 16  # the weight of a drafted token in the agreement
HOPED_COST = 0.1  # of a drafted token, in plain tokens, before any was measured
HOPED_READING = 0.15  # of a token the draft reads, in plain tokens, were it as large as the model
FIRST = 3.0  # plain tokens' time may be lost to drafts that did not pay,
SHARE = 0.008  # or so much of the time of plain writing, where that is more
GLANCE, FRESH = 16, 512  # plain tokens timed at once, and for how many tokens that holds
GLANCES, SURE = 3, 2  # the middle one of so many such times counts; drafts begin after so many
UNGUESSED = 4  # plain tokens to write where nobody had an idea
QUICK = 1e-4  # seconds: when plain tokens come faster, Python is too slow to draft any
PAUSE = 64  # tokens without drafts after a failure; doubles with each
EARNED = 16  # plain tokens' time that drafts have brought may be lost again
WORTH = 1.05  # times as fast as plain writing must drafts promise to be
LEVEL = 2  # tokens a row that a drafter may be behind and be as fast as ever
NGRAMS = (12, 6, 3)  # tokens that must agree before what followed them is proposed


class Drafter(Protocol):
    """What guesses: a smaller model, the text so far, or anything of this shape."""

    def propose(self, slots: list[Slot], length: int) -> list[list[int]]:
        """For each slot up to ``length`` ids that may come next; empty: no idea."""
        ...

    def behind(self, slots: list[Slot]) -> int:
        """How many tokens it would have to read before it could propose anything."""
        ...

    def release(self, index: int) -> None:
        """Forget what is known of this slot."""
        ...


class LookupDrafter:
    """Prompt lookup (Saxena 2023): where the last tokens stood before, what followed them."""

    def __init__(self) -> None:
        self.followers: dict[int, dict[tuple[int, ...], int]] = {}
        self.indexed: dict[int, int] = {}

    def propose(self, slots: list[Slot], length: int) -> list[list[int]]:
        """See `Drafter.propose`; the longest of the n-grams that occurred, where it was last."""
        return [self._guess(slot.index, slot.ids, length) for slot in slots]

    def behind(self, slots: list[Slot]) -> int:
        """None: what it reads, it reads in no time."""
        return 0

    def release(self, index: int) -> None:
        """Forget this slot's text."""
        self.followers.pop(index, None)
        self.indexed.pop(index, None)

    def _guess(self, index: int, ids: list[int], length: int) -> list[int]:
        followers = self.followers.setdefault(index, {})
        for end in range(self.indexed.get(index, min(NGRAMS)), len(ids)):
            for n in NGRAMS:
                if n <= end:
                    followers[tuple(ids[end - n : end])] = end
        self.indexed[index] = max(len(ids), min(NGRAMS))
        for n in NGRAMS:
            at = followers.get(tuple(ids[-n:])) if n <= len(ids) else None
            if at is not None:  # past the end of the text it repeats itself
                return [ids[at + k % (len(ids) - at)] for k in range(length)]
        return []


class ModelDrafter:
    """A smaller model with the same tokenizer, which draws with the same numbers as the large one.

    It has shadows of the slots. What it read of a guess that was not accepted it reads anew.
    """

    def __init__(self, engine: Engine) -> None:
        """``engine`` has a slot for each of the large model's."""
        self.engine = engine
        self.shadows: dict[int, Slot] = {}
        self.known: dict[int, int] = {}  # how many of a shadow's ids are the text's, not a guess

    def propose(self, slots: list[Slot], length: int) -> list[list[int]]:
        """See `Drafter.propose`: what the model would write."""
        misled = [slot for slot in slots if not self._follow(slot)]
        if misled:
            self.engine.step([self.shadows[slot.index] for slot in misled])  # what it draws is lost
            for slot in misled:
                self._follow(slot)
        todo = shadows = [self.shadows[slot.index] for slot in slots]
        for shadow in shadows:
            shadow.left = length
        while todo:
            for shadow, ids in zip(todo, self.engine.step(todo, length), strict=True):
                shadow.ids.extend(ids)
                shadow.left = 0 if ids[-1] == shadow.eot else shadow.left - len(ids)
            todo = [shadow for shadow in todo if shadow.left]
        return [shadow.ids[self.known[shadow.index] :] for shadow in shadows]

    def behind(self, slots: list[Slot]) -> int:
        """Tokens of the slots that the shadows have not."""
        have = [len(shadow.ids) if (shadow := self.shadows.get(s.index)) else 0 for s in slots]
        return sum(max(0, len(s.ids) - read) for s, read in zip(slots, have, strict=True))

    def release(self, index: int) -> None:
        """Forget this slot's shadow."""
        self.engine.release(index)
        self.shadows.pop(index, None)
        self.known.pop(index, None)

    def _follow(self, slot: Slot) -> bool:
        """Let the shadow's ids be the slot's; False where only one of the new ones could follow.

        The engine trusts its cache for all ids but the last, so after a wrong guess it must be
        stepped with one right id at the end before more may follow.
        """
        new = Slot(slot.index, [], slot.n, slot.sampling, slot.prompt_length, eot=slot.eot)
        shadow, known = self.shadows.setdefault(slot.index, new), self.known.get(slot.index, 0)
        agreed = known + common_length(shadow.ids[known:], slot.ids[known:])
        stale = agreed < min(len(shadow.ids), len(slot.ids)) - 1
        shadow.ids = slot.ids[: agreed + 1] if stale else list(slot.ids)
        self.known[slot.index] = len(shadow.ids)
        return not stale


@dataclass
class Pace:
    """How long drafts should be: what was measured, and what that promises.

    With agreement a, the share of drafted tokens that were the model's, a draft of k tokens brings
    1 + a + ... + a^k tokens in the time that such a step was seen to take. The length with the most
    tokens a second is taken, none where those are hardly more than without. Lengths not tried yet
    are expected to be cheap, so that each is tried, from short to long.

    What drafts may lose is bounded. A step of t seconds that brings m tokens loses t - m p, where p
    is a plain token's time; gains pay losses back, and up to EARNED tokens in advance. No draft is
    begun that, by what drafted tokens and those that the drafter must read first cost so far, could
    bring the sum above FIRST plain tokens or SHARE of the plain time of all that was written: 1.2 %
    of 256 tokens, 0.8 % in the end. The rest up to 1/0.97 = 1 + 3.1 % is for drafts that cost more
    than was thought. After a failure they pause for 64 tokens, then 128, and so on, until drafts
    have paid for themselves.
    """

    rows: int = 0
    """Of the batch that the times are true of."""
    times: dict[int, float] = field(default_factory=dict)
    """Seconds of a step by the length of its longest draft; 0: of a plain token a row."""
    agreement: float = HOPE
    cost: float = 1.0
    """Of a drafted token that is in vain, in plain tokens."""
    reading: float = 0.01
    """Of a token that the drafter has to read first, in plain tokens."""
    lost: float = 0.0
    """Seconds that drafts have cost more than they have brought."""
    plain: float = 0.0
    """Seconds that plain writing would have taken so far, prompts included."""
    glances: list[float] = field(default_factory=list)
    """The last times of a plain token a row; the middle one is times[0]."""
    fresh: int = 0
    """Tokens until plain writing is timed again."""
    waiting: int = 0
    """Tokens until drafts are tried again."""
    pause: int = PAUSE
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def length(self, rows: int, behind: int = 0) -> int:
        """How many tokens to draft for each of ``rows``; 0: write plainly.

        ``behind`` is how many the drafter would have to read before.
        """
        if rows != self.rows:
            self.rows, self.times, self.glances = rows, {}, []
        if self.waiting > 0 or self.fresh <= 0 or len(self.glances) < SURE:
            return 0
        token = self.times[0]
        tried = [k for k in LENGTHS if k in self.times]
        untried = [k for k in LENGTHS if k > max(tried, default=0)]
        best = max([*tried, *untried[:1]], key=self._speed)
        left = (max(FIRST * token, SHARE * self.plain) - self.lost) / token
        affordable = (left - self.reading * behind) / self.cost
        pays = token > QUICK and self._speed(best) * token > WORTH
        best = max(0, min(best, int(affordable))) if pays else 0
        if not best:
            self.waiting = self.pause
            self.pause *= 2 if self.lost > 0 else 1
            self.times, self.agreement = {0: token}, max(self.agreement, HOPE_AGAIN)
        return best

    def learn(
        self, drafts: list[list[int]], drawn: list[list[int]], seconds: float, behind: int = 0
    ) -> None:
        """Note a step with drafts, or that went without though some were asked for.

        What it took says what reading costs where the drafter was ``behind``, else what drafts do.
        """
        self._add(drawn, seconds)
        tokens, longest, token = _mean_length(drawn), max(map(len, drafts)), self.times[0]
        self.lost = max(-EARNED * token, self.lost + seconds - tokens * token)
        self.plain += tokens * token
        self.fresh -= round(tokens)
        if not longest:
            return
        if behind > LEVEL * len(drawn):
            read = max(seconds / token - tokens, 0) / behind
            self.reading = _average(self.reading, read, 0.5)
        else:
            self.times[longest] = _average(self.times.get(longest), seconds)
            self.cost = _average(self.cost, max(seconds / token - 1, 0.01) / longest, 0.5)
        agreed = [common_length(draft, ids) for draft, ids in zip(drafts, drawn, strict=True)]
        tried = sum(
            min(n + 1, len(d), len(i)) for n, d, i in zip(agreed, drafts, drawn, strict=True)
        )
        self.agreement += (1 - (1 - MEMORY) ** tried) * (sum(agreed) / tried - self.agreement)
        self.drafted += sum(map(len, drafts))
        self.accepted += sum(agreed)
        if self.lost <= 0:
            self.pause = PAUSE

    def learn_plain(self, drawn: list[list[int]], seconds: float, timed: bool = True) -> None:
        """Note a step without drafts; its time says nothing where a prompt or window was read."""
        self._add(drawn, seconds)
        tokens = _mean_length(drawn)
        self.plain += seconds
        self.waiting -= round(tokens)
        if timed:
            self.glances = [*self.glances[1 - GLANCES :], seconds / tokens]
            self.times[0] = sorted(self.glances)[(len(self.glances) - 1) // 2]
            self.fresh = FRESH

    def report(self) -> dict[str, float]:
        """What was written and how: counts, acceptance as a share, seconds, tokens a second."""
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": round(self.accepted / self.drafted, 3) if self.drafted else 0.0,
        }

    def __str__(self) -> str:
        facts = self.report()
        if not self.drafted:
            return f"{facts['tokens_per_s']:,} tokens/s; nothing was drafted"
        return (
            f"{facts['tokens_per_s']:,} tokens/s; {self.accepted:,} of {self.drafted:,} drafted "
            f"tokens accepted ({facts['acceptance']:.0%}), {self.tokens:,} written"
        )

    def _add(self, drawn: list[list[int]], seconds: float) -> None:
        self.tokens += sum(map(len, drawn))
        self.seconds += seconds

    def _speed(self, length: int) -> float:
        """Tokens a second expected of drafts of this length."""
        known = max(k for k in self.times if k <= length)
        seconds = self.times[known] + HOPED_COST * self.times[0] * (length - known)
        return sum(self.agreement**k for k in range(length + 1)) / seconds


class SpeculativeEngine:
    """An engine that lets a drafter guess and its engine judge; writes what that engine writes."""

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        block_size: int,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``block_size`` is the engine's; a ``pace`` brings what was learned before."""
        self.engine, self.drafter, self.block_size = engine, drafter, block_size
        self.pace, self.clock = pace or Pace(), clock
        self.slots = engine.slots
        self.starts: dict[int, int] = {}  # where each slot's window began when last read

    def step(self, slots: list[Slot], most: int = 1) -> list[list[int]]:
        """See `Engine.step`; the slots' drafts are this engine's to set."""
        began, pace = self.clock(), self.pace
        reads = self._must_read(slots)
        wanted = min(most, max(slot.left for slot in slots))
        behind = self.drafter.behind(slots)
        length = 0 if reads else min(pace.length(len(slots), behind), wanted - 1)
        if not length:
            drawn = self.engine.step(slots, min(most, max(1 if reads else GLANCE, pace.waiting)))
            pace.learn_plain(drawn, self.clock() - began, timed=not reads)
            return drawn
        drafts = self.drafter.propose(slots, length)
        for slot, draft in zip(slots, drafts, strict=True):
            slot.draft = draft
        longest = max(map(len, drafts))
        drawn = self.engine.step(slots, longest + 1 if longest else UNGUESSED)
        for slot in slots:
            slot.draft = []
        pace.learn(drafts, drawn, self.clock() - began, behind)
        return drawn

    def release(self, index: int) -> None:
        """Forget what is known of this slot."""
        self.starts.pop(index, None)
        self.engine.release(index)
        self.drafter.release(index)

    def _must_read(self, slots: list[Slot]) -> bool:
        """Whether a row begins, or its window has moved: then all of it is read."""
        before = [self.starts.get(slot.index) for slot in slots]
        for slot in slots:
            self.starts[slot.index] = window_start(len(slot.ids), self.block_size)
        return before != [self.starts[slot.index] for slot in slots]


def _average(old: float | None, new: float, weight: float = 0.2) -> float:
    """A running mean; one outlier, a busy machine say, counts twice the mean at most."""
    return new if old is None else old + weight * (min(new, 2 * old) - old)


def _mean_length(rows: Sequence[Sequence[int]]) -> float:
    return sum(map(len, rows)) / len(rows)
