"""A tiny model trained beside a model, to guess for it: its draft, for speculative decoding.

The rule: the same text, the same tokenizer, the same steps and the same `train`, with a quarter of
the layers and the most heads of the same width that keep a token's operations at a tenth of the
model's; one layer and one head at least. The draft is a run inside the run, RUN/draft, and is
resumed like any other.
"""

import dataclasses
import math
from pathlib import Path

from octavo.checkpoint import Run
from octavo.config import Config, FinetuneConfig, LoraConfig
from octavo.errors import ConfigError
from octavo.language_model import DRAFT
from octavo.model.counts import flops_per_token
from octavo.model_config import ModelConfig
from octavo.training.deadline import DRAFT_SHARE
from octavo.training.loop import TrainResult, train
from octavo.training.source import PIPED

LAYERS, OPERATIONS = 4, 10  # a draft has so many times fewer


def train_draft(path: Path | str, *, quiet: bool = False) -> TrainResult:
    """Train the draft of the run at ``path``, or go on with it; what `generate` then uses.

    Raises `ConfigError` for a run that did not learn from a text, and what `train` raises.
    """
    run = Run.open(path)
    home = run.path / DRAFT
    if not quiet:
        print("and its draft, for about a tenth of the work:")
    begun = Run.find(home)
    if begun is not None:
        return train(begun.config, home, resume=True, quiet=quiet)
    return train(draft_config(run), home, quiet=quiet)


def draft_config(run: Run) -> Config:
    """The settings of a run's draft."""
    config = run.config
    source, tokenizer = config.data.source, run.path.resolve() / "tokenizer.json"
    if source is None or config.data.kind != "text":
        raise ConfigError(
            f"{run.path} did not learn from a text, so its draft cannot",
            fix="draft with any smaller run that has its tokenizer: --speculate RUN",
        )
    data = dataclasses.replace(
        config.data,
        source=str(run.path.resolve() / PIPED) if source == "-" else source,
        tokenizer=str(tokenizer) if tokenizer.exists() else config.data.tokenizer,
    )
    return dataclasses.replace(
        config,
        model=draft_model(config.model),
        data=data,
        train=dataclasses.replace(
            config.train,
            draft=False,
            quantize=None,
            compile="auto",
            dropout_final=None,
            budget=config.train.budget * DRAFT_SHARE,
        ),
        eval=dataclasses.replace(config.eval, hellaswag=None, hellaswag_every=0),
        log=dataclasses.replace(config.log, to=[], sample_every=0),
        lora=LoraConfig(),
        finetune=FinetuneConfig(),
    )


def draft_model(model: ModelConfig) -> ModelConfig:
    """The model of the module's rule; without dropout, for it is too small to overfit."""

    def with_heads(heads: int) -> ModelConfig:
        return dataclasses.replace(
            model,
            n_layer=max(1, model.n_layer // LAYERS),
            n_head=heads,
            n_kv_head=math.gcd(heads, model.n_kv_head),
            d_model=heads * model.head_dim,
            d_ff=0,
            dropout=0.0,
        )

    most = flops_per_token(model) / OPERATIONS
    sizes = [with_heads(heads) for heads in range(model.n_head, 0, -1)]
    return next((size for size in sizes if flops_per_token(size) <= most), sizes[-1])
