"""The model a configuration describes: a new one, or a base with label head and adapters."""

from collections.abc import Mapping

from torch import Tensor, nn

from octavo.adapting.classify import Classifier
from octavo.adapting.lora import add_adapter
from octavo.config import Config
from octavo.errors import CheckpointError, ConfigError
from octavo.model.gpt import GPT


def assemble(config: Config, base: GPT | None = None) -> GPT | Classifier:
    """A `GPT`, or a `Classifier` where there are labels, with what is not to be trained frozen.

    ``base`` gives the weights; without it they are drawn from PyTorch's generator. Adapters and
    label heads are new. Raises `ConfigError` for adapters without a base.
    """
    body = GPT(config.model)
    if base is not None:
        body.load_state_dict(base.state_dict())
    elif config.lora.rank or config.finetune.head_only:
        raise ConfigError(
            "adapters and heads are trained beside the frozen weights of a base, and none is named",
            fix="octavo finetune RUN TEXT, or finetune.base=RUN",
        )
    labels = config.finetune.labels
    model: GPT | Classifier = Classifier(body, labels) if labels else body
    if config.finetune.head_only:
        body.requires_grad_(False)
    if config.lora.rank:
        lora = config.lora
        add_adapter(
            model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets
        )
        if labels:
            model.lm_head.requires_grad_(True)
    return model


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's tensors into the model that `assemble` made.

    Raises `CheckpointError` where names or shapes are not those that training changes.
    """
    own = {name: t for name, t in model.state_dict().items() if name in trained_names(model)}
    for name in sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(f"{name} is {'missing from' if name in own else 'left over in'} it")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            given, wanted = tuple(tensor.shape), tuple(own[name].shape)
            raise CheckpointError(f"{name} has shape {given}, not {wanted}")
    model.load_state_dict(dict(tensors), strict=False)


def trained_names(model: nn.Module) -> set[str]:
    """The names in ``model``'s state that training changes; all of them for an unfrozen model."""
    parameters = dict(model.named_parameters())
    if all(parameter.requires_grad for parameter in parameters.values()):
        return set(model.state_dict())
    return {name for name, parameter in parameters.items() if parameter.requires_grad}
