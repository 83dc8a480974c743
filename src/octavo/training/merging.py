"""A base and its adapter as one plain run: the adapter folded into the base's weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.adapting.classify import Classifier
from octavo.adapting.lora import merge
from octavo.checkpoint import Run
from octavo.config import FinetuneConfig, LoraConfig
from octavo.errors import ConfigError, ParityError
from octavo.exchanging.peft import from_peft
from octavo.language_model import LanguageModel
from octavo.model.gpt import GPT
from octavo.training.task import DATA

TOLERANCE = 1e-5  # of the largest logit
TEXT = 64  # tokens to compare logits on


def merge_run(lm: LanguageModel, out: Path | str) -> dict[str, Any]:
    """Write the run ``out`` with the merged model of ``lm``, once its logits were seen to be equal.

    Raises `ConfigError` for a run without an adapter and `ParityError` where logits differ.
    """
    if lm.run is None or not lm.run.config.lora.rank:
        raise ConfigError("there is no adapter to merge", fix="name a run of octavo finetune")
    return _write_merged(lm, lm.run, out, {"merged_from": str(lm.run.path.resolve())})


def import_adapter(directory: Path | str, base: LanguageModel, out: Path | str) -> dict[str, Any]:
    """Write the run ``out``: the model ``base`` with PEFT's adapter in ``directory`` merged in.

    Raises as `exchanging.peft.from_peft`, and `ParityError` where merging changes logits.
    """
    if base.run is None:
        raise ConfigError("the base of an adapter is a run", fix="octavo import it first")
    parity = from_peft(directory, base.model)
    facts = {"adapter_from": str(directory), "base": str(base.run.path.resolve())}
    facts |= {} if parity is None else {"difference_to_peft": parity}
    return facts | _write_merged(base, base.run, out, facts)


def _write_merged(
    lm: LanguageModel, source: Run, out: Path | str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Fold the adapters in and, if they are, write the run."""
    model, config = lm.model, source.config
    difference = fold_in(model)
    labels = FinetuneConfig(labels=config.finetune.labels)
    plain = dataclasses.replace(config, lora=LoraConfig(), finetune=labels)
    taken = [source.path / name for name in (DATA, "tokenizer_config.json")]
    files = {path.name: path.read_bytes() for path in taken if path.exists()}
    figures = {"largest_change_of_a_logit": difference}
    Run.create(out, plain, source.tokenizer, files, model.state_dict(), facts | figures)
    return figures | {"parameters": sum(p.numel() for p in model.parameters())}


def fold_in(model: GPT | Classifier) -> float:
    """Merge ``model``'s adapters; how far that moved its logits, or an error, by `check_equal`."""
    before = probe(model)
    merge(model)
    fix = "keep the adapter apart; nothing was written"
    return check_equal(before, probe(model), "the merged model's logits differ", fix)


def probe(model: GPT | Classifier) -> Tensor:
    """The logits (T, V) of a short text of random ids, the same for every model of this shape."""
    text = min(TEXT, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (1, text), generator=torch.Generator())
    with torch.inference_mode():
        return model(ids)[0]


def check_equal(wanted: Tensor, found: Tensor, what: str, fix: str) -> float:
    """The largest difference of a logit, as a share of the largest logit.

    Raises `ParityError`, which begins with ``what``, where it is more than rounding.
    """
    difference = ((wanted - found).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE:
        allowed = f"{TOLERANCE:.0e} is allowed"
        raise ParityError(f"{what} by {difference:.1e} of the largest", allowed, fix)
    return difference
