"""Grow a model: more layers, a wider MLP, a longer context, more ids, other key/value heads.

The larger model computes what the smaller one did wherever mathematics allows it (Chen et al. 2016,
Net2Net), and is compared with it before it is given out. Two growths are not exact: layers after a
``post`` norm, which normalizes once more, and key/value heads that share what they did not share.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from octavo.adapting.surgery import refuse_wrapped
from octavo.errors import ConfigError, ParityError
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig

GROWABLE = ("n_layer", "d_ff", "block_size", "vocab_size", "n_kv_head")
TOLERANCE = 1e-5  # of the largest logit: fp32 sums in another order
LONGEST_CHECK = 256  # tokens compared


@dataclasses.dataclass(frozen=True)
class Growth:
    """A grown model, and how it differs from the one it grew from."""

    model: GPT
    exact: bool
    """Whether the function is preserved, by mathematics and as compared."""
    difference: float
    """The largest change of a logit on random ids, as a share of the largest logit."""


def grow(model: GPT, **changes: Any) -> Growth:
    """A larger copy of ``model``; ``changes`` are settings of `GROWABLE` and their new values.

    What is new is drawn from PyTorch's generator, so seed that first. Raises `ConfigError` for what
    cannot grow or would shrink, and `ParityError` should an exact growth change the logits.
    """
    refuse_wrapped(model)
    old, new = model.config, grown_config(model.config, changes)
    device = model.tok_emb.weight.device
    grown = GPT(new).to(device, model.tok_emb.weight.dtype)
    grown.load_state_dict(_grown_weights(model.state_dict(), grown.state_dict(), new))
    difference = _difference(model, grown.eval())
    stacked_on_norm = new.n_layer > old.n_layer and new.norm_position == "post"
    exact = new.n_kv_head % old.n_kv_head == 0 and not stacked_on_norm
    if exact and not difference <= TOLERANCE:
        raise ParityError(
            f"the grown model's logits differ by {difference:.2g} of the largest",
            f"growing {', '.join(changes)}",
            f"at most {TOLERANCE:g} was expected; please report this",
        )
    return Growth(grown.train(model.training), exact, difference)


def grown_config(old: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """``old`` with ``changes``, all of which must be growths."""
    for name in changes.keys() - set(GROWABLE):
        raise ConfigError(f"model.{name} cannot grow", fix=f"can grow: {', '.join(GROWABLE)}")
    new = dataclasses.replace(old, **changes)
    for name in GROWABLE:
        before, after = getattr(old, name), getattr(new, name)
        if after < before and name != "n_kv_head":
            raise ConfigError(f"model.{name} would shrink from {before} to {after}")
    if new == old:
        raise ConfigError("nothing would grow", fix=f"give another value of {', '.join(GROWABLE)}")
    scaling = old.rope_scaling
    if scaling and not scaling.original_block_size:  # which had meant the old block_size
        scaling = dataclasses.replace(scaling, original_block_size=old.block_size)
        return dataclasses.replace(new, rope_scaling=scaling)
    return new


def _grown_weights(
    old: dict[str, Tensor], fresh: dict[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """The old weights in the new shapes; ``fresh`` holds new initial ones."""
    return {
        name: _widened(name, old[name], value, config)
        if name in old
        else _silent(name, value, config)
        for name, value in fresh.items()
    }


def _silent(name: str, fresh: Tensor, config: ModelConfig) -> Tensor:
    """A weight of a new layer, which as a whole adds nothing to the residual stream yet.

    The rest of it is as in any new model, so that gradients reach what is zero. A norm on the way
    out must be what is zero, because it would blow up the gradients of an input of zeros.
    """
    last = ("_out_norm",) if config.norm_position == "sandwich" else ("o_proj", "down_proj")
    return torch.zeros_like(fresh) if name.rpartition(".")[0].endswith(last) else fresh


def _widened(name: str, old: Tensor, fresh: Tensor, config: ModelConfig) -> Tensor:
    """A weight or bias in its new shape."""
    if old.shape == fresh.shape:
        return old
    fresh = fresh.clone()
    match name.split(".")[-2]:
        case "k_proj" | "v_proj":
            return _regrouped(old, config)
        case "pos_emb":  # the positions over again (Beltagy et al. 2020, Longformer)
            return old.repeat(math.ceil(len(fresh) / len(old)), 1)[: len(fresh)]
        case "tok_emb" | "lm_head":  # as likely as the average id (Hewitt 2021)
            fresh[:] = old.mean(dim=0)
        case "down_proj":  # does not hear the new units yet
            fresh.zero_()
    fresh[tuple(slice(size) for size in old.shape)] = old
    return fresh


def _regrouped(old: Tensor, config: ModelConfig) -> Tensor:
    """Key or value heads (K E, ...) for another K, each the mean of what its queries had before.

    Fewer heads are thereby mean-pooled (Ainslie et al. 2023); twice as many are each old one twice.
    """
    heads = old.unflatten(0, (-1, config.head_dim))
    a_query = heads.repeat_interleave(config.n_head // len(heads), dim=0)  # (H, E, ...)
    return a_query.unflatten(0, (config.n_kv_head, -1)).mean(dim=1).flatten(0, 1)


@torch.inference_mode()
def _difference(model: GPT, grown: GPT) -> float:
    """How far ``grown`` is from ``model`` on random ids, relative to the largest logit."""
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (2, min(block_size, LONGEST_CHECK)), generator=generator)
    ids = ids.to(model.tok_emb.weight.device)
    was_training = model.training
    before = model.eval()(ids).float()
    model.train(was_training)
    after = grown(ids).float()[..., :vocab_size]
    return ((after - before).abs().max() / before.abs().max()).item()
