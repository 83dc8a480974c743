"""`octavo quantize`: packs a run's weights, and says what that costs and gives.

``auto`` looks for the smallest mix of int8 and int4 that raises perplexity by no more than it may.
What each part of the model loses at int4 is measured once, by itself. A coarser group is taken to
do harm in proportion to the squared error of the weights: to second order the divergence is a
quadratic form of it, as in HAWQ-V2 (Dong et al. 2020). Steps towards smaller storage are taken in
the order of harm a byte saved, and how many can be taken is found by bisection, measuring the whole
model each time. The same run, text and number of threads give the same mix.
"""

import bisect
import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.adapting.quantize import (
    Weights,
    bits,
    choose_storage,
    legal_groups,
    load_quantized,
    plain,
    quantize,
    quantized,
    quantized_model,
)
from octavo.config import ModelConfig
from octavo.errors import OctavoError, ParityError
from octavo.language_model import load
from octavo.model.gpt import GPT
from octavo.packed import Storage, add_facts, dequantize, packed_path
from octavo.studies.quantize_cost import Judge, tokens_per_second, windows_for
from octavo.text.token_files import watched
from octavo.training.packing import pack_run, weights_of

MOST_UNITS = 30  # measured one by one
RANKED_ON = 4  # every fourth window: an order needs less than a verdict
WARN_ABOVE = 0.05  # a rise of perplexity that is worth a warning
INT8 = Storage("int8")
Step = tuple[str, int]
"""A unit, and the level of storage it comes to."""


def quantize_run(
    path: Path | str,
    precision: str,
    text: str | None = None,
    bound: float = 0.01,
    base: str | None = None,
) -> dict[str, Any]:
    """Pack the run at ``path`` and measure it, on the file ``text`` if one is named.

    ``bound`` is how much ``auto`` may raise perplexity, as a share: where no mix keeps to it,
    `ParityError`. Raises as `weights_of` and `pack_run` besides.
    """
    lm = load(path, device="cpu", base=base, speculate="off")
    weights = weights_of(lm)
    assert lm.run is not None
    windows = windows_for(lm, text)
    judge = Judge(lm.model, windows)
    chosen, remarks = None, []
    if precision == "auto":
        chosen, remarks = search(Mix(lm.config, weights), judge, bound)
    facts = pack_run(lm, weights, precision, chosen)
    cost = judge.cost(load_quantized(lm.run, precision), f"measuring {precision}")
    if cost.rise > WARN_ABOVE:
        remarks.append(f"warning: perplexity rises by {cost.rise:.1%}; --to auto keeps to a bound")
    figures: dict[str, Any] = {"times_smaller": facts["fp32_bytes"] / facts["packed_bytes"]}
    figures |= {"measured_on": windows.name, "tokens": windows.tokens}
    if not windows.own:
        figures["perplexity"] = {"before": math.exp(judge.loss), "after": math.exp(cost.loss)}
        figures["perplexity"]["rises_percent"] = 100 * cost.rise
    figures["kl_nats_per_token"] = cost.kl
    figures["tokens_per_s"], slower = _speeds(path, precision, base)
    figures["remarks"] = facts.pop("remarks") + remarks + slower
    add_facts(packed_path(lm.run.path, precision), figures)
    return facts | figures


class Mix:
    """A quantized model whose units, tensors that move together, are each stored at a level.

    Level 0 is int8, level 1 the usual int4, and those above have ever larger groups.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        """Everything is at level 0."""
        self.weights = weights
        self.storages, _ = choose_storage(weights, "auto")
        smallest, self.remarks = choose_storage(weights, "int4")
        self.ladders = {
            name: ladder(weights[name].shape[1])
            for name, storage in smallest.items()
            if storage.kind == "int4"
        }
        self.units = units(list(self.ladders))
        self.model = quantized_model(config, dict(quantized(weights, self.storages)))

    def storage(self, name: str, level: int) -> Storage:
        """How a tensor is kept at this level, or at the last it has."""
        return self.ladders[name][min(level, len(self.ladders[name]) - 1)]

    def at(self, steps: Sequence[Step]) -> GPT:
        """The model after these steps from level 0."""
        levels = dict(steps)
        for unit, names in self.units.items():
            for name in names:
                self._keep(name, self.storage(name, levels.get(unit, 0)))
        return self.model

    def _keep(self, name: str, storage: Storage) -> None:
        if self.storages[name] == storage:
            return
        values, scale = quantize(self.weights[name], storage)
        assert scale is not None
        tied = name == "tok_emb.weight" and self.model.config.tie_embeddings
        places = [name, "lm_head.weight"] if tied else [name]
        for place in places:
            layer: Any = self.model.get_submodule(place.removesuffix(".weight"))
            layer.weight, layer.scale = torch.from_numpy(values), torch.from_numpy(scale)
        self.storages[name] = storage

    def bytes(self, unit: str, level: int) -> int:
        """What a unit takes at this level."""
        names = self.units[unit]
        return sum(self.storage(name, level).bytes(self.weights[name].shape) for name in names)

    def error(self, unit: str, level: int) -> float:
        """The squared error of a unit's weights at this level."""
        total = 0.0
        for name in self.units[unit]:
            kept = dequantize(*quantize(self.weights[name], self.storage(name, level)))
            total += float(np.square(plain(self.weights[name]) - kept).sum(dtype=np.float64))
        return total


def ladder(columns: int) -> list[Storage]:
    """The ways to keep a matrix of such rows, from int8 by the usual int4 to the smallest."""
    usual, *others = legal_groups(columns)
    coarser = sorted((g for g in others if bits(g) < bits(usual)), key=bits, reverse=True)
    return [INT8, *(Storage("int4", group) for group in (usual, *coarser))]


def units(names: Sequence[str]) -> dict[str, list[str]]:
    """At most so many units of tensors as are measured: each, or by sublayer, layer, layers."""
    layers = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    for depth, together in ((5, 1), (3, 1), (2, 1), (2, math.ceil(len(layers) / (MOST_UNITS - 2)))):
        found = defaultdict(list)
        for name in names:
            parts = name.split(".")[:depth]
            if parts[0] == "blocks":
                parts[1] = str(int(parts[1]) // together * together)
            found[".".join(parts).removesuffix(".weight")].append(name)
        if len(found) <= MOST_UNITS:
            break
    return dict(found)


def search(mix: Mix, judge: Judge, bound: float) -> tuple[dict[str, Storage], list[str]]:
    """The smallest mix found that raises perplexity by ``bound`` at most, and what stayed at int8.

    Measures the model some 40 times, mostly on a quarter of the windows. Raises `ParityError` where
    int8 alone raises it by more.
    """
    least = judge.cost(mix.at([]), "measuring int8").rise
    if least > bound:
        raise ParityError(
            f"int8 alone raises perplexity by {least:.2%}",
            f"{bound:.2%} is allowed",
            "allow more with --max-perplexity-increase, or pack --to fp16",
        )
    harm = measure_units(mix, judge)
    steps = order_steps(mix, harm)

    def too_far(number: int) -> bool:
        return judge.cost(mix.at(steps[: number + 1]), "measuring a mix").rise > bound

    taken = dict(steps[: bisect.bisect_left(range(len(steps)), True, key=too_far)])
    chosen = {
        name: mix.storage(name, taken.get(unit, 0))
        for unit, names in mix.units.items()
        for name in names
    }
    stayed = [
        f"{unit} stays int8: at int4 it alone adds {harm[unit]:.2g} nats a token"
        for unit in mix.units
        if unit not in taken
    ]
    return chosen, mix.remarks + stayed


def measure_units(mix: Mix, judge: Judge) -> dict[str, float]:
    """By how many nats a token each unit alone diverges more at level 1 than at level 0."""
    few = Judge(judge.original, judge.windows.at(slice(None, None, RANKED_ON)))
    least = few.cost(mix.at([])).kl
    found = watched(mix.units, len(mix.units), "measuring each part at int4")
    return {unit: max(few.cost(mix.at([(unit, 1)])).kl - least, 0.0) for unit in found}


def order_steps(mix: Mix, harm: Mapping[str, float]) -> list[Step]:
    """Every step of every unit, the least harm a byte saved first, a unit's own steps in order."""
    priced = []
    for number, unit in enumerate(mix.units):
        top = max(len(mix.ladders[name]) for name in mix.units[unit])
        errors = [mix.error(unit, level) for level in range(top)]
        price = 0.0
        for level in range(1, top):
            saved = mix.bytes(unit, level - 1) - mix.bytes(unit, level)
            share = (errors[level] - errors[level - 1]) / max(errors[1] - errors[0], 1e-300)
            price = max(price, harm[unit] * share / max(saved, 1))
            priced.append((price, number, level, unit))
    return [(unit, level) for _, _, level, unit in sorted(priced)]


def _speeds(
    path: Path | str, precision: str, base: str | None
) -> tuple[dict[str, float], list[str]]:
    """Tokens a second before and after, and at int8 where that is packed, too; and remarks."""
    ways = {"before": None, "after": precision} | ({} if precision == "int8" else {"int8": "int8"})
    writers = {}
    for name, weights in ways.items():
        lm = load(path, device="cpu", base=base, speculate="off", weights=weights)
        with contextlib.suppress(*([OctavoError] if name == "int8" else [])):  # if not packed
            lm.make_ready()
            writers[name] = lm
    speeds = tokens_per_second(writers)
    slower = [f"slower than {name}" for name in speeds if speeds[name] > speeds["after"]]
    return speeds, slower
