"""A model too large for one device: weights, gradients and optimizer cut up by FSDP2.

Each process keeps an equal part of the rows of every parameter (Zhao et al. 2023,
`torch.distributed.fsdp.fully_shard`). Where the model is looked at from outside, to be validated,
sampled, judged or saved, the weights are gathered one by one into a whole copy in the first
process's memory, and everything that reads runs works as ever. The optimizer's state, twice as
large, is saved as it lies: each process writes its part, and an index says where it belongs.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from octavo import disk
from octavo.adapting.classify import Classifier
from octavo.checkpoint import INDEX, NOT_SAVED, Run
from octavo.config import Config
from octavo.errors import ConfigError, NonFiniteError
from octavo.manifest import to_json
from octavo.model.gpt import GPT
from octavo.tensors import first_non_finite, write_tensors
from octavo.training.parallel import Ranks, outcome, settled

if TYPE_CHECKING:
    from octavo.training.learner import Learner

T = TypeVar("T")
TRAINED, FROZEN = 16, 4  # bytes a parameter: fp32 weight, gradient and two averages; weight alone
ROOM = 0.6  # of a device's memory for these; the rest is for activations


def is_to_be_sharded(config: Config, model: nn.Module, device: torch.device, ranks: Ranks) -> bool:
    """As ``train.parallel`` says; auto: where one device could not hold the model in training.

    Raises `ConfigError` for settings that cannot go together with sharding.
    """
    asked = config.train.parallel
    if ranks.size == 1 or asked == "ddp":
        return False
    needed = sum(p.numel() * (TRAINED if p.requires_grad else FROZEN) for p in model.parameters())
    if asked == "auto" and not ranks.any(needed > ROOM * _memory(device)):
        return False
    alone = {
        "optim.name=muon, which works on whole matrices": config.optim.name == "muon",
        "train.precision=fp16": config.train.precision == "fp16",
        "train.deterministic=canonical": config.train.deterministic == "canonical",
    }
    if refused := [name for name in alone if alone[name]]:
        raise ConfigError(
            f"fsdp does not go with {refused[0]}",
            f"the model needs {needed / 1e9:,.1f} GB",
            "leave it out, or choose train.parallel=ddp",
        )
    return True


def _memory(device: torch.device) -> float:
    """Bytes that this process may count on."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return there / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shard(model: GPT | Classifier, body: GPT, device: torch.device, ranks: Ranks) -> None:
    """Cut ``model`` up, block by block; its parameters are from now on this process's parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in body.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # the loss enters there, not by forward
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loss was divided by all tokens already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def by_first(learner: "Learner", do: Callable[["Learner"], T]) -> T:
    """What ``do`` gives for the learner on the first process, with its weights in one piece."""
    if not learner.sharded:
        return learner.ranks.first(lambda: do(learner))
    whole = _gathered(learner)

    def on_device() -> T:
        whole.model.to(learner.device)
        try:
            return do(whole)
        finally:
            whole.model.to("cpu")

    return learner.ranks.first(on_device)


def _gathered(learner: "Learner") -> "Learner":
    """The learner with its whole copy, brought up to date; only the first process has one."""
    targets = list(learner.whole.parameters()) if learner.whole is not None else []
    with torch.no_grad():
        for number, own in enumerate(learner.model.parameters()):
            gathered = full(own)
            if targets:
                targets[number].copy_(gathered)
    if learner.whole is None:
        return learner
    body = learner.whole.body if isinstance(learner.whole, Classifier) else learner.whole
    return dataclasses.replace(learner, model=learner.whole, body=body, sharded=False)


def whole_copy(model: GPT | Classifier, ranks: Ranks) -> GPT | Classifier | None:
    """What `by_first` fills later; made before the model is cut up."""
    return copy.deepcopy(model).cpu() if ranks.leads else None


def scattered(
    model: nn.Module, tensors: Mapping[str, Tensor], averages: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's whole tensors, weights and optimizer's, cut up as ``model``'s are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = model.state_dict()

    def cut(name: str, tensor: Tensor) -> Tensor:
        like = own.get(name)
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor
        there, mesh = tensor.to(like.device), like.device_mesh
        return distribute_tensor(there, mesh, like.placements, src_data_rank=None)

    return (
        {name: cut(name, tensor) for name, tensor in tensors.items()},
        {name: cut(name.rpartition(".")[0], tensor) for name, tensor in averages.items()},
    )


def save(learner: "Learner", run: Run) -> Path:
    """Save the learner's step; raises on every process what went wrong on any."""
    ranks, step = learner.ranks, learner.progress.step
    keep = learner.task.config.checkpoint.keep
    if not learner.sharded:
        return ranks.first(lambda: run.save(step, *learner.tensors(), learner.state(), keep))
    whole = _gathered(learner)
    name = f"optimizer-{ranks.rank}-of-{ranks.size}.safetensors"
    state = learner.tensors()[1]
    parts, places = _own_parts(state, ranks)

    def write(folder: Path) -> dict[str, Any]:
        if spoilt := first_non_finite(parts):
            raise NonFiniteError(f"{spoilt} holds NaN or infinity", f"at step {step}", NOT_SAVED)
        with disk.errors(f"save step {step} in {run.folder}"):
            write_tensors(folder / name, parts)
            disk.sync(folder / name)
        return {name: places}

    def write_all(folder: Path) -> None:
        ranks.tell(folder)
        written = map(settled, ranks.gather(outcome(lambda: write(folder))))
        index = {
            "shapes": {key: list(tensor.shape) for key, tensor in state.items()},
            "files": {file: places for part in written for file, places in part.items()},
        }
        disk.write_synced(folder / INDEX, to_json(index))

    if ranks.leads:
        model = whole.tensors()[0]
        return ranks.first(
            lambda: run.save(step, model, {}, learner.state(), keep, None, write_all)
        )
    told = ranks.tell(None)
    if isinstance(told, Path):  # where to write to, and no error that came before
        ranks.gather(outcome(lambda: write(told)))
        told = ranks.tell(None)
    return settled(told)


def _own_parts(
    state: Mapping[str, Tensor], ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The part of the optimizer's ``state`` that lies here, and where each tensor of it begins.

    Rows are dealt out as `torch.chunk` does: the last processes may have fewer, or none.
    """
    from torch.distributed.tensor import DTensor

    parts: dict[str, Tensor] = {}
    places: dict[str, list[int]] = {}
    for name, tensor in state.items():
        place = [0] * tensor.dim()
        if isinstance(tensor, DTensor):
            place[0] = -(-tensor.shape[0] // ranks.size) * ranks.rank
            tensor = tensor.to_local()
        elif not ranks.leads:
            continue
        if tensor.numel():
            parts[name], places[name] = tensor, place
    return parts, places
