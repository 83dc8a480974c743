"""A run of a larger model that begins where another run's model stands."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from octavo import disk
from octavo.adapting.grow import Growth, grow
from octavo.checkpoint import Run
from octavo.config import Config, FinetuneConfig, load_config
from octavo.errors import ConfigError
from octavo.language_model import LanguageModel
from octavo.training.task import DATA, fit_vocabulary, prepare


def grow_run(lm: LanguageModel, out: Path | str, settings: list[str]) -> dict[str, Any]:
    """Write the run ``out``: ``lm``'s model grown as ``settings`` say, at step 0, to be trained on.

    It has no optimizer state yet; `train` begins with a fresh one. Returns what is to be said.
    Raises `ConfigError` for what cannot grow, `ParityError` where growing changed the function.
    """
    if disk.exists(Path(out)):
        raise ConfigError(f"{out} is there already", fix="choose another --out")
    run = _plain_run(lm)
    assert lm.checkpoint is not None
    given = load_config(run.path / "config.yaml", settings)
    config, files = _prepared(run, dataclasses.replace(given, finetune=FinetuneConfig()))
    before, after = vars(lm.config), vars(config.model)
    changes = {name: value for name, value in after.items() if value != before[name]}
    torch.manual_seed(config.train.seed)
    growth = grow(lm.model, **changes)
    facts: dict[str, Any] = {
        "grown": {name: f"{before[name]} -> {value}" for name, value in changes.items()},
        "parameters": sum(parameter.numel() for parameter in growth.model.parameters()),
        "computes_the_same": growth.exact,
        "largest_change_of_a_logit": growth.difference,
    }
    if not growth.exact:
        facts |= _losses(lm, run, growth)
    config = dataclasses.replace(config, model=growth.model.config)
    origin = {"grown_from": str(lm.checkpoint.resolve())}
    Run.create(out, config, run.tokenizer, files, growth.model.state_dict(), origin | facts)
    return facts


def _plain_run(lm: LanguageModel) -> Run:
    """The run of ``lm``, which is one of a whole language model."""
    if lm.run is None:
        raise ConfigError("only a run can grow", fix="bring it in first: octavo import")
    if lm.run.config.finetune.labels:
        raise ConfigError("a classifier cannot grow", fix="grow its base, and fine-tune that")
    if lm.run.config.lora.rank:
        raise ConfigError(
            "an adapter cannot grow", fix=f"merge it first: octavo merge {lm.run.path} --out RUN"
        )
    return lm.run


def _prepared(run: Run, config: Config) -> tuple[Config, dict[str, bytes]]:
    """The configuration in full, and what else the new run's directory holds."""
    if config.data.source is not None:
        task = prepare(config, "cpu", run.path, run.tokenizer)
        return task.config, task.files
    model = (
        fit_vocabulary(config.model, run.tokenizer.vocab_size) if run.tokenizer else config.model
    )
    files = {DATA: (run.path / DATA).read_bytes()}  # it was imported, and has no text
    return dataclasses.replace(config, model=model), files


def _losses(lm: LanguageModel, run: Run, growth: Growth) -> dict[str, Any]:
    """The loss on the old run's validation rows, before and after."""
    config = dataclasses.replace(run.config, finetune=FinetuneConfig())
    has_text = config.data.source is not None
    task = prepare(config, "cpu", run.path, run.tokenizer) if has_text else None
    if task is None or task.val is None:
        return {"remarks": ["there is no validation text to say what the change costs"]}
    before, after = (task.score(model).loss for model in (lm.model, growth.model))
    return {"loss_before": before, "loss_after": after, "change_in_loss": after - before}
