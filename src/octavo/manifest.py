"""What makes a checkpoint whole: a manifest with the size and SHA-256 of each of its files.

Damage raises `CheckpointError`, which names the file.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says of its checkpoint; the file also holds the SHA-256 of all this."""

    step: int
    order: int
    """Counts the run's saves: after a rollback the later save may have the lower step."""
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 of every other file."""
    config: dict[str, Any]
    """The run's settings."""
    tokenizer: str | None
    """The fingerprint of the run's tokenizer."""
    facts: dict[str, Any]
    """What else the caller of `Run.save` wanted remembered."""
    versions: dict[str, str]
    format: int = FORMAT

    def __post_init__(self) -> None:
        whole = isinstance(self.step, int) and isinstance(self.order, int)
        mappings = isinstance(self.files, dict) and isinstance(self.config["model"], dict)
        if not (whole and mappings):
            raise TypeError("a field has another type")


def seal(content: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json: a manifest's fields and the SHA-256 of their own JSON."""
    return to_json({**content, "sha256": hashlib.sha256(to_json(content)).hexdigest()})


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, whose files are seen to be there in full length.

    A matter of milliseconds; `verify` reads every byte.
    """
    try:
        content = read_json(path / MANIFEST)
        content.pop("sha256", None)
        if seal(content) != (path / MANIFEST).read_bytes():
            raise CheckpointError(f"{MANIFEST} is damaged", f"in {path}")
        if content.get("format") != FORMAT:
            what = f"the checkpoint has format {content.get('format')}, this octavo reads {FORMAT}"
            raise CheckpointError(what, f"in {path}")
        manifest = Manifest(**content)
        said = {name: file["bytes"] for name, file in manifest.files.items()}
        # Hidden files (.DS_Store, .nfs0001) are the system's own.
        beside = [p for p in path.iterdir() if p.name != MANIFEST and p.name[0] != "."]
        there = {p.name: p.stat().st_size for p in beside}
    except (OSError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is not ours: {error}", f"in {path}") from None
    for name in sorted(said.keys() | there.keys()):
        if said.get(name) != there.get(name):
            what = f"{name} has {there.get(name, 'no')} bytes, not {said.get(name, 'none')}"
            raise CheckpointError(f"{what} as {MANIFEST} says", f"in {path}")
    return manifest


def verify(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, after comparing every byte with it."""
    manifest = read_manifest(path)
    for name in manifest.files:
        verified(path, manifest, name)
    return manifest


def verified(path: Path, manifest: Manifest, name: str) -> Path:
    """The file ``name`` of the checkpoint at ``path``, after comparing its SHA-256."""
    return compared(path / name, manifest.files.get(name, {}))


def compared(file: Path, said: Any) -> Path:
    """The file, after comparing its `fingerprint` with what was ``said`` of it."""
    try:
        found, wanted = fingerprint(file), said["sha256"][:16]
    except (OSError, LookupError, TypeError) as error:
        raise CheckpointError(f"cannot read {file.name}: {error}", f"in {file.parent}") from None
    if said != found:
        what = f"{file.name} is damaged: its SHA-256 is {found['sha256'][:16]}..., not {wanted}..."
        raise CheckpointError(what, f"in {file.parent}")
    return file


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256, as a manifest names them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def valid_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """The checkpoints in ``folder`` that `read_manifest` accepts, in the order of saving."""
    found = []
    for path in sorted(folder.glob("step-*")):
        with suppress(CheckpointError):
            found.append((path, read_manifest(path)))
    return sorted(found, key=lambda pair: pair[1].order)


@contextmanager
def naming_a_way_out(path: Path) -> Iterator[None]:
    """Let an error about the checkpoint at ``path`` end with a sound one to use instead."""
    try:
        yield
    except CheckpointError as error:
        others = [other for other, _ in valid_checkpoints(path.parent) if other != path]
        sound = next((other for other in reversed(others) if _is_sound(other)), None)
        fix = f"use a sound one: {sound}" if sound else "there is no other sound checkpoint"
        raise CheckpointError(error.what, error.where, fix) from None


def _is_sound(path: Path) -> bool:
    try:
        return bool(verify(path))
    except CheckpointError:
        return False


def to_json(content: Mapping[str, Any]) -> bytes:
    """A mapping as the JSON octavo writes."""
    return (json.dumps(content, indent=1) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise CheckpointError(f"cannot read {path.name}: {reason}", f"in {path.parent}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is no JSON object", f"in {path.parent}")
    return content


@functools.cache
def versions() -> dict[str, str]:
    """The installed versions of what a checkpoint depends on."""
    found = {}
    for name in ("octavo", "torch", "numpy", "safetensors"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
