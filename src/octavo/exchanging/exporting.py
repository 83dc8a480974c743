"""A model as a directory that transformers loads in one step, checked before it appears.

It is written beside its target, loaded back by transformers' own code and compared: logits, greedy
text, perplexity, and the tokenizer's ids. Only then is it renamed; else `ParityError`, and nothing
is left.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.errors import ConfigError, OctavoError, ParityError
from octavo.exchanging.huggingface import to_huggingface
from octavo.exchanging.model_card import write_card
from octavo.exchanging.parity import Parity, compare, compare_tokenizers, quiet
from octavo.exchanging.staging import refuse_occupied, staged
from octavo.exchanging.tokenizer_config import FILE as TOKENIZER_CONFIG
from octavo.exchanging.tokenizer_config import SPECIAL, full_settings, special_id
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

SHARD = "2GB"  # larger weights are cut into files of at most this
ENDS = {"bos_token", "eos_token", "pad_token"}  # the special tokens whose ids a model is told


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    directory: Path
    architecture: str
    parity: Parity


def export_huggingface(
    model: GPT,
    tokenizer: Tokenizer | None,
    target: Path | str,
    rows: np.ndarray,
    text: str,
    *,
    name: str,
    facts: Mapping[str, str] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    force: bool = False,
) -> Exported:
    """Write ``model``, on the CPU, into the directory ``target``.

    It is compared on ``rows`` (N, T + 1) of ids, which ``text`` describes. ``name`` and ``facts``
    go into the model card; ``tokenizer_config`` may name special tokens and hold a chat template.
    The class follows from the configuration unless ``architecture`` names one.
    Raises `ConfigError` where no stock class holds the model or something lies at ``target`` (which
    ``force`` overrides), and `ParityError` where transformers computes something else.
    """
    refuse_occupied(Path(target), force)
    _refuse_wrapped(model)
    module = to_huggingface(model, architecture)
    architecture = type(module).__name__
    with staged(Path(target), force) as temp:
        _write(temp, module, tokenizer, tokenizer_config or {})
        parity = check(temp, model, tokenizer, rows, text)
        card = write_card(name, architecture, model.config, tokenizer, facts or {}, parity)
        (temp / "README.md").write_text(card, encoding="utf-8")
    return Exported(Path(target), architecture, parity)


def _refuse_wrapped(model: GPT) -> None:
    """Adapters and classifying heads are not part of any stock class."""
    with torch.device("meta"):
        plain = GPT(model.config).state_dict().keys() if type(model) is GPT else None
    if model.state_dict().keys() != plain:
        raise ConfigError(
            "the model is more than a GPT: no stock class of transformers holds the rest",
            fix="fold adapters in first: octavo merge RUN --out RUN2",
        )


def check(
    directory: Path, model: GPT, tokenizer: Tokenizer | None, rows: np.ndarray, text: str
) -> Parity:
    """Load ``directory`` as its users will, and compare; `ParityError` for whatever is wrong."""
    import transformers

    vocab_size = tokenizer.vocab_size if tokenizer else model.config.vocab_size
    against = f"transformers {transformers.__version__}"
    try:
        with quiet(transformers):
            module = transformers.AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True
            )
            parity = compare(model, module, rows, text, against, vocab_size)
            if tokenizer is not None:
                theirs = transformers.AutoTokenizer.from_pretrained(
                    directory, local_files_only=True
                )
                compare_tokenizers(tokenizer, theirs, rows[:, :-1])
    except OctavoError:
        raise
    except Exception as error:  # of many kinds; none of them lets the export pass
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ParityError(f"{against} cannot use what was written: {reason}") from error
    return parity


def _write(
    directory: Path, module: Any, tokenizer: Tokenizer | None, given: Mapping[str, Any]
) -> None:
    """The model's files by transformers itself, and the tokenizer's."""
    import transformers

    if tokenizer is not None:
        settings = full_settings(tokenizer, module.config.max_position_embeddings, given)
        ends = {
            f"{kind}_id": special_id(tokenizer, settings[kind]) for kind in ENDS & settings.keys()
        }
        for name, index in ends.items():
            setattr(module.config, name, index)
        padding = list(range(tokenizer.vocab_size, module.config.vocab_size))  # nobody writes it
        module.generation_config = transformers.GenerationConfig(
            **ends, **({"suppress_tokens": padding} if padding else {})
        )
        tokenizer.save(directory)
        _write_json(directory / TOKENIZER_CONFIG, settings)
        special = {key: token for key, token in settings.items() if key in SPECIAL}
        _write_json(directory / "special_tokens_map.json", special)
    with quiet(transformers):
        module.save_pretrained(directory, max_shard_size=SHARD)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    file.write_text(text + "\n", encoding="utf-8")
