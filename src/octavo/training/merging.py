"""A run with an adapter as a run without: the base's weights with the adapter folded in."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from octavo.adapting.lora import merge
from octavo.checkpoint import Run
from octavo.config import FinetuneConfig, LoraConfig
from octavo.errors import ConfigError, ParityError
from octavo.language_model import LanguageModel
from octavo.training.learner import Progress
from octavo.training.task import DATA

TOLERANCE = 1e-5  # of the largest logit
TEXT = 64  # tokens to compare logits on


def merge_run(lm: LanguageModel, out: Path | str) -> dict[str, Any]:
    """Write the run ``out`` with the merged model of ``lm``, once its logits were seen to be equal.

    Raises `ConfigError` for a run without an adapter and `ParityError` where logits differ.
    """
    if lm.run is None or not lm.run.config.lora.rank:
        raise ConfigError("there is no adapter to merge", fix="name a run of octavo finetune")
    config = lm.run.config
    model = lm.model
    torch.manual_seed(config.train.seed)
    ids = torch.randint(lm.config.vocab_size, (1, min(TEXT, lm.config.block_size)))
    with torch.no_grad():
        before = model(ids)
        merge(model)
        after = model(ids)
    difference = ((after - before).abs().max() / before.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ParityError(
            f"the merged model's logits differ by {difference:.1e} of the largest",
            f"{TOLERANCE:.0e} is allowed",
            "keep the adapter apart; nothing was written",
        )
    labels = FinetuneConfig(labels=config.finetune.labels)
    plain = dataclasses.replace(config, lora=LoraConfig(), finetune=labels)
    files = {DATA: (lm.run.path / DATA).read_bytes()}
    template = lm.run.path / "tokenizer_config.json"
    files |= {template.name: template.read_bytes()} if template.exists() else {}
    run = Run.create(out, plain, lm.run.tokenizer, files=files)
    state = vars(Progress()) | {"scaler": {}, "threads": torch.get_num_threads()}
    facts = {"merged_from": str(lm.run.path.resolve()), "parity": difference}
    with run.locked():
        run.save(0, model.state_dict(), {}, state, keep=1, facts=facts)
    return {
        "largest_change_of_a_logit": difference,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
