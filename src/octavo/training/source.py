"""What a run's windows are cut from: a text and its tokenizer, or tokens prepared before."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octavo.config import Config, DataConfig
from octavo.errors import ConfigError, DataError
from octavo.text.corpus import choose_tokenizer, read_corpus, ready_tokenizer, split, tokenize
from octavo.text.files import byte_size, counted
from octavo.text.shards import Dataset, verify
from octavo.text.token_files import Tokens
from octavo.text.tokenizer import Tokenizer

PIPED = "input.txt"  # where a run keeps the text it got on standard input
SAMPLED_BLOCKS = 8  # 16 MB blocks of a dataset whose SHA-256 is compared before training
NO_TOKENIZER = "no tokenizer: the model takes and gives ids"


@dataclass(frozen=True)
class Source:
    """Tokens to learn from and to validate on, and what is known about them."""

    train: np.ndarray | Tokens
    val: np.ndarray | Tokens
    tokenizer: Tokenizer | None
    vocab_size: int
    eot_id: int | None
    data: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


def read_source(config: Config, out: Path, tokenizer: Tokenizer | None) -> Source:
    """What ``config.data`` names, with the run's or base's ``tokenizer`` where there is one.

    Raises `DataError` for what cannot be read, is damaged or was made with another tokenizer.
    """
    dataset = Dataset.find(config.data.source)
    if dataset is None:
        return _from_text(config, out, tokenizer)
    return _from_shards(config, dataset, tokenizer)


def _from_text(config: Config, out: Path, tokenizer: Tokenizer | None) -> Source:
    from_stdin = config.data.source == "-"
    kept = from_stdin and (out / PIPED).exists()
    corpus = read_corpus(str(out / PIPED) if kept else config.data.source, config.data.field)
    tokenizer = tokenizer or choose_tokenizer(corpus, config.data)
    tokens = tokenize(corpus, tokenizer)
    data = {"name": corpus.name, "sha256": corpus.sha256, "description": corpus.description}
    if config.data.val_source is None:
        train, val = split(tokens, config.data.val_fraction)
    else:
        val_corpus = read_corpus(config.data.val_source, config.data.field)
        train, val = tokens, tokenize(val_corpus, tokenizer)
        data["val_sha256"] = val_corpus.sha256
    files = {PIPED: corpus.text.encode()} if from_stdin else {}
    return Source(train, val, tokenizer, tokenizer.vocab_size, tokenizer.eot_id, data, files)


def _from_shards(config: Config, dataset: Dataset, tokenizer: Tokenizer | None) -> Source:
    """The tokens of a dataset, a few of its blocks compared with their hashes."""
    verify(dataset, SAMPLED_BLOCKS)
    data = {"name": dataset.name, "sha256": dataset.sha256}
    train, val = dataset.tokens("train"), dataset.tokens("val")
    if config.data.val_source is not None:
        val_dataset = Dataset.open(config.data.val_source)
        verify(val_dataset, SAMPLED_BLOCKS)
        val = val_dataset.tokens("val") or val_dataset.tokens("train")
        data["val_sha256"] = val_dataset.sha256
        _check_apart(dataset, val_dataset)
    tokenizer = tokenizer or _tokenizer_of(dataset, config.data)
    if tokenizer:
        dataset.check_tokenizer(tokenizer)
    largest = max(part.vocab_largest for part in (train, val) if len(part))
    known = tokenizer.vocab_size if tokenizer else config.model.vocab_size or dataset.vocab_size
    vocab_size = known or largest + 1
    if largest >= vocab_size:
        raise DataError(
            f"the tokens hold the id {largest}, the vocabulary has the ids 0 to {vocab_size - 1}",
            f"in {dataset.name}",
            "name the tokenizer they were made with, or give a larger model.vocab_size without one",
        )
    if not len(val):
        train, val = split(train, config.data.val_fraction)
    size = byte_size(sum(shard["bytes"] for shard in dataset.shards))
    with_what = f"{tokenizer.kind} tokenizer" if tokenizer else NO_TOKENIZER
    data["description"] = (
        f"read {counted(len(dataset.shards), 'shard')} of tokens, {size}, "
        f"from {dataset.name}; {with_what}"
    )
    eot_id = tokenizer.eot_id if tokenizer else dataset.eot_id
    return Source(train, val, tokenizer, vocab_size, eot_id, data)


def _tokenizer_of(dataset: Dataset, data: DataConfig) -> Tokenizer | None:
    """The dataset's own tokenizer, or the one named in the settings; None: there is none."""
    own = dataset.tokenizer
    if data.tokenizer == "auto" or (own and own.kind == data.tokenizer):
        return own
    if data.tokenizer in ("char", "bpe"):
        raise ConfigError(
            f"data.tokenizer={data.tokenizer} is learned from a text, and {dataset.name} holds ids",
            fix="name the tokenizer they were made with: gpt2, byte or a tokenizer.json",
        )
    return ready_tokenizer(data.tokenizer, data.separator)


def _check_apart(train: Dataset, val: Dataset) -> None:
    """Refuse to validate on files that are trained on."""
    if both := set(train.files("train")) & set(val.files("val") or val.files("train")):
        raise ConfigError(
            f"{sorted(both)[0]} would be trained on and validated",
            fix="name other files as data.val_source, or leave it out",
        )
