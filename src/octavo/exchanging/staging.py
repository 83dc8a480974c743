"""A directory for others to use that is written whole, checked, and only then appears."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo import disk
from octavo.errors import ConfigError

# What an earlier export may have left: a shard too many would be read with the new ones.
EXPORTED = (
    "config.json", "generation_config.json", "README.md", "*.safetensors",
    "model.safetensors.index.json", "tokenizer*.json", "special_tokens_map.json",
    "chat_template.jinja", "adapter_config.json", "*.gguf",
)  # fmt: skip


def refuse_occupied(target: Path, force: bool = False) -> None:
    """Raise `ConfigError` unless ``target`` is free or may be written over."""
    if not disk.exists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file", fix="name a directory")
    if (target / "config.yaml").exists():
        raise ConfigError(f"{target} is a run", fix="export into another directory")
    if any(target.iterdir()) and not force:
        raise ConfigError(
            f"{target} is not empty", fix="name another directory, or write over it with --force"
        )


@contextmanager
def staged(target: Path, force: bool = False) -> Iterator[Path]:
    """An empty directory that becomes ``target`` when the block ends well; else nothing is left.

    With ``force`` the files of an earlier export give way; whatever else lies there stays.
    """
    refuse_occupied(target, force)
    target = Path(os.path.realpath(target))
    with disk.errors(f"write {target}"), disk.scratch(target.parent, "export") as temp:
        yield temp
        for file in temp.iterdir():
            disk.sync(file)
        if target.is_dir() and any(target.iterdir()):
            _replace(temp, target)
        else:
            disk.publish(temp, target)


def _replace(temp: Path, target: Path) -> None:
    """Move the new files in and the old ones out; the configuration comes last."""
    new = sorted(temp.iterdir(), key=lambda file: file.name == "config.json")
    names = {file.name for file in new}
    for file in new:
        os.replace(file, target / file.name)
    for pattern in EXPORTED:
        for old in target.glob(pattern):
            if old.name not in names:
                old.unlink()
    disk.sync(target)
