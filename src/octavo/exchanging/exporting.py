"""A model as a directory that transformers loads in one step, checked before it appears.

It is written beside its target, loaded back by transformers' own code and compared: logits, greedy
text, perplexity, and the tokenizer's ids. Only then is it renamed; else `ParityError`, and nothing
is left.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octavo.adapting.surgery import refuse_wrapped
from octavo.errors import ParityError
from octavo.exchanging.huggingface import to_huggingface
from octavo.exchanging.libraries import quiet, translated
from octavo.exchanging.model_card import write_card
from octavo.exchanging.parity import (
    compare,
    compare_greedy,
    compare_tokenizers,
    logits_of,
    reader_of,
    texts_of,
)
from octavo.exchanging.staging import staged
from octavo.exchanging.tokenizer_config import FILE as TOKENIZER_CONFIG
from octavo.exchanging.tokenizer_config import SPECIAL, full_settings, special_id
from octavo.manifest import to_json
from octavo.model.gpt import GPT
from octavo.text.tokenizer import Tokenizer

SHARD = "2GB"  # larger weights are cut into files of at most this
ENDS = {"bos_token", "eos_token", "pad_token"}  # the special tokens whose ids a model is told


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
) -> dict[str, Any]:
    """Write ``model``, on the CPU, into the directory ``target``; return what is to be said.

    It is compared on ``rows`` (N, T + 1) of ids, which ``text`` describes. ``name`` and ``facts``
    go into the model card; ``tokenizer_config`` may name special tokens and hold a chat template.
    The class follows from the configuration unless ``architecture`` names one.
    Raises `ConfigError` where no stock class holds the model or something lies at ``target`` (which
    ``force`` overrides), and `ParityError` where transformers computes something else.
    """
    refuse_wrapped(model)
    module = to_huggingface(model, architecture)
    architecture = type(module).__name__
    with staged(Path(target), force) as temp:
        _write(temp, module, tokenizer, tokenizer_config or {})
        parity = check(temp, model, tokenizer, rows, text)
        card = write_card(name, architecture, model.config, tokenizer, facts or {}, parity)
        (temp / "README.md").write_text(card, encoding="utf-8")
    return {"architecture": architecture, **parity}


def check(
    directory: Path, model: GPT, tokenizer: Tokenizer | None, rows: np.ndarray, text: str
) -> dict[str, Any]:
    """Load ``directory`` as its users will, and compare; `ParityError` for whatever is wrong.

    Returns the figures: the largest difference of two logits as a share of the largest, both
    perplexities, and how many tokens of greedy text were equal, which are all that were written.
    """
    import transformers

    vocab_size = tokenizer.vocab_size if tokenizer else model.config.vocab_size
    against = f"transformers {transformers.__version__}"
    refusal = f"{against} cannot use what was written"
    with translated(ParityError, refusal), quiet(transformers):
        module = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        texts = texts_of(rows)
        figures = compare(logits_of(model), reader_of(transformers, module), texts)
        greedy = compare_greedy(model, module, texts[0], vocab_size, against)
        if tokenizer is not None:
            theirs = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            compare_tokenizers(tokenizer, theirs, rows[:, :-1])
    return {
        "against": against,
        "text": text,
        "tokens": texts[:, 1:].numel(),
        "largest_difference": figures.difference,
        "perplexity": figures.perplexity,
        "perplexity_there": figures.perplexity_there,
        "greedy_tokens": greedy,
    }


def _write(
    directory: Path, module: Any, tokenizer: Tokenizer | None, given: Mapping[str, Any]
) -> None:
    """The model's files by transformers itself, and the tokenizer's."""
    import transformers

    if tokenizer is not None:
        settings = full_settings(tokenizer, module.config.max_position_embeddings, given)
        given_ends = ENDS & settings.keys()
        ends = {f"{kind}_id": special_id(tokenizer, settings[kind]) for kind in given_ends}
        module.config.update(ends)
        padding = list(range(tokenizer.vocab_size, module.config.vocab_size))  # nobody writes it
        module.generation_config = transformers.GenerationConfig(
            **ends, suppress_tokens=padding or None
        )
        tokenizer.save(directory)
        (directory / TOKENIZER_CONFIG).write_bytes(to_json(settings))
        special = {key: token for key, token in settings.items() if key in SPECIAL}
        (directory / "special_tokens_map.json").write_bytes(to_json(special))
    with quiet(transformers):
        module.save_pretrained(directory, max_shard_size=SHARD)
