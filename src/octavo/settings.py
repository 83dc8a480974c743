"""From YAML and ``key.sub=value`` words to typed settings, with errors that name the key one meant.

First plain mappings under canonical names, where the seed projects' spellings (``n_embd``,
``training: {max_iters: ...}``) are accepted, here and nowhere else; then a `Group`, a dataclass
that converts each value to its annotation. `octavo.config` says which settings there are.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml

from octavo.errors import ConfigError

Settings = dict[str, dict[str, Any]]
"""Section to name to value, under canonical names."""

# The seeds' and nanoGPT's names for our fields, by section.
ALIASES: dict[str, dict[str, str]] = {
    "model": {
        "n_embd": "model.d_model",
        "n_heads": "model.n_head",
        "n_layers": "model.n_layer",
        "n_kv_heads": "model.n_kv_head",
        "activation_function": "model.mlp",
        "pos": "model.position",
    },
    # S2 keeps the optimizer, the loop and the intervals in one section.
    "training": {
        "batch_size": "train.micro_batch_size",
        "max_iters": "train.max_steps",
        "gradient_accumulation_steps": "train.grad_accum",
        "gradient_checkpointing": "train.grad_checkpoint",
        "compile": "train.compile",
        "seed": "train.seed",
        "learning_rate": "optim.lr",
        "weight_decay": "optim.weight_decay",
        "warmup_iters": "optim.warmup",
        "grad_clip": "optim.grad_clip",
        "eval_interval": "eval.every",
        "save_interval": "checkpoint.every",
        "log_interval": "log.every",
    },
    "advanced": {
        "gradient_checkpointing": "train.grad_checkpoint",
        "compile": "train.compile",
        "use_lora": "lora.rank",  # true: as wide as lora_rank says
        "lora_rank": "lora.rank",
        "lora_alpha": "lora.alpha",
        "quantize": "train.quantize",
        "speculative_sampling": "train.draft",
        "log_attention": "log.attention",
    },
}
VALUE_ALIASES = {"mlp": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}}
AUTO_FIELDS = ("n_kv_head", "d_ff", "head_dim", "vocab_size")  # 0, null and auto mean: derive it


def canonical(
    settings: Mapping[Any, Any], known: Mapping[str, Iterable[str]], where: str = ""
) -> Settings:
    """Translate the seeds' sections and names into ours; ``known`` holds each section's names.

    Raises `ConfigError` for an unknown name and for one given twice; types are not looked at yet.
    """
    names = {key: [*known.get(key, ()), *ALIASES.get(key, ())] for key in [*known, *ALIASES]}
    result: Settings = {}
    for section, values in settings.items():
        if section not in names:
            raise unknown_key("", section, names, where)
        for name, value in _lora_switch(_group(section, values, where)).items():
            if name not in names[section]:
                raise unknown_key(section, name, names, where)
            target = ALIASES.get(section, {}).get(name, f"{section}.{name}")
            home, _, key = target.partition(".")
            if key in result.setdefault(home, {}):
                raise ConfigError(f"{target} is given twice", where, f"remove {section}.{name}")
            result[home][key] = _canonical_value(key, value)
    return result


def no_data_parallel(where: str = "") -> ConfigError:
    """The error for who wants `torch.nn.DataParallel`: one process, and slower than it looks."""
    return ConfigError(
        "several GPUs are trained on by several processes, not by DataParallel",
        where,
        "torchrun --nproc-per-node GPUS -m octavo train ...",
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid upon it, group by group."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(merged.get(name), Mapping) and isinstance(value, Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def parse_override(word: str) -> dict[str, Any]:
    """``key.sub=value``, the value in YAML, as nested settings."""
    keys, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"the setting {shown(word)} has no value", fix="write NAME=VALUE")
    value = parse_yaml(text, f"in {shown(word)}")
    for key in reversed(keys.split(".")):
        value = {key: value}
    return value


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read one YAML mapping; refuses duplicate keys, anchors and tags."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or NUL in the path
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    settings = parse_yaml(text, f"in {path}")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        what = "a configuration is a mapping of sections"
        raise ConfigError(what, f"in {path}", "start with 'model:'")
    return settings


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text without anchors, tags or duplicate keys; errors become one line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"invalid YAML: {problem}", where + line) from None


class Group:
    """A dataclass of settings that holds every field to its annotation.

    ``Annotated[int, (low, high)]`` adds closed bounds. Raises `ConfigError`, naming ``path.field``.
    """

    path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "") -> None:
        cls.path = path

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = convert(getattr(self, f.name), f.type, f"{self.path}.{f.name}".lstrip("."))
            object.__setattr__(self, f.name, value)  # the dataclasses are frozen


def convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotation ``hint`` wants it; ``name`` is what an error calls it."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = convert(value, options[0], name)
        if options[1][0] <= value <= options[1][1]:
            return value
    elif origin in (Union, UnionType):
        for option in options:
            try:
                return convert(value, option, name)
            except ConfigError:
                if isinstance(value, Mapping) and dataclasses.is_dataclass(option):
                    raise  # the group's own complaint says more than ours would
    elif origin is Literal and value in options:
        return value
    elif origin is list and isinstance(value, list | tuple):
        return [convert(item, options[0], name) for item in value]
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(options):
        return tuple(convert(value[i], option, name) for i, option in enumerate(options))
    elif hint in (int, float):
        number = _number(value)
        if number is not None and (hint is float or number == int(number)):
            return hint(number)
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = [f.name for f in dataclasses.fields(hint)]
        for key in value:
            if key not in known:
                raise unknown_key(name, key, {name: known}, "")
        return hint(**value)  # type: ignore[operator]
    elif origin is None and isinstance(value, hint):
        return value
    raise ConfigError(f"{name} is {shown(value)}", fix=f"give {_wanted(hint)}")


def _number(value: Any) -> int | float | None:
    """The finite number that ``value`` is or spells; YAML 1.1 reads ``3e-4`` as text."""
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return _number(kind(value))
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < 1e300 else None


def _wanted(hint: Any) -> str:
    """An annotation in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        low, high = options[1]
        bounds = f"from {low:g} to {high:g}" if high < 2**40 else f"of at least {low:g}"
        return f"{_wanted(options[0])} {bounds}"
    if origin in (Union, UnionType):
        return " or ".join(map(_wanted, options))
    if origin is Literal:
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if origin in (list, tuple):
        return f"a list, each {_wanted(options[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return {**names, NoneType: "null"}.get(hint, "settings")


def field_docs(cls: type) -> dict[str, str]:
    """What the string under each field of a dataclass says of it, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return docs


def unknown_key(
    section: str, key: Any, names: Mapping[str, Iterable[str]], where: str
) -> ConfigError:
    """The error for a key nobody knows: it names the nearest one, or where that name lives."""
    name = key if isinstance(key, str) and key.isprintable() else shown(key)
    if re.sub(r"[^a-z]|use", "", name.lower()) in ("dataparallel", "multigpu"):
        return no_data_parallel(where)
    prefix = f"{section}." if section else ""
    own = {known: prefix + known for known in names.get(section, names)}
    places = dict(own)
    for home, keys in names.items():
        for known in keys:
            places.setdefault(known, f"{home}.{known}")
    guess = name if name in places else (section and nearest(name, own)) or nearest(name, places)
    fix = f"did you mean {places[guess]}?" if guess else f"known: {', '.join(sorted(own))}"
    return ConfigError(f"unknown key {prefix}{name}", where, fix)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like ``name``, if any does."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)), None)


def shown(value: Any) -> str:
    """A value for an error message: one line of bearable length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _group(name: str, values: Any, where: str) -> Mapping[Any, Any]:
    if values is not None and not isinstance(values, Mapping):
        fix = f"write '{name}.NAME=VALUE', or '{name}: {{NAME: VALUE}}' in YAML"
        raise ConfigError(f"{name} is {shown(values)}, not settings", where, fix)
    return values or {}


def _lora_switch(values: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """S2 says whether and how wide its adapters are in two settings, we in one."""
    if not isinstance(values.get("use_lora"), bool):
        return values
    rest = {name: value for name, value in values.items() if name != "use_lora"}
    return rest | {"lora_rank": rest.get("lora_rank", 8) if values["use_lora"] else 0}


def _canonical_value(key: str, value: Any) -> Any:
    if key in AUTO_FIELDS and value in (None, "auto"):
        return 0
    return VALUE_ALIASES.get(key, {}).get(value, value) if isinstance(value, str) else value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that also refuses duplicate keys and anchors (no alias bombs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            problem = "anchors and aliases are not supported"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key '{key.value}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
