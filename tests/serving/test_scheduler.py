"""Many texts at once write what each writes alone, and leave when nobody waits for them."""

import asyncio
import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
from run_kit import LETTERS, make_run

from octavo.errors import NonFiniteError
from octavo.generating.sampling import Sampling, probabilities
from octavo.generating.writing import STRIDE
from octavo.language_model import load
from octavo.serving.limits import Limits
from octavo.serving.metrics import Metrics
from octavo.serving.models import Served
from octavo.serving.refusals import Refusal
from octavo.serving.scheduler import CHUNK, TURN, WORTH, Job

ENGINES = ["native", "torch"]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.8, "seed": 1},
    {"top_k": 3, "repetition_penalty": 1.3, "seed": 2},
    {"min_p": 0.05, "typical_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 3},
    {"temperature": 1.5, "seed": 4},
]
PROMPTS = ["a", "abc abc", "h" * 60, "der rest ist sehr hart\n" * 2, "gab es das hier", "abc abd"]


@contextmanager
def serving(path, engine="native", **limits):
    served = Served("m", load(path, "cpu", engine=engine), Limits(**limits), Metrics())
    try:
        yield served
    finally:
        served.scheduler.close()
        served.scheduler.thread.join(20)
        assert not served.scheduler.thread.is_alive()


def tried(trial, path, engine="native", **limits):
    """What ``trial(served)`` finds out."""
    with serving(path, engine, **limits) as served:
        return asyncio.run(trial(served))


def start(served, prompt, most=30, n=1, stop=(), seconds=60, tops=None, explained=False, **how):
    """Submit a request for text; must be called in a running loop."""
    ids = served.encode(prompt)
    rows = served.rows([ids], n, most, Sampling(**how), list(stop), tops, explained)
    job = Job(rows, seconds, score=tops is not None)
    served.scheduler.submit(job)
    return job


async def finish(job):
    """The text of every row, and all pieces."""
    texts, pieces = [""] * len(job.rows), []
    async for written in job:
        for each in written:
            texts[each.piece.row] += each.piece.text
            pieces.append(each)
    return texts, pieces


@pytest.mark.parametrize("engine", ENGINES)
def test_a_text_is_the_same_among_any_neighbours(tmp_path, engine):
    """Requests come in at any time, longer than the window too; more than there are slots."""
    path = make_run(tmp_path / "run", block_size=64)
    asked = [
        (prompt, {"most": 5 + 17 * (i + j) % 90, "n": 1 + (i + j) % 3, **how})
        for i, prompt in enumerate(PROMPTS)
        for j, how in enumerate(SETTINGS)
        if engine == "native" or (i + j) % 3 == 0
    ]

    async def all_at_once(served):
        tasks = []
        for number, (prompt, how) in enumerate(asked):
            tasks.append(asyncio.create_task(finish(start(served, prompt, **how))))
            await asyncio.sleep(0.003 * (number % 3))
        return [texts for texts, _ in await asyncio.gather(*tasks)]

    with serving(path, engine, slots=5) as served:
        together = asyncio.run(all_at_once(served))
        assert served.scheduler.idle
        assert sorted(served.scheduler.free) == list(range(5))
    lm = load(path, "cpu", engine=engine)
    for (prompt, how), texts in zip(asked, together, strict=True):
        how = dict(how)
        most, n = how.pop("most"), how.pop("n")
        assert lm.generate([prompt], most, n=n, **how) == texts


def test_prompts_are_read_in_chunks_between_others_tokens(tmp_path):
    """A long prompt does not stand in the way of those who write: at most CHUNK tokens a step."""
    path = make_run(tmp_path / "run", block_size=512)
    steps = []

    async def trial(served):
        step = served.scheduler.engine.step

        def spy(slots, most=1):
            reading = [len(slot.ids) for slot in slots if len(slot.ids) == slot.prompt_length]
            steps.append((reading, len(slots) - len(reading), most))
            return step(slots, most)

        served.scheduler.engine.step = spy
        short = start(served, "a", most=4000)
        await anext(aiter(short))
        await finish(start(served, "ba" * 200, most=2))
        short.cancel()

    tried(trial, path)
    chunks = [*range(CHUNK, 400, CHUNK), 400]
    assert [each for each in steps if each[0]] == [([n], n > 1, 1) for n in (1, *chunks)]


@pytest.mark.parametrize("rows", [1, 4, 5, 16])
def test_many_rows_write_fewer_tokens_a_step(tmp_path, rows):
    """TURN of them, all rows together, so that each row's next event comes soon."""
    path = make_run(tmp_path / "run")
    steps = []

    async def trial(served):
        step = served.scheduler.engine.step

        def spy(slots, most=1):
            steps.append((len(slots), most))
            return step(slots, most)

        served.scheduler.engine.step = spy
        return await finish(start(served, "abc", most=100, n=rows))

    tried(trial, path, slots=16)
    assert (rows, min(STRIDE, TURN // rows)) in steps
    assert all(most == 1 or slots * most <= TURN for slots, most in steps)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_shared_beginning_is_read_once(tmp_path, engine):
    """Copies of a prompt, and a conversation that goes on, read only what is new."""
    path = make_run(tmp_path / "run", block_size=256)
    prompt = "der rest ist hart\n" * 8
    lm = load(path, "cpu", engine=engine)

    async def trial(served):
        (first, _), read = (
            await finish(start(served, prompt, 20, n=4)),
            served.scheduler.metrics.read,
        )
        assert len(prompt) + 3 <= read._value.get() <= len(prompt) + 3 * WORTH
        assert first == lm.generate([prompt], 20, n=4)
        longer = prompt + first[1] + "\na"
        before = read._value.get()
        (again, _) = await finish(start(served, longer, 20))
        assert read._value.get() - before <= 4
        assert again == lm.generate([longer], 20)

    tried(trial, path, engine, slots=6)


def test_cancelled_rows_leave_within_two_steps(tmp_path):
    """While writing, while reading a prompt and while in line."""
    path = make_run(tmp_path / "run", block_size=2048)

    async def trial(served):
        scheduler = served.scheduler
        writing = start(served, "a", most=4000, n=2)
        await anext(aiter(writing))
        reading = start(served, "ab" * 1000, most=4000)
        waiting = start(served, "a", most=4000, n=3)
        while len(scheduler.seats) < 3:
            await asyncio.sleep(0.001)
        for job in (writing, reading, waiting):
            job.cancel()
        turns = scheduler.turns
        while not scheduler.idle:
            await asyncio.sleep(0.001)
        assert scheduler.turns - turns <= 2
        assert len(scheduler.free) == 3
        with pytest.raises(Refusal, match="gone"):
            await finish(reading)
        assert (await finish(start(served, "a", most=3)))[0] == [load(path).generate("a", 3)]

    tried(trial, path, slots=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_fails_at_one_text_goes_on_with_the_others(tmp_path, engine):
    """One token becomes NaN. Zero times NaN is NaN: left in the cache it would reach other rows."""
    sick = LETTERS.encode("h")[0]
    path = make_run(tmp_path / "run", poison=sick, block_size=128)
    lm = load(path, "cpu", engine=engine)

    def alone(prompt, seed):
        try:
            return lm.generate(prompt, 25, seed=seed, top_k=4)
        except NonFiniteError:
            return None

    prompts = ["abc", "de", "a" * 99, "de"]
    seeds = [next(s for s in range(100) if alone(prompt, s)) for prompt in prompts]

    async def trial(served):
        asked = list(zip(prompts, seeds, strict=True))
        well = [start(served, p, most=25, seed=s, top_k=4) for p, s in asked[:2]]
        ill = [start(served, "ab" * 40 + "h" + "ab" * 10, most=25), start(served, "h", most=25)]
        for job in ill:
            with pytest.raises(Refusal, match="not finite") as refused:
                await finish(job)
            assert refused.value.status == 500
        finished = [(await finish(job))[0][0] for job in well]
        for job in [
            start(served, letter * 80 + "h", most=25) for letter in "abcd"
        ]:  # in every slot
            with pytest.raises(Refusal, match="not finite"):
                await finish(job)
        after = [start(served, p, most=25, seed=s, top_k=4) for p, s in asked[2:]]
        return finished + [(await finish(job))[0][0] for job in after]

    assert tried(trial, path, engine, slots=4) == [
        alone(*each) for each in zip(prompts, seeds, strict=True)
    ]


def test_a_bug_ends_what_is_in_work_and_nothing_else(tmp_path):
    async def trial(served):
        plan = served.scheduler._plan
        served.scheduler._plan = lambda: 1 / 0
        with pytest.raises(Refusal, match="division by zero"):
            await finish(start(served, "a"))
        served.scheduler._plan = plan
        assert (await finish(start(served, "a", most=4)))[1]
        assert served.scheduler.thread.is_alive()

    tried(trial, make_run(tmp_path / "run"), slots=2)


def test_what_takes_too_long_is_told_so_and_the_queue_has_an_end(tmp_path):
    async def trial(served):
        late = start(served, "a", most=100_000, seconds=0.2)
        with pytest.raises(Refusal) as refused:
            await finish(late)
        assert refused.value.status == 504
        jobs = [start(served, "a", most=100_000)]
        while not served.scheduler.seats:
            await asyncio.sleep(0.001)
        jobs += [start(served, "a", most=3), start(served, "a", most=3)]
        with pytest.raises(Refusal) as refused:
            start(served, "a")
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "2"})
        jobs[0].cancel()
        for job in jobs[1:]:
            assert len((await finish(job))[1]) == 3

    tried(trial, make_run(tmp_path / "run"), slots=1, queue=2, tokens=100_000)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_an_explanation_is_what_the_token_was_drawn_from(tmp_path, engine, how):
    path = make_run(tmp_path / "run")
    lm = load(path, "cpu", engine=engine)

    async def trial(served):
        return await finish(start(served, "abc", most=12, explained=True, **how))

    (text,), pieces = tried(trial, path, engine)
    assert text == lm.generate("abc", 12, **how)
    ids, vocab = LETTERS.encode("abc"), LETTERS.vocab_size
    for written in pieces:
        token, told = written.piece.id, written.explanation
        logits = lm.logits(ids)[-1, :vocab]
        q = probabilities(logits, ids, Sampling(**how), prompt_length=3)
        p = probabilities(logits, ids, Sampling())
        assert told["id"] == token
        assert told["p"] == pytest.approx(p[token], abs=1e-5)
        assert told["q"] == pytest.approx(q[token], abs=1e-4)
        assert [a["id"] for a in told["alternatives"]] == np.argsort(-p, kind="stable")[
            :10
        ].tolist()
        for each in told["alternatives"]:
            assert (each["q"] > 0) == (each["cut"] is None) == (q[each["id"]] > 0)
        gone = sum(each["tokens"] for each in told["cut"].values())
        assert gone == (q == 0).sum()
        assert sum(c["p"] for c in told["cut"].values()) == pytest.approx(p[q == 0].sum(), abs=1e-5)
        ids.append(token)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scored_prompt_has_the_models_own_probabilities(tmp_path, engine):
    """Beside a text in work, whose place in the native engine the scoring takes for a moment."""
    path = make_run(tmp_path / "run")
    lm = load(path, "cpu", engine=engine)
    prompt = "der rest ist hart"

    async def trial(served):
        beside = start(served, "abc", most=400, seed=5)
        begun = await anext(aiter(beside))
        job = start(served, prompt, most=0, tops=2)
        await finish(job)
        text = "".join(each.piece.text for each in begun) + (await finish(beside))[0][0]
        return job.prompt_tops[0], text

    tops, text = tried(trial, path, engine)
    assert text == lm.generate("abc", 400, seed=5)
    logits = np.float64(lm.logits(ids := LETTERS.encode(prompt))[:-1, : LETTERS.vocab_size])
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert tops[0] == []
    for row, token, top in zip(logprobs, ids[1:], tops[1:], strict=True):
        assert dict(top)[token] == pytest.approx(row[token], abs=1e-5)
        assert [i for i, _ in top[:2]] == np.argsort(-row, kind="stable")[:2].tolist()


def test_limits_are_held_to_sense():
    for wrong in ({"slots": 0}, {"queue": -1}, {"seconds": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
    assert dataclasses.replace(Limits(), slots=2).slots == 2
