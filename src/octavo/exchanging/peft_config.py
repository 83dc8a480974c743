"""adapter_config.json of Hugging Face PEFT: what octavo reads in it, and what it writes.

Options that change the mathematics and that we have no word for are refused by name, never ignored.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from octavo.adapting.lora import is_named
from octavo.config import Count, Dropout, Positive
from octavo.errors import CheckpointError, ConfigError
from octavo.manifest import read_json
from octavo.settings import Group, convert, shown

CONFIG = "adapter_config.json"

# Options that do not change the function once the matrices are there.
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
# The others, but for those in `Settings`, must be off or have one of these values.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other beginnings (pissa, olora, ...) change the base too.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, kw_only=True)
class Settings(Group, path="adapter_config"):
    """What the file says that the matrices do not; PEFT's names and defaults."""

    r: Count = 8
    lora_alpha: Positive = 8.0
    lora_dropout: Dropout = 0.0
    use_rslora: bool = False
    """Divide alpha by the root of the rank (Kalajdzievski 2023)."""
    rank_pattern: dict = field(default_factory=dict)
    """Exceptions: ends of modules' names, as regular expressions, with their ranks."""
    alpha_pattern: dict = field(default_factory=dict)
    """The same with their alphas."""

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module's adapter; its scale is alpha / rank.

        Raises `CheckpointError` for patterns that are none.
        """
        try:
            rank = convert(_by_pattern(self.rank_pattern, module, self.r), Count, "rank_pattern")
            alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
            alpha = convert(alpha, Positive, "alpha_pattern")
        except (ConfigError, re.error) as error:
            raise CheckpointError(f"{CONFIG} makes no sense for {module}: {error}") from None
        return rank, alpha * math.sqrt(rank) if self.use_rslora else alpha


def read_settings(directory: Path) -> Settings:
    """Read a directory's file.

    Raises `ConfigError` for an option our adapters have no word for and `CheckpointError` for
    anything but a sound file.
    """
    config = read_json(directory / CONFIG)
    known = {f.name for f in fields(Settings)}
    for option, value in {"peft_type": None, "bias": "none", **config}.items():
        if option in known or option in HARMLESS:
            continue
        if value not in ALLOWED.get(option, (None, False, [], {})):
            raise ConfigError(f"an adapter with {option}={shown(value)} is not one octavo has")
    try:
        return Settings(**{key: config[key] for key in known if config.get(key) is not None})
    except ConfigError as error:
        raise CheckpointError(error.what, f"in {directory}", error.fix) from None


def make_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], modules: Iterable[str]
) -> dict[str, Any]:
    """The content of a file for adapters of these ranks and alphas, by module.

    ``modules`` are all the linear layers there are: the targets' names must mean no others.
    """
    alphas = {m: int(alpha) if alpha == int(alpha) else alpha for m, alpha in alphas.items()}
    (r, _), *_ = Counter(ranks.values()).most_common()
    (alpha, _), *_ = Counter(alphas.values()).most_common()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _endings(ranks, modules),
        "rank_pattern": {module: own for module, own in ranks.items() if own != r},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "bias": "none",
        "inference_mode": True,
    }


def _by_pattern(patterns: Mapping[str, Any], module: str, rule: Any) -> Any:
    """The value of the first pattern that is the end of ``module``'s name, else the rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return rule


def _endings(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of names that mean the ``chosen`` of the ``modules`` and no others."""
    chosen, modules = set(chosen), list(modules)
    for words in (1, 2):
        endings = {".".join(module.split(".")[-words:]) for module in chosen}
        if {module for module in modules if is_named(module, endings)} == chosen:
            return sorted(endings)
    return sorted(chosen)
