"""From a model's logits to the next token: pure functions over arrays, one filter after another.

The chain is Hugging Face's, in its order: repetition penalty, presence and frequency penalties,
temperature, top-k, top-p, min-p, typical. Every number is a float64 and every sum is taken one term
after the other in the order stated, so another language can repeat a draw; only the last bit of
``exp`` and ``log`` may differ from one mathematics library to the next.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from octavo.errors import ConfigError, NonFiniteError
from octavo.settings import Group

Logits = NDArray[np.float64]
"""(V,), natural logarithms up to a constant; -inf marks an id that cannot be drawn."""

GREEDY_BELOW = 1e-5  # a colder temperature than this is greedy, ties and all


@dataclass(frozen=True, kw_only=True)
class Sampling(Group):
    """How the next token is drawn. Raises `ConfigError` for a number out of bounds."""

    temperature: Annotated[float, (0, 1000)] = 1.0
    """Divides the logits; 0 takes the most probable token, the lowest id among equals."""
    top_k: Annotated[int, (0, 2**40)] = 0
    """Keep the k most probable tokens, and all that tie with the k-th; 0: off."""
    top_p: Annotated[float, (0, 1)] = 1.0
    """Keep the fewest tokens that hold this much probability (Holtzman et al. 2020)."""
    min_p: Annotated[float, (0, 1)] = 0.0
    """Drop what is less probable than this share of the best token (Nguyen et al. 2024)."""
    typical_p: Annotated[float, (0, 1)] = 1.0
    """Keep this much probability, nearest to the expected surprise first (Meister et al. 2022)."""
    repetition_penalty: Annotated[float, (0.001, 1000)] = 1.0
    """Above 1, make every token seen less likely, the prompt's too (Keskar et al. 2019)."""
    presence_penalty: Annotated[float, (-1000, 1000)] = 0.0
    """Subtract this from the logit of every token written so far; the prompt does not count."""
    frequency_penalty: Annotated[float, (-1000, 1000)] = 0.0
    """Subtract this for each time the token was written; the prompt does not count."""
    seed: Annotated[int, (0, 2**64 - 1)] = 1337
    """Keys every draw, together with the copy's number and the token's position."""

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW


PRESETS: dict[str, Sampling] = {
    "conservative": Sampling(temperature=0.6, top_k=40),
    "nucleus": Sampling(temperature=0.8, top_p=0.9),
    "greedy": Sampling(temperature=0.0),
}


def make_sampling(preset: str | None = None, **settings: Any) -> Sampling:
    """Sampling settings: a preset's, and any named one over it."""
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}", fix=f"known: {', '.join(PRESETS)}")
    known = sorted(field.name for field in fields(Sampling))
    for name in settings.keys() - set(known):
        raise ConfigError(f"unknown sampling setting {name!r}", fix=f"known: {known}")
    return replace(PRESETS[preset] if preset else Sampling(), **settings)


def pick(
    logits: ArrayLike,
    history: Sequence[int],
    sampling: Sampling,
    n: int,
    position: int,
    prompt_length: int = 0,
) -> int:
    """Draw the token at ``position`` of copy ``n``: the inverse CDF over ids in vocabulary order.

    With weights w = exp(logit - largest logit) and their running sums c, taken from id 0 upwards
    (numpy's cumsum adds one term after the other), it is the first id whose c exceeds u times the
    last c. Arguments and errors as in `filters`.
    """
    *_, (_, filtered) = filters(logits, history, sampling, prompt_length)
    if sampling.greedy:
        return int(filtered.argmax())
    running = _weights(filtered).cumsum()
    return int(running.searchsorted(uniform(sampling.seed, n, position) * running[-1], "right"))


def probabilities(
    logits: ArrayLike, history: Sequence[int], sampling: Sampling, prompt_length: int = 0
) -> NDArray[np.float64]:
    """The distribution (V,) that `pick` draws from. Arguments and errors as in `filters`."""
    *_, (_, filtered) = filters(logits, history, sampling, prompt_length)
    weights = _weights(filtered)
    return weights / weights.cumsum()[-1]


def filters(
    logits: ArrayLike, history: Sequence[int], sampling: Sampling, prompt_length: int = 0
) -> Iterator[tuple[str, Logits]]:
    """Yield ("model", logits), then the name of each filter in force and the logits after it.

    ``logits`` is (V,); ``history`` holds the ids so far, of which the first ``prompt_length`` were
    given, not written. Raises `NonFiniteError` for NaN, infinity, or when every id is ruled out.
    """
    now = np.asarray(logits, dtype=np.float64)
    if not math.isfinite(now.max()):  # NaN and inf come through max; -inf: nothing can be drawn
        raise not_finite()
    yield "model", now
    s = sampling
    if s.repetition_penalty != 1:
        now = penalize_repetition(now, history, s.repetition_penalty)
        yield "repetition_penalty", now
    if s.presence_penalty or s.frequency_penalty:
        written = history[prompt_length:]
        now = penalize_written(now, written, s.presence_penalty, s.frequency_penalty)
        yield "presence_and_frequency_penalty", now
    if s.greedy:
        yield "temperature", _only(now, now.argmax())
        return
    if s.temperature != 1:
        now = now / s.temperature
        yield "temperature", now
    if s.top_k:
        now = top_k(now, s.top_k)
        yield "top_k", now
    if s.top_p < 1:
        now = top_p(now, s.top_p)
        yield "top_p", now
    if s.min_p > 0:
        now = min_p(now, s.min_p)
        yield "min_p", now
    if s.typical_p < 1:
        now = typical_p(now, s.typical_p)
        yield "typical_p", now


def not_finite() -> NonFiniteError:
    """What every engine says of such logits."""
    fix = "its weights are damaged or overflow; go back to an earlier checkpoint"
    return NonFiniteError("the model's logits are not finite", fix=fix)


def penalize_repetition(logits: Logits, ids: Sequence[int], penalty: float) -> Logits:
    """CTRL's penalty (Keskar et al. 2019), once for each token seen, however often."""
    seen, _ = _seen(ids, logits.size)
    penalized = logits.copy()
    old = logits[seen]
    penalized[seen] = np.where(old < 0, old * penalty, old / penalty)
    return penalized


def penalize_written(
    logits: Logits, ids: Sequence[int], presence: float, frequency: float
) -> Logits:
    """OpenAI's penalties: ``presence`` once for each token written, ``frequency`` each time."""
    seen, counts = _seen(ids, logits.size)
    penalized = logits.copy()
    penalized[seen] -= presence + frequency * counts
    return penalized


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the k largest logits and whatever equals the k-th; k beyond V keeps all."""
    k = min(k, logits.size)
    return np.where(logits >= np.partition(logits, -k)[-k], logits, -np.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Keep tokens, most probable first (of equals the lower id), until they hold p: the one that
    crosses p stays, and so the best one always does.

    All tokens less probable than (1 - p)/V hold less than 1 - p together, so they lie beyond the
    crossing; only the few above that are sorted.
    """
    weights = _weights(logits)
    total = weights.cumsum()[-1]
    candidates = np.flatnonzero(weights >= (1 - p) * total / weights.size)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    crossing = weights[order].cumsum().searchsorted(p * total)
    return _only(logits, order[: crossing + 1])


def min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens at least p times as probable as the best."""
    return np.where(logits - logits.max() >= math.log(p), logits, -np.inf)


def typical_p(logits: Logits, p: float) -> Logits:
    """Keep tokens whose surprise, -log probability, is nearest to its mean, the entropy, until they
    hold p: the one that crosses p stays, with all as near as it.
    """
    ids = np.flatnonzero(logits > -np.inf)
    weights = _weights(logits)[ids]
    total = weights.cumsum()[-1]
    surprise = math.log(total) - (logits[ids] - logits.max())
    entropy = (weights / total * surprise).cumsum()[-1]
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, kind="stable")
    crossing = weights[order].cumsum().searchsorted(p * total)
    widest = distance[order[min(crossing, ids.size - 1)]]
    return _only(logits, ids[distance <= widest])


def top_logprobs(logits: ArrayLike, k: int, chosen: int) -> list[tuple[int, float]]:
    """The k most probable ids with the natural logarithm of their probability, best first.

    These are the model's own, before any filter. ``chosen`` comes last where it is not among them.
    """
    plain = np.asarray(logits, dtype=np.float64)
    logprobs = plain - plain.max() - math.log(_weights(plain).cumsum()[-1])
    candidates = np.flatnonzero(top_k(plain, k) > -np.inf)
    best = candidates[np.argsort(-plain[candidates], kind="stable")][:k].tolist()
    return [(i, float(logprobs[i])) for i in dict.fromkeys([*best, chosen])]


def uniform(seed: int, n: int, position: int) -> float:
    """A number in [0, 1) that is a function of its key alone.

    The seed's n-th SplitMix64 number (Steele et al. 2014) is itself the seed of a stream, whose
    ``position``-th number gives the 53 bits.
    """
    return (splitmix64(splitmix64(seed, n), position) >> 11) * 2.0**-53


def splitmix64(seed: int, index: int) -> int:
    """The number at ``index`` (from 0) of the SplitMix64 stream of ``seed``, 64 bits."""
    word = 2**64 - 1
    z = seed + (index + 1) * 0x9E3779B97F4A7C15 & word
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ z >> 27) * 0x94D049BB133111EB & word
    return z ^ z >> 31


def _weights(logits: Logits) -> NDArray[np.float64]:
    """Probabilities up to a common factor; the largest is exactly 1."""
    return np.exp(logits - logits.max())


def _only(logits: Logits, ids: NDArray[np.int64] | np.int64) -> Logits:
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def _seen(ids: Sequence[int], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different ids below ``size`` and how often each occurs; padded ids have no logit."""
    seen, counts = np.unique(np.asarray(ids, dtype=np.int64), return_counts=True)
    return seen[seen < size], counts[seen < size]
