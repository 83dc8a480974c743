"""LoRA adapters in Hugging Face PEFT's layout: adapter_config.json and adapter_model.safetensors.

Names are those of the stock class (`families`). Where it fuses q, k and v into one matrix, our
adapters of rank r become one of rank 3r: the A's one above the other, the B's block-diagonal, which
is the same function. On the way back each part gets its rows of B, without the columns that are
zero there, and the rows of A that go with them. Either way PEFT's own logits are compared with
ours. Needs the extra ``hf``, imported on use; `from_peft` can do without.
"""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.adapting.lora import (
    LoRALinear,
    adapted_layers,
    add_adapter,
    check_layer,
    load_adapter_state,
    use_adapters,
)
from octavo.adapting.surgery import linear_layers, swap_linear
from octavo.errors import CheckpointError, MissingExtraError, ParityError
from octavo.exchanging.families import FAMILIES, Family, choose_family
from octavo.exchanging.huggingface import to_huggingface
from octavo.exchanging.parity import Stock, compare_logits, random_rows
from octavo.exchanging.peft_config import CONFIG, Settings, make_config, read_settings
from octavo.exchanging.staging import staged
from octavo.manifest import to_json
from octavo.model.gpt import GPT
from octavo.tensors import read_tensors

WEIGHTS = "adapter_model.safetensors"
# PEFT adds the weight of an adapted head, though it belongs to the base.
MATRIX = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|base_layer)\.weight")


@dataclass(frozen=True)
class Adapter:
    """What lies beside one linear layer: A (rank, in), B (out, rank), alpha."""

    A: Tensor
    B: Tensor
    alpha: float


def to_peft(
    model: GPT,
    name: str,
    directory: Path | str,
    base_name: str,
    architecture: str | None = None,
    force: bool = False,
) -> float:
    """Write the adapter ``name`` of ``model``, on the CPU, into ``directory``.

    ``base_name`` is where PEFT's users find the base. The stock class follows from the
    configuration unless ``architecture`` names one. Returns the largest difference to the logits of
    PEFT, which loads what was written, as a share of the largest logit. Raises `ConfigError` where
    no stock class holds the model or something lies at ``directory`` (which ``force`` overrides),
    and `ParityError` where PEFT computes something else; then nothing is left.
    """
    layers = adapted_layers(model, name)
    family = choose_family(model.config, architecture)
    places = _places(family, model)
    adapters = {
        module: _fused(layers, name, rows)
        for module, rows in places.items()
        if rows.keys() & layers.keys()
    }
    tensors = {
        f"base_model.model.{module}.lora_{kind}.weight": getattr(adapter, kind).contiguous()
        for module, adapter in adapters.items()
        for kind in "AB"
    }
    ranks = {module: len(adapter.A) for module, adapter in adapters.items()}
    alphas = {module: adapter.alpha for module, adapter in adapters.items()}
    config = make_config(ranks, alphas, places) | {
        "base_model_name_or_path": base_name,
        "lora_dropout": next(iter(layers.values())).dropout[name],
        "fan_in_fan_out": family.transposed,
    }
    with staged(Path(directory), force) as temp:
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        (temp / CONFIG).write_bytes(to_json(config))
        return compare_with_peft(model, name, temp, family.name)


def from_peft(directory: Path | str, model: GPT, name: str = "default") -> float | None:
    """Put PEFT's adapter beside ``model``'s layers as the adapter ``name``, alone in use.

    Returns the largest difference to PEFT's logits, as a share of the largest logit; None where
    peft is not installed. Raises `ConfigError` for an option that our adapters have no word for,
    `CheckpointError` for damaged files and for matrices that do not fit the model, `ParityError`
    where PEFT computes something else.
    """
    directory = Path(directory)
    settings, matrices = read_settings(directory), _read_matrices(directory)
    family, places = _find_places(model, matrices)
    layers = dict(linear_layers(model))
    ours: dict[str, Adapter] = {}
    for module, pair in matrices.items():
        rows = places[module]
        adapter = _checked(module, pair, settings, rows, layers[next(iter(rows))])
        ours |= _parts(adapter, rows)
    groups: dict[tuple[int, float], list[str]] = defaultdict(list)
    for layer, adapter in ours.items():
        check_layer(model, layer, layers[layer], name, len(adapter.A))
        groups[len(adapter.A), adapter.alpha].append(layer)
    for (rank, alpha), targets in groups.items():
        add_adapter(model, name, rank, alpha, settings.lora_dropout, targets)
    state = {f"{layer}.lora_A": adapter.A for layer, adapter in ours.items()}
    state |= {f"{layer}.lora_B": adapter.B for layer, adapter in ours.items()}
    load_adapter_state(model, state, name)
    try:
        return compare_with_peft(model, name, directory, family.name)
    except MissingExtraError:
        return None


def compare_with_peft(
    model: GPT, name: str, directory: Path, architecture: str | None = None
) -> float:
    """The largest difference between our logits and PEFT's, as a share of the largest.

    PEFT loads ``directory`` over the stock module of the base. Raises `ParityError` where they
    differ by more than sums taken in another order do.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("hf", "comparing an adapter with PEFT's") from None
    ours, base = copy.deepcopy(model).eval(), copy.deepcopy(model)
    use_adapters(ours, {name: 1.0})
    swap_linear(base, lambda _, layer: isinstance(layer, LoRALinear), lambda layer: layer.base)
    stock = to_huggingface(base, architecture)
    try:
        with warnings.catch_warnings(action="ignore"):
            module = PeftModel.from_pretrained(stock, str(directory))
    except Exception as error:  # of many kinds; none of them lets the adapter pass
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ParityError(f"PEFT cannot use {directory}: {reason}") from error
    rows = random_rows(model.config.vocab_size, model.config.block_size)
    return compare_logits(ours, Stock(module), rows[:, :-1])


def _places(family: Family, model: GPT) -> dict[str, dict[str, Tensor]]:
    """Their linear layers, each with ours in it, and which rows of its output are whose.

    `Family.to_theirs` says it: every output of ours gets a number and is sent as a bias.
    """
    widths = {name: layer.out_features for name, layer in linear_layers(model)}
    numbers = torch.arange(sum(widths.values())).split(list(widths.values()))
    sent = {f"{name}.bias": own for name, own in zip(widths, numbers, strict=True)}
    places = {}
    for bias, arrived in family.to_theirs(model.config, sent).items():
        row = {number: row for row, number in enumerate(arrived.tolist())}
        places[bias.removesuffix(".bias")] = {
            ours.removesuffix(".bias"): torch.tensor([row[number] for number in own.tolist()])
            for ours, own in sent.items()
            if int(own[0]) in row
        }
    return places


def _find_places(model: GPT, modules: Iterable[str]) -> tuple[Family, dict[str, dict[str, Tensor]]]:
    """The stock class that holds the model and has these ``modules``, and its `_places`."""
    choose_family(model.config)  # or the reason why there is none
    fitting = [family for family in FAMILIES if not family.misfits(model.config)]
    unknown: dict[str, list[str]] = {}
    for family in fitting:
        places = _places(family, model)
        unknown[family.name] = [module for module in modules if module not in places]
        if not unknown[family.name]:
            return family, places
    name, least = min(unknown.items(), key=lambda item: len(item[1]))
    raise CheckpointError(
        f"the adapter changes {least[0]}, which {name} has not or octavo cannot adapt",
        f"{len(least)} such modules",
        f"this model can be: {', '.join(unknown)}",
    )


def _fused(layers: Mapping[str, LoRALinear], name: str, rows: Mapping[str, Tensor]) -> Adapter:
    """One adapter for a module of theirs that holds the outputs of ours in ``rows``."""
    parts = [layers[ours] for ours in rows if ours in layers]
    own_rows = [own for ours, own in rows.items() if ours in layers]
    first = parts[0]
    A = torch.cat([layer.lora_A[name].detach() for layer in parts])
    # All share the first one's scale; where another's is its own, that goes into its B.
    shares = [layer.scale(name) / first.scale(name) for layer in parts]
    blocks = [p.lora_B[name].detach() * share for p, share in zip(parts, shares, strict=True)]
    B = A.new_zeros(sum(map(len, rows.values())), len(A))
    B[torch.cat(own_rows)] = torch.block_diag(*blocks)
    return Adapter(A, B, first.alpha[name] * len(A) / len(first.lora_A[name]))


def _parts(whole: Adapter, rows: Mapping[str, Tensor]) -> Iterator[tuple[str, Adapter]]:
    """An adapter of theirs as adapters of ours; where it is fused, without what is zero."""
    for ours, own in rows.items():
        used = torch.ones(len(whole.A), dtype=torch.bool)
        if len(rows) > 1 and whole.B.any():
            used = whole.B[own].any(dim=0)
        if used.any():
            alpha = whole.alpha * int(used.sum()) / len(used)
            yield ours, Adapter(whole.A[used], whole.B[own][:, used], alpha)


def _read_matrices(directory: Path) -> dict[str, dict[str, Tensor]]:
    """lora_A and lora_B of each module."""
    matrices: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in read_tensors(directory / WEIGHTS, "pt").items():
        if not (found := MATRIX.fullmatch(key)):
            raise CheckpointError(f"{key} is no matrix of an adapter", f"in {directory / WEIGHTS}")
        matrices[found[1]][found[2]] = tensor
    if not matrices:
        raise CheckpointError(f"{WEIGHTS} holds no adapter", f"in {directory}")
    return dict(matrices)


def _checked(
    module: str,
    matrices: Mapping[str, Tensor],
    settings: Settings,
    rows: Mapping[str, Tensor],
    layer: Any,
) -> Adapter:
    """The adapter of a module, after comparing its shapes; ``layer`` is the first of ours in it."""
    rank, alpha = settings.rank_and_alpha(module)
    n_rows = sum(map(len, rows.values()))
    for kind, wanted in (("lora_A", (rank, layer.in_features)), ("lora_B", (n_rows, rank))):
        if kind not in matrices:
            raise CheckpointError(f"{module} lacks its {kind}")
        if (given := tuple(matrices[kind].shape)) != wanted:
            raise CheckpointError(f"{kind} of {module} has shape {given}, not {wanted}")
    if "base_layer" in matrices:
        base: Any = layer.base if isinstance(layer, LoRALinear) else layer
        if not torch.equal(matrices["base_layer"].to(base.weight), base.weight):
            raise CheckpointError(f"the adapter was made for another weight of {module}")
    return Adapter(matrices["lora_A"], matrices["lora_B"], alpha)
