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
from octavo.exchanging.nanogpt import as_gpt2, read_nanogpt
from octavo.exchanging.parity import (
    Stock,
    compare_logits,
    import_transformers,
    quiet,
    random_rows,
)
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


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    run: Path
    architecture: str
    parameters: int
    tokenizer: str
    largest_difference: float | None
    """Of two logits, as a share of the largest; None where there was nothing to compare with."""
    compared_with: str | None
    remarks: list[str]


@dataclass
class Source:
    """A model from elsewhere, in our form."""

    name: str
    architecture: str
    model: GPT
    files: list[Path]
    """All that was read."""
    reference: Callable[[Any], nn.Module]
    """Given transformers, the same weights in a module of its own."""
    folder: Path | None = None
    """Where its tokenizer lies, if anywhere."""
    remarks: list[str] = field(default_factory=list)


def import_model(source: str, target: Path | str, tokenizer: str | None = None) -> Imported:
    """Make the run ``target`` of the model ``source``.

    ``source`` is a directory, a name on the Hugging Face hub or a ``ckpt.pt``; ``tokenizer`` is
    "gpt2", a tokenizer.json or its directory, or a text whose characters are the vocabulary.
    Raises `ConfigError` for what octavo has no word for, `CheckpointError` for damaged files,
    `ParityError` where transformers gives other logits; then nothing is written.
    """
    target = Path(target)
    refuse_occupied(target)
    found = read_source(source)
    chosen = choose_tokenizer(found, tokenizer)
    difference, against = _compare(found)
    config = Config(
        model=found.model.config,
        data=DataConfig(tokenizer=chosen.kind if chosen else "auto"),
    )
    origin = {
        "name": found.name,
        "description": f"imported from {found.name} ({found.architecture})",
        "imported": {file.name: fingerprint(file)["sha256"] for file in found.files},
        "folder": str(found.files[0].parent.resolve()),
        "architecture": found.architecture,
        "largest_difference": difference,
        "compared_with": against,
        "tokenizer": chosen.kind if chosen else None,
        "tokenizer_sha256": chosen.fingerprint if chosen else None,
    }
    files = {"data.json": to_json(origin)}
    settings = read_settings(found.folder) if found.folder and chosen else {}
    if settings:
        files[TOKENIZER_CONFIG] = to_json(settings)
    Run.create_with_weights(target, config, chosen, files, found.model.state_dict())
    return Imported(
        run=target,
        architecture=found.architecture,
        parameters=count_parameters(config.model).total,
        tokenizer=repr(chosen) if chosen else "none: this model takes and gives ids",
        largest_difference=difference,
        compared_with=against,
        remarks=found.remarks,
    )


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
        return Source(
            name=name,
            architecture=family.name,
            model=model,
            files=files,
            reference=lambda library: getattr(library, family.name).from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype="float32"
            ),
            folder=path,
        )
    if path.suffix not in (".pt", ".pth"):
        raise ConfigError(
            f"{source} is neither a directory nor a nanoGPT checkpoint",
            fix="unpack archives first, and name the directory with config.json",
        )
    model, weights = read_nanogpt(path)
    return Source(
        name=name,
        architecture="nanoGPT",
        model=model,
        files=[path],
        reference=lambda library: as_gpt2(library, model.config, weights),
    )


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
            found.remarks.append("nanoGPT keeps characters in meta.pkl, a pickle, not opened here")
            found.remarks.append("with --tokenizer TEXT the characters of its text are used")
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


def _compare(found: Source) -> tuple[float | None, str | None]:
    """The largest difference of logits, and from whose; None and a remark without transformers."""
    transformers = import_transformers()
    if transformers is None:
        found.remarks.append("transformers is not installed: the logits were not compared")
        return None, None
    with quiet(transformers):
        try:
            module = found.reference(transformers)
        except Exception as error:  # of many kinds; each is one line for a person
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"transformers cannot load {found.name}, so nothing can be compared: {reason}"
            ) from error
        config = found.model.config
        rows = random_rows(config.vocab_size, min(LENGTH, config.block_size))
        difference = compare_logits(found.model, Stock(module), rows[:, :-1])
    return difference, f"transformers {transformers.__version__}"


def _fetch(name: str) -> Path:
    """A model's files from the hub or its cache; safetensors and JSON only, never a pickle."""
    if not HUB_NAME.fullmatch(name) or Path(name).suffix in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"there is no {name}", fix="name a directory, or OWNER/MODEL on the hub")
    otherwise = "name a directory that holds its config.json and model.safetensors"
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise ConfigError(
            f"there is no directory {name}",
            fix=f'{otherwise}; the hub needs pip install "octavo[hf]"',
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
    except RepositoryNotFoundError:
        raise ConfigError(f"the hub has no public model {name}", fix=otherwise) from None
    except Exception as error:  # offline, refused, timed out: the library has a class for each
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ResourceError(
            f"there is no directory {name}, and the hub cannot be reached: {reason}", fix=otherwise
        ) from None
    return Path(folder)
