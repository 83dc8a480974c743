"""A model in parts: when it is, what goes with it; its state whole again, or refused."""

import json
import pickle

import pytest
import torch
from crew import CPU, config
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    OctavoError,
    ResourceError,
)
from octavo.tensors import read_parts, write_tensors
from octavo.training import sharded
from octavo.training.parallel import ALONE, Ranks
from octavo.training.sharded import is_to_be_sharded

WHOLE = {
    "w.exp_avg": torch.arange(15.0).view(5, 3),
    "b.exp_avg": torch.tensor([1.0]),
    "w.step": torch.tensor(7.0),
}


def write(folder, ranks):
    """Parts as ranks write them: rows dealt out as `torch.chunk` does, scalars by the first."""
    files = {}
    for rank in range(ranks):
        parts, places = {}, {}
        for name, tensor in WHOLE.items():
            first = -(-len(tensor) // ranks) * rank if tensor.dim() else 0
            pieces = torch.chunk(tensor, ranks) if tensor.dim() else [tensor]
            if rank < len(pieces):
                parts[name], places[name] = pieces[rank], [first] + [0] * (tensor.dim() - 1)
                places[name] = places[name][: tensor.dim()]
        name = f"optimizer-{rank}-of-{ranks}.safetensors"
        write_tensors(folder / name, parts)
        files[name] = places
    shapes = {name: list(tensor.shape) for name, tensor in WHOLE.items()}
    return {"shapes": shapes, "files": files}


def read(folder, index):
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return read_parts(folder / "index.json", lambda name: folder / name)


@settings(max_examples=6)
@given(ranks=st.integers(1, 6))
def test_parts_make_up_the_whole(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("parts")
    found = read(folder, write(folder, ranks))
    assert found.keys() == WHOLE.keys()
    assert all(torch.equal(found[name], WHOLE[name]) for name in WHOLE)


def spoil(index, how):
    second = index["files"]["optimizer-1-of-2.safetensors"]
    match how:
        case "a part is missing":
            del index["files"]["optimizer-1-of-2.safetensors"]
        case "a tensor is missing":
            del second["w.exp_avg"]
        case "a name that the file has not":
            second["x.exp_avg"] = [0]
        case "beyond the end":
            second["w.exp_avg"] = [4, 0]
        case "the wrong dimensions":
            second["w.exp_avg"] = [3]
        case "no file":
            index["files"]["optimizer-9-of-2.safetensors"] = {}
        case "no index":
            index.clear()
    return index


@pytest.mark.parametrize(
    "how",
    ["a part is missing", "a tensor is missing", "a name that the file has not", "beyond the end",
     "the wrong dimensions", "no file", "no index"],
)  # fmt: skip
def test_an_index_that_lies_is_refused(tmp_path, how):
    with pytest.raises(CheckpointError):
        read(tmp_path, spoil(write(tmp_path, 2), how))


@pytest.mark.parametrize(
    "error", [ResourceError("what", "where", "fix"), MissingExtraError("viz", "a picture")]
)
def test_an_error_travels_between_processes(error):
    """Exceptions are pickled as a call of their class, which some have other arguments for."""
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, OctavoError)
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)


class Two(Ranks):
    """The first of two processes, when nobody else has an opinion."""

    def any(self, flag):
        return flag


TWO = Two(0, 2)


@pytest.mark.parametrize(
    ("frozen", "room", "cut"), [(0, 1.01, False), (0, 0.99, True), (75, 0.99, False)]
)
def test_a_model_is_cut_up_where_training_it_would_fill_a_device(monkeypatch, frozen, room, cut):
    """16 bytes a trained parameter and 4 a frozen one, against 60 % of the device."""
    layers = [torch.nn.Linear(100, 1, bias=False), torch.nn.Linear(75, 1, bias=False)]
    layers[1].requires_grad_(not frozen)
    model = torch.nn.Sequential(*layers)
    monkeypatch.setattr(sharded, "_memory", lambda device: room * 175 * 16 / 0.6)
    assert is_to_be_sharded(config("text"), model, CPU, TWO) is cut
    assert not is_to_be_sharded(config("text"), model, CPU, ALONE)
    assert not is_to_be_sharded(config("text", "train.parallel=ddp"), model, CPU, TWO)
    assert is_to_be_sharded(config("text", "train.parallel=fsdp"), model, CPU, TWO)


@pytest.mark.parametrize(
    "word", ["optim.name=muon", "train.precision=fp16", "train.deterministic=canonical"]
)
def test_what_does_not_go_with_sharding_is_said(word):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=word.split("=")[1]):
        is_to_be_sharded(config("text", "train.parallel=fsdp", word), model, CPU, TWO)
