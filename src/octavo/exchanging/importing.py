"""Models from elsewhere as runs: a Hugging Face directory or name, or a nanoGPT checkpoint.

The weights are read by octavo itself. Where transformers is installed its logits are compared with
ours before anything is written. The run that appears holds the weights as step 0, the tokenizer
where octavo can represent it, and in data.json what it was imported from, with SHA-256.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from octavo import disk
from octavo.checkpoint import Run
from octavo.config import Config, DataConfig
from octavo.errors import CheckpointError, ConfigError, DataError, ResourceError
from octavo.exchanging.libraries import library, quiet, translated
from octavo.exchanging.nanogpt import as_gpt2, read_nanogpt
from octavo.exchanging.parity import compare, logits_of, random_rows, reader_of, texts_of
from octavo.exchanging.staging import refuse_occupied
from octavo.exchanging.tokenizer_config import FILE as TOKENIZER_CONFIG
from octavo.exchanging.tokenizer_config import read_settings
from octavo.exchanging.weights import read_directory
from octavo.manifest import fingerprint, to_json
from octavo.model.counts import count_parameters
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

LENGTH = 64  # tokens on which the logits are compared
GPT2_VOCAB = (50257, 50304)  # GPT-2's, and what nanoGPT pads it to
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]


@dataclass
class Source:
    """A model from elsewhere, in our form."""

    name: str
    architecture: str
    model: GPT
    files: list[Path]
    """All that was read of it."""
    reference: Callable[[Any], nn.Module]
    """Given transformers, the same weights in a module of its own."""
    folder: Path | None = None
    """Where its tokenizer lies, if anywhere."""
    remarks: list[str] = field(default_factory=list)


def import_model(source: str, target: Path | str, tokenizer: str | None = None) -> dict[str, Any]:
    """Make the run ``target`` of the model ``source``; return what is to be said about it.

    ``source`` is a directory, a name on the Hugging Face hub or a ``ckpt.pt``; ``tokenizer`` is
    "gpt2", a tokenizer.json or its directory, or a text whose characters are the vocabulary.
    Raises `ConfigError` for what octavo has no word for, `CheckpointError` for damaged files,
    `ParityError` where transformers gives other logits; then nothing is written. Without
    transformers there is nothing to compare with, and ``largest_difference`` is None.
    """
    target = Path(target)
    refuse_occupied(target)
    found = read_source(source)
    chosen = choose_tokenizer(found, tokenizer)
    compared = {"architecture": found.architecture, **_compare(found)}
    kind = chosen.kind if chosen else None
    config = Config(model=found.model.config, data=DataConfig(tokenizer=kind or "auto"))
    origin = {
        "name": found.name,
        "description": f"imported from {found.name} ({found.architecture})",
        "imported": {file.name: fingerprint(file)["sha256"] for file in found.files},
        "folder": str(found.files[0].parent.resolve()),
        **compared,
        "tokenizer": kind,
        "tokenizer_sha256": chosen.fingerprint if chosen else None,
    }
    files = {"data.json": to_json(origin)}
    settings = read_settings(found.folder) if found.folder and chosen else {}
    if settings:
        files[TOKENIZER_CONFIG] = to_json(settings)
    Run.create(target, config, chosen, files, found.model.state_dict())
    return {
        **compared,
        "parameters": count_parameters(config.model).total,
        "tokenizer": repr(chosen) if chosen else "none: this model takes and gives ids",
        "remarks": found.remarks,
    }


def read_source(source: str) -> Source:
    """Find out what ``source`` is and read it."""
    path = Path(source)
    name = path.resolve().name
    if not disk.exists(path):
        path, name = _fetch(source), source
    if path.is_dir() and (path / "config.yaml").exists():
        raise ConfigError(f"{source} is a run already", fix=f"octavo generate {source}")
    if path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_dir():
        model, family, files = read_directory(path)

        def reference(transformers: Any) -> nn.Module:
            return getattr(transformers, family.name).from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype="float32"
            )

        return Source(name, family.name, model, files, reference, folder=path)
    if path.suffix not in (".pt", ".pth"):
        raise ConfigError(
            f"{source} is neither a directory nor a nanoGPT checkpoint",
            fix="unpack archives first, and name the directory with config.json",
        )
    model, weights = read_nanogpt(path)
    return Source(name, "nanoGPT", model, [path], lambda hf: as_gpt2(hf, model.config, weights))


def choose_tokenizer(found: Source, wanted: str | None) -> Tokenizer | None:
    """The tokenizer named, or the one that came along; None, with a remark, where neither fits."""
    size = found.model.config.vocab_size
    if wanted is not None:
        chosen = _named_tokenizer(wanted)
        if chosen.vocab_size > size or (chosen.kind == "char" and chosen.vocab_size < size):
            raise DataError(
                f"the tokenizer has {chosen.vocab_size} tokens, the model {size}",
                wanted,
                "name the one it was trained with",
            )
        return chosen
    try:
        if found.folder is not None:
            chosen = Tokenizer.load(found.folder)
        elif size in GPT2_VOCAB:
            chosen = Tokenizer.gpt2()
            found.remarks.append(f"a vocabulary of {size:,} is taken to be GPT-2's")
        else:
            found.remarks += [
                "nanoGPT keeps characters in meta.pkl, a pickle, not opened here",
                "with --tokenizer TEXT the characters of its text are used",
            ]
            return None
    except (DataError, ResourceError) as error:
        found.remarks.append(f"no tokenizer: {error}")
        return None
    if chosen.vocab_size > size:
        found.remarks.append(
            f"its tokenizer has {chosen.vocab_size:,} tokens, the model {size:,}: left out"
        )
        return None
    return chosen


def _named_tokenizer(wanted: str) -> Tokenizer:
    if wanted == "gpt2":
        return Tokenizer.gpt2()
    if Path(wanted).is_dir() or wanted.endswith(".json"):
        return Tokenizer.load(wanted)
    try:
        return Tokenizer.char(Path(wanted).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {wanted}: {error}") from None


def _compare(found: Source) -> dict[str, Any]:
    """The largest difference of logits, and from whose; None and a remark without transformers."""
    transformers = library("transformers")
    if transformers is None:
        found.remarks.append("transformers is not installed: the logits were not compared")
        return {"largest_difference": None, "compared_with": None}
    config = found.model.config
    texts = texts_of(random_rows(config.vocab_size, min(LENGTH, config.block_size)))
    refusal = f"transformers cannot load {found.name}, so nothing can be compared"
    with quiet(transformers), translated(CheckpointError, refusal):
        theirs = reader_of(transformers, found.reference(transformers))
        figures = compare(logits_of(found.model), theirs, texts)
    return {"largest_difference": figures.difference, "compared_with": theirs.name}


def _fetch(name: str) -> Path:
    """A model's files from the hub or its cache; safetensors and JSON only, never a pickle."""
    if not HUB_NAME.fullmatch(name) or Path(name).suffix in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"there is no {name}", fix="name a directory, or OWNER/MODEL on the hub")
    otherwise = "name a directory that holds its config.json and model.safetensors"
    if (hub := library("huggingface_hub")) is None:
        raise ConfigError(
            f"there is no directory {name}",
            fix=f'{otherwise}; the hub needs pip install "octavo[hf]"',
        )
    refusal = f"there is no directory {name}, and the hub cannot be reached"
    with translated(ResourceError, refusal, otherwise):
        try:
            return Path(
                hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
            )
        except hub.errors.RepositoryNotFoundError:
            raise ConfigError(f"the hub has no public model {name}", fix=otherwise) from None
