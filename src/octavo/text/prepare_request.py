"""What `octavo data prepare` is asked for, and whether it is what a directory was begun with."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from octavo.errors import ConfigError
from octavo.settings import shown
from octavo.text.corpus import ready_tokenizer
from octavo.text.files import did_you_mean
from octavo.text.streaming import Source
from octavo.text.tokenizer import Tokenizer

LEARNED = ("char", "bpe")
KINDS = ("gpt2", "byte", *LEARNED)
PLAIN = ("tokenizer", "vocab_size", "field", "val_fraction", "shard_tokens", "format", "limit")


@dataclass(frozen=True)
class Request:
    """Texts and how they become tokens; ``processes`` and ``benchmarks`` do not change these."""

    sources: Sequence[str]
    out: Path
    tokenizer: str = "gpt2"
    vocab_size: int = 8192
    """Of a BPE that is trained here."""
    field: str = "text"
    """Of .jsonl, .csv, .parquet and Hugging Face datasets."""
    val_fraction: float = 0.01
    val: Sequence[str] = ()
    """Texts to validate on; instead of a fraction."""
    shard_tokens: int = 100_000_000
    format: Literal["npy", "bin"] = "npy"
    limit: int | None = None
    """Documents to take."""
    drop_duplicates: bool = False
    processes: int = os.cpu_count() or 1
    benchmarks: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.sources:
            raise ConfigError("prepare what?", fix="name texts, or a dataset as hf:NAME")
        if self.names.count("-") > 1:
            raise ConfigError("standard input can be read only once", fix="name - once")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"--val-fraction is {self.val_fraction}", fix="give 0 or more, and less than 1"
            )
        for name in ("shard_tokens", "processes", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}", fix="give 1 or more")
        if self.tokenizer not in KINDS and not os.path.exists(self.tokenizer):
            fix = did_you_mean(self.tokenizer, KINDS, f"give {', '.join(KINDS)} or a path")
            raise ConfigError(f"there is no tokenizer {self.tokenizer!r}", fix=fix)

    @property
    def names(self) -> list[str]:
        """All that is to be read."""
        return [*self.sources, *self.val]

    def identity(self, sources: Sequence[Source]) -> dict[str, Any]:
        """What decides the tokens, as JSON: two equal ones give the same bytes."""
        files = [
            [source.name, source.stop, source.split]
            for source in sources
            if source.name != "standard input"
        ]
        named = self.tokenizer
        if named not in KINDS and self.ready_tokenizer:
            named = f"{named} {self.ready_tokenizer.fingerprint[:16]}"
        return {name: getattr(self, name) for name in (*PLAIN, "drop_duplicates")} | {
            "tokenizer": named,
            "vocab_size": self.vocab_size if named == "bpe" else None,
            "val_fraction": None if self.val else self.val_fraction,
            "files": files,
        }

    @cached_property
    def ready_tokenizer(self) -> Tokenizer | None:
        """The tokenizer asked for; None where it has to be learned from the texts."""
        return None if self.tokenizer in LEARNED else ready_tokenizer(self.tokenizer, True)

    def command(self) -> str:
        """What is typed for this."""
        words = ["octavo", "data", "prepare", *self.sources, "--out", str(self.out)]
        default = Request(self.sources, self.out)
        for name in (*PLAIN, "processes"):
            if getattr(self, name) != getattr(default, name):
                words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        words += [word for name in self.val for word in ("--val", name)]
        words += [word for name in self.benchmarks for word in ("--benchmark", name)]
        return shlex.join(words + ["--drop-duplicates"] * self.drop_duplicates)


def refuse_changes(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ConfigError` with the first difference to what ``out`` was begun with."""
    name = next((name for name in now if before.get(name) != now[name]), None)
    if name is None:
        return
    then, value = before.get(name), now[name]
    what = f"{name} was {shown(then)}, now {shown(value)}"
    if name == "files" and isinstance(then, list):
        odd = [file for file in [*then, *value] if (file in then) != (file in value)]
        what = f"{odd[0][0]} was changed, added or left out" if odd else "their order has changed"
    fix = "type the same command as then, or choose another --out"
    raise ConfigError(f"{out} was begun with another request: {what}", fix=fix)
