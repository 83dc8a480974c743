"""A run's weights packed into the run, once what was written has been seen to compute the same."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from typing import Any

from octavo import disk, packed
from octavo.adapting.quantize import (
    Weights,
    choose_storage,
    quantized,
    quantized_model,
    unpacked_model,
)
from octavo.checkpoint import MODEL, weights_sha256
from octavo.errors import ConfigError
from octavo.language_model import LanguageModel
from octavo.manifest import read_manifest, verified, versions
from octavo.packed import Storage
from octavo.text.token_files import watched
from octavo.training.merging import check_equal, fold_in, probe


def pack_run(
    lm: LanguageModel,
    weights: Weights,
    precision: str,
    chosen: Mapping[str, Storage] | None = None,
) -> dict[str, Any]:
    """Write ``RUN/packed/PRECISION.safetensors`` of ``lm``'s `weights_of`; return its facts.

    The file is read back and its logits are compared before it appears under its name. ``chosen``
    wins over what ``precision`` would choose, tensor by tensor. Raises `NonFiniteError` for weights
    that are not numbers, `ParityError` where logits differ, `ResourceError` where the disk refuses.
    """
    assert lm.run is not None
    storages, remarks = choose_storage(weights, precision)
    storages |= chosen or {}
    pieces = watched(quantized(weights, storages), len(storages), f"packing to {precision}")
    numbers = dict(pieces)
    plan = {name: (storage, weights[name].shape) for name, storage in storages.items()}
    facts = describe(lm, precision, plan) | {"remarks": remarks}
    folder = packed.packed_path(lm.run.path, precision).parent
    with disk.errors(f"write into {folder}"):
        for left in folder.glob(f".tmp-{precision}-*"):  # by a process that was killed
            shutil.rmtree(left)
        with disk.scratch(folder, precision) as temp:
            packed.write_packed(temp, plan, numbers.items(), facts)
            file = packed.open_packed(temp, precision, facts["weights_sha256"])
            wanted = probe(quantized_model(lm.config, numbers))  # one model after the other
            del numbers
            found = probe(unpacked_model(lm.config, file))
            what = "what was packed gives logits that differ"
            worst = check_equal(wanted, found, what, "it was not kept; please report it")
            equal = {"largest_difference_of_a_logit": worst}
            packed.add_facts(file.path, equal)
            packed.publish(temp, lm.run.path, precision)
    return facts | equal


def weights_of(lm: LanguageModel) -> Weights:
    """What there is to pack, tied weights once: mapped from the run's checkpoint.

    Where there are adapters they are merged into ``lm.model``, whose weights these are then. Raises
    `ConfigError` for what is no run that writes.
    """
    if lm.run is None or lm.checkpoint is None:
        raise ConfigError("only a run's weights can be packed", fix="octavo import makes one")
    if lm.run.config.finetune.labels:
        raise ConfigError("a classifier writes nothing, and packing is for writing faster")
    if lm.run.config.lora.rank:
        fold_in(lm.model)
        state = lm.model.state_dict()
        weights = {name: tensor.numpy(force=True) for name, tensor in state.items()}
        if lm.config.tie_embeddings:
            del weights["lm_head.weight"]
        return weights
    manifest = lm.run.load(lm.checkpoint).manifest
    return packed.map_tensors(verified(lm.checkpoint, manifest, MODEL))[0]


def describe(
    lm: LanguageModel, precision: str, plan: Mapping[str, tuple[Storage, tuple[int, ...]]]
) -> dict[str, Any]:
    """What a packed file and its JSON file say of themselves."""
    assert lm.checkpoint is not None
    groups = [storage.group for storage, _ in plan.values() if storage.group]
    tied = {"lm_head.weight": "tok_emb.weight"} if lm.config.tie_embeddings else {}
    return {
        "format": packed.FORMAT,
        "version": packed.VERSION,
        "precision": precision,
        "group": str(max(groups, key=groups.count, default=0)),
        "tied": json.dumps(tied),
        "weights_sha256": weights_sha256(lm.checkpoint),
        "checkpoint": lm.checkpoint.name,
        "step": read_manifest(lm.checkpoint).step,
        "fp32_bytes": sum(Storage("fp32").bytes(shape) for _, shape in plan.values()),
        "packed_bytes": sum(storage.bytes(shape) for storage, shape in plan.values()),
        "tensors": dict(Counter(str(storage) for storage, _ in plan.values())),
        "versions": versions(),
    }
