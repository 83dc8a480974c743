"""The run directory: created whole, locked while it is trained, saved and loaded by checkpoint.

A checkpoint is whole or absent: its files are written and synced in a hidden directory,
``manifest.json`` with their SHA-256 comes last, and one rename publishes it. A process killed at
any point leaves the checkpoints it found, or those and the new one. No file is used before its
hash was compared. A keyless hash stops accidents, not attackers; but nothing here could run:
weights are safetensors, all else is JSON. Reading needs no PyTorch.
"""

import dataclasses
import functools
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo import disk
from octavo.config import Config, load_config, to_yaml
from octavo.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ResourceError
from octavo.manifest import (
    MANIFEST,
    Manifest,
    fingerprint,
    naming_a_way_out,
    read_json,
    read_manifest,
    seal,
    to_json,
    valid_checkpoints,
    verified,
    versions,
)
from octavo.settings import nearest
from octavo.tensors import first_non_finite, read_arrays, read_parts, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.text.tokenizer import Tokenizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
INDEX = "optimizer.index.json"  # instead of OPTIMIZER: where each process's part belongs
NOT_SAVED = "not saved; the checkpoints before it are intact"
SPARE_BYTES = 1 << 20  # headers, manifest and directory entries, generously


class Run:
    """A run directory; ``pinned`` is the one checkpoint of it that was asked for, if one was."""

    def __init__(self, path: Path, pinned: Path | None = None) -> None:
        self.path, self.pinned = path, pinned
        self.folder = path / "checkpoints"

    @classmethod
    def create(
        cls,
        path: Path | str,
        config: Config,
        tokenizer: "Tokenizer | None" = None,
        files: Mapping[str, bytes] | None = None,
        weights: Mapping[str, "Tensor | np.ndarray"] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> "Run":
        """Make a new run; its directory appears whole: settings, tokenizer, other ``files``.

        Where there are ``weights`` they are the checkpoint of step 0, with these ``facts``, and
        training begins there. Raises `ConfigError` where something else already is or no path can
        be, `ResourceError` where the file system refuses.
        """
        path = Path(path)
        refuse_occupied(path)
        target = Path(os.path.realpath(path))
        with disk.errors(f"create the run {path}"), disk.scratch(target.parent, "run") as temp:
            for name, data in {"config.yaml": to_yaml(config).encode(), **(files or {})}.items():
                disk.write_synced(temp / name, data)
            if tokenizer is not None:
                tokenizer.save(temp / "tokenizer.json")
            if weights is not None:
                cls(temp).save(0, weights, {}, {}, keep=1, facts=facts)
            disk.publish(temp, target)
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """The run at ``path``, which may also be one of a run's checkpoints: then pinned to it."""
        path = Path(path)
        if run := cls.find(path):
            return run
        raise ConfigError(f"{path} is no run", f"looked for {path / 'config.yaml'}", _hint(path))

    @classmethod
    def find(cls, path: Path) -> "Run | None":
        """Like `open`, but None where there is no run."""
        if not disk.exists(path) or not path.is_dir():
            return None
        if disk.exists(path / "config.yaml"):
            return cls(path)
        above = path.parent.parent
        inside = path.match("checkpoints/step-*") and disk.exists(above / "config.yaml")
        return cls(above, pinned=path) if inside else None

    @functools.cached_property
    def config(self) -> Config:
        """Every setting of the run."""
        return load_config(self.path / "config.yaml")

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The run's tokenizer; None where its data came as ids."""
        path = self.path / "tokenizer.json"
        if not path.exists():
            return None
        from octavo.text.tokenizer import Tokenizer

        return Tokenizer.load(path)

    @property
    def checkpoints(self) -> list[Path]:
        """The valid checkpoints in the order of saving: manifest sound, sizes as it says."""
        return [path for path, _ in valid_checkpoints(self.folder)]

    @property
    def damaged(self) -> list[Path]:
        """Step directories that are not valid: something befell them after they were saved."""
        return sorted(set(self.folder.glob("step-*")) - set(self.checkpoints))

    @property
    def latest(self) -> Path | None:
        """The pinned checkpoint, or the valid one that was saved last."""
        return self.pinned or next(reversed(self.checkpoints), None)

    @property
    def best(self) -> Path | None:
        """The pinned checkpoint, or the one marked best."""
        return self.pinned or self._marked_best()

    def _marked_best(self) -> Path | None:
        path = self.folder / "best.json"
        if not path.exists():
            return None
        name = str(read_json(path).get("checkpoint"))
        if not re.fullmatch(r"step-\d+(-\d+)?", name):
            raise CheckpointError("best.json names no checkpoint", f"in {self.folder}", "delete it")
        return self.folder / name

    def mark_best(self, step: int, metric: float) -> None:
        """Name the checkpoint saved last at ``step`` the best; it is kept until another is."""
        valid = reversed(valid_checkpoints(self.folder))
        path = next((path for path, manifest in valid if manifest.step == step), None)
        if path is None:
            raise CheckpointError(f"step {step} has no checkpoint to be best", f"in {self.folder}")
        best = {"checkpoint": path.name, "step": step, "metric": metric}
        disk.write_atomic(self.folder / "best.json", to_json(best))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for training; a second process gets `ConfigError`.

        The kernel drops the lock when its holder ends, however it ends: it is never left stale.
        """
        import fcntl  # POSIX only, and only training needs it

        with disk.errors(f"lock the run {self.path}"):
            lock = (self.path / "lock").open("ab+", buffering=0)
        with lock:
            with disk.errors(f"lock the run {self.path}"):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.seek(0)
                    what = f"the run is being trained by process {lock.read(20).decode().strip()}"
                    fix = "wait for it, stop it, or choose another --out"
                    raise ConfigError(what, f"in {self.path}", fix) from None
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n".encode())
            yield

    def save(
        self,
        step: int,
        model: Mapping[str, "Tensor | np.ndarray"],
        optimizer: Mapping[str, "Tensor | np.ndarray"],
        state: Mapping[str, Any],
        keep: int,
        facts: Mapping[str, Any] | None = None,
        write_optimizer: Callable[[Path], None] | None = None,
    ) -> Path:
        """Save a checkpoint, delete all but the latest ``keep`` and the best, return its path.

        Saving again what was saved last changes nothing; another state at a step that exists (after
        a rollback) becomes ``step-N-2``. ``state`` and ``facts`` are JSON; ``write_optimizer``, if
        given, writes the optimizer's files. Raises `NonFiniteError` for NaN or infinity and
        `ResourceError` when the disk refuses; both leave the older checkpoints as they were. The
        caller holds the lock.
        """
        if spoilt := first_non_finite(model) or first_non_finite(optimizer):
            raise NonFiniteError(f"{spoilt} holds NaN or infinity", f"at step {step}", NOT_SAVED)
        name = f"step-{step:08d}"
        with disk.errors(f"save step {step} in {self.folder}"):
            self.folder.mkdir(exist_ok=True)
            disk.sweep(self.folder)
            _refuse_full_disk(self.folder, [*model.values(), *optimizer.values()])
            valid = valid_checkpoints(self.folder)
            last = valid[-1][1] if valid else None
            with disk.scratch(self.folder, name) as temp:
                files = _write_parts(temp, model, write_optimizer or optimizer, state)
                if last and (last.step, last.files) == (step, files):
                    return valid[-1][0]
                manifest = Manifest(
                    step=step,
                    order=last.order + 1 if last else 1,
                    files=files,
                    config=dataclasses.asdict(self.config),
                    tokenizer=self._tokenizer_fingerprint,
                    facts=dict(facts or {}),
                    versions=versions(),
                )
                disk.write_synced(temp / MANIFEST, seal(dataclasses.asdict(manifest)))
                path = _unused(self.folder / name)
                disk.publish(temp, path)
        self._retire(keep)
        return path

    def _retire(self, keep: int) -> None:
        # The new checkpoint is safe by now: what fails here is tried again at the next save.
        with suppress(OSError, CheckpointError):
            best = self._marked_best()
            for old in self.checkpoints[:-keep]:
                if old != best:
                    disk.discard(old)

    def load(self, checkpoint: Path | None = None) -> "Checkpoint":
        """Open a checkpoint (None: the latest), having seen that it is whole and belongs here.

        Raises `CheckpointError` naming the damaged file and another sound checkpoint, `DataError`
        when the run's tokenizer is not the one it was trained with, `ConfigError` when config.yaml
        describes another model.
        """
        path = checkpoint or self.latest
        if path is None:
            found = f"{len(self.damaged)} damaged" if self.damaged else "none"
            raise CheckpointError(f"{self.path} has no sound checkpoint", f"found {found}")
        with naming_a_way_out(path):
            manifest = read_manifest(path)
            state = read_json(verified(path, manifest, STATE))
        self._check_belongs(path, manifest)
        return Checkpoint(path, manifest, state)

    def _check_belongs(self, path: Path, manifest: Manifest) -> None:
        now, then = self._tokenizer_fingerprint, manifest.tokenizer
        if now != then:
            raise DataError(
                f"the run's tokenizer has the SHA-256 {now}, its weights learned with {then}",
                f"in {path}",
                "put the tokenizer.json it was trained with back",
            )
        model = dataclasses.asdict(self.config.model)
        for name, value in manifest.config["model"].items():
            if model.get(name) != value:
                raise ConfigError(
                    f"model.{name} is {model.get(name)!r}, but the weights have {value!r}",
                    f"in {self.path / 'config.yaml'}",
                    f"set it back to {value!r}, or start another run",
                )

    @property
    def _tokenizer_fingerprint(self) -> str | None:
        return self.tokenizer.fingerprint if self.tokenizer else None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened by `Run.load`; each file's hash is compared before the file is used."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.manifest.step

    def model_arrays(self) -> dict[str, np.ndarray]:
        """The weights by name, without PyTorch, as `read_arrays` gives them."""
        return self._read(MODEL, read_arrays)

    def model_tensors(self) -> "dict[str, Tensor]":
        """The weights for ``load_state_dict``; tied ones come under each of their names."""
        return self._read(MODEL, read_tensors)

    def optimizer_tensors(self) -> "dict[str, Tensor]":
        """The optimizer's tensors as `Run.save` was given them; in one piece where several
        processes saved them in parts.
        """
        if INDEX not in self.manifest.files:
            return self._read(OPTIMIZER, read_tensors)
        find = functools.partial(verified, self.path, self.manifest)
        return self._read(INDEX, lambda index: read_parts(index, find))

    def _read(self, name: str, reader: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        with naming_a_way_out(self.path):
            return reader(verified(self.path, self.manifest, name))


def weights_sha256(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint's weights, as its manifest has it."""
    return read_manifest(checkpoint).files[MODEL]["sha256"]


def newest_run(folder: Path | str) -> Path | None:
    """The run in ``folder`` that was saved last; None where none has been."""
    saved = Path(folder).glob("*/checkpoints/step-*")
    newest = max(saved, key=lambda checkpoint: checkpoint.stat().st_mtime, default=None)
    return newest.parent.parent if newest else None


def refuse_occupied(path: Path) -> None:
    """Raise unless ``path`` is free for a new run: nothing there, or an empty directory."""
    if not disk.exists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() and disk.exists(path / "config.yaml"):
        fix = f"go on with: octavo train {path} --resume, or choose another --out"
        raise ConfigError(f"{path} already is a run", fix=fix)
    raise ConfigError(f"{path} is something else than a run", fix="choose another --out")


def _hint(path: Path) -> str:
    """What was probably meant instead of ``path``: a run or checkpoint beside it or in it."""
    beside = [*path.parent.glob("*/config.yaml"), *path.parent.glob(f"*/{MANIFEST}")]
    near = {p.parent.name: str(p.parent) for p in [*path.glob("*/config.yaml"), *beside]}
    if guess := nearest(path.name, near):
        return f"did you mean {near[guess]}?"
    if near:
        return f"near it: {', '.join(sorted(near.values())[:5])}"
    return f"octavo train --out {path} makes one"


def _refuse_full_disk(folder: Path, tensors: Iterable[Any]) -> None:
    needed = sum(value.nbytes for value in tensors) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"a checkpoint needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free",
            f"in {folder}",
            "make room there; what was saved before is intact",
        )


def _write_parts(
    folder: Path,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any] | Callable[[Path], None],
    state: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write and sync everything but the manifest; return the manifest's ``files``."""
    write_tensors(folder / MODEL, model)
    disk.sync(folder / MODEL)
    if callable(optimizer):
        optimizer(folder)
    else:
        write_tensors(folder / OPTIMIZER, optimizer)
        disk.sync(folder / OPTIMIZER)
    disk.write_synced(folder / STATE, to_json(state))
    return {path.name: fingerprint(path) for path in sorted(folder.iterdir())}


def _unused(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3``, ... : a checkpoint is never overwritten."""
    attempts = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], attempts) if not p.exists())
