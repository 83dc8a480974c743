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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.adapting.lora import LoRALinear, adapted_layers, add_adapter, check_layer, use_adapters
from octavo.adapting.surgery import linear_layers, swap_linear
from octavo.errors import CheckpointError, ConfigError, ParityError
from octavo.exchanging.families import FAMILIES, Family, choose_family
from octavo.exchanging.huggingface import to_huggingface
from octavo.exchanging.libraries import library, translated
from octavo.exchanging.parity import compare, logits_of, random_rows, reader_of, texts_of
from octavo.exchanging.peft_config import CONFIG, Settings, make_config, read_settings
from octavo.exchanging.staging import staged
from octavo.manifest import to_json
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.tensors import read_tensors

WEIGHTS = "adapter_model.safetensors"
# PEFT adds the weight of an adapted head, though it belongs to the base.
MATRIX = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|base_layer)\.weight")


class Adapter(NamedTuple):
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
    every = dict(linear_layers(model))
    adapters = {
        module: _fused(family, model.config, module, {n: every[n] for n in names}, name)
        for module, names in places.items()
        if layers.keys() & names
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
        adapter = _checked(module, pair, settings, [layers[n] for n in places[module]])
        ours |= _parts(family, model.config, module, adapter)
    if taken := [path for path, layer in layers.items() if name in getattr(layer, "lora_A", ())]:
        raise ConfigError(f"{taken[0]} has an adapter {name!r} already", fix="choose another name")
    for layer, adapter in ours.items():  # all of them before the first is put there
        check_layer(model, layer, layers[layer], name, len(adapter.A))
    for layer, (A, B, alpha) in ours.items():
        add_adapter(model, name, len(A), alpha, settings.lora_dropout, [layer])
        adapted = adapted_layers(model, name)[layer]
        with torch.no_grad():
            adapted.lora_A[name].copy_(A)
            adapted.lora_B[name].copy_(B)
    compares = library("peft") is not None
    return compare_with_peft(model, name, directory, family.name) if compares else None


def compare_with_peft(model: GPT, name: str, directory: Path, architecture: str) -> float:
    """The largest difference between our logits and PEFT's, as a share of the largest.

    PEFT loads ``directory`` over the stock module of the base. Raises `ParityError` where they
    differ by more than sums taken in another order do.
    """
    peft = library("peft", "comparing an adapter with PEFT's")
    ours, base = copy.deepcopy(model).eval(), copy.deepcopy(model)
    use_adapters(ours, {name: 1.0})
    swap_linear(base, lambda _, layer: isinstance(layer, LoRALinear), lambda layer: layer.base)
    stock, refusal = to_huggingface(base, architecture), f"PEFT cannot use {directory}"
    with translated(ParityError, refusal), warnings.catch_warnings(action="ignore"):
        module = peft.PeftModel.from_pretrained(stock, str(directory))
    texts = texts_of(random_rows(model.config.vocab_size, model.config.block_size))
    return compare(logits_of(ours), reader_of(peft, module), texts).difference


def _places(family: Family, model: GPT) -> dict[str, tuple[str, ...]]:
    """Their linear layers, each with those of ours that are in it."""
    ours = dict(linear_layers(model))
    modules = family.modules(model.config.n_layer)
    return {theirs: names for names, theirs in modules if names[0] in ours}


def _find_places(model: GPT, modules: Iterable[str]) -> tuple[Family, dict[str, tuple[str, ...]]]:
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


def _fused(
    family: Family, config: ModelConfig, module: str, parts: Mapping[str, Any], name: str
) -> Adapter:
    """One adapter for a ``module`` of theirs that holds ours in ``parts``; some may have none."""
    adapted = {n: layer for n, layer in parts.items() if name in getattr(layer, "lora_A", ())}
    first = next(iter(adapted.values()))
    A = torch.cat([layer.lora_A[name].detach() for layer in adapted.values()])
    blocks = [  # all share the first one's scale; where another's is its own, that goes into its B
        layer.lora_B[name].detach() * (layer.scale(name) / first.scale(name))
        for layer in adapted.values()
    ]
    B = {n: A.new_zeros(layer.out_features, len(A)) for n, layer in parts.items()}
    B |= zip(adapted, torch.block_diag(*blocks).split([*map(len, blocks)]), strict=True)
    # The rows of B are outputs, as those of a weight: they go the same way.
    weights = {f"{n}.weight": outputs for n, outputs in B.items()}
    whole = replace(family, transposed=False).to_theirs(config, weights)[f"{module}.weight"]
    return Adapter(A, whole, first.alpha[name] * len(A) / len(first.lora_A[name]))


def _parts(family: Family, config: ModelConfig, module: str, whole: Adapter) -> dict[str, Adapter]:
    """An adapter of theirs as adapters of ours; where it is fused, without what is zero."""
    parts = {}
    weights = replace(family, transposed=False).to_ours(config, {f"{module}.weight": whole.B})
    for name, B in weights.items():
        used = torch.ones(len(whole.A), dtype=torch.bool)
        if len(weights) > 1 and whole.B.any():
            used = B.any(dim=0)
        if used.any():
            alpha = whole.alpha * int(used.sum()) / len(used)
            parts[name.removesuffix(".weight")] = Adapter(whole.A[used], B[:, used], alpha)
    return parts


def _read_matrices(directory: Path) -> dict[str, dict[str, Tensor]]:
    """lora_A and lora_B of each module."""
    matrices: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in read_tensors(directory / WEIGHTS).items():
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
    parts: Sequence[Any],
) -> Adapter:
    """The adapter of a module, after comparing its shapes with those of our ``parts`` of it."""
    rank, alpha = settings.rank_and_alpha(module)
    layer, n_rows = parts[0], sum(part.out_features for part in parts)
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
