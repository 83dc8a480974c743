"""What is in a dataset of tokens, whoever made it: counts, types, documents, how it begins."""

from pathlib import Path
from typing import Any

import numpy as np

from octavo.text.shards import Dataset
from octavo.text.token_files import Tokens, watched
from octavo.text.tokenizer import Tokenizer

GPT2_EOT = 50256
EXCERPT = 64  # tokens


def inspect(dataset: Dataset, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Figures of ``dataset``, every id looked at where nobody has counted before.

    ``tokenizer`` is the dataset's own unless given. Where nothing says what ends a document,
    GPT-2's end-of-text is counted if it is the largest id.
    """
    tokenizer = tokenizer or dataset.tokenizer
    train, val = dataset.tokens("train"), dataset.tokens("val")
    largest = max(part.vocab_largest for part in (train, val) if len(part))
    eot_id = tokenizer.eot_id if tokenizer else dataset.eot_id
    if eot_id is None and dataset.vocab_size is None and largest == GPT2_EOT:
        eot_id = GPT2_EOT
    tokens, size = len(train) + len(val), sum(shard["bytes"] for shard in dataset.shards)
    facts = {
        "files": len(dataset.shards),
        "file_bytes": size,
        "tokens": tokens,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "type": (train if len(train) else val).dtype.name,
        "bytes_a_token": round(size / tokens, 4),
        "documents": _documents(dataset, train, val, eot_id),
        "end_of_text": eot_id,
        "vocab_size": tokenizer.vocab_size if tokenizer else dataset.vocab_size,
        "largest_id": largest,
        "tokenizer": repr(tokenizer) if tokenizer else None,
        "tokenizer_sha256": tokenizer.fingerprint if tokenizer else dataset.tokenizer_sha256,
        **_reported(dataset.report),
    }
    if tokenizer:
        beginning = (train if len(train) else val)[:EXCERPT]
        facts["begins"] = tokenizer.decode(np.asarray(beginning).tolist())
    return {name: value for name, value in facts.items() if value is not None}


def _reported(report: dict[str, Any]) -> dict[str, Any]:
    """What `octavo data prepare` found out about the texts, in words and figures."""
    if "overlap" not in report:
        return {}
    found: dict[str, Any] = {"text_bytes": report["bytes"], "characters": report["characters"]}
    if report["learned_from"]:
        found["tokenizer_learned_from_bytes"] = report["learned_from"]
    what = "duplicates_left_out" if report["dropped"] else "duplicate_documents"
    found |= {what: report["duplicates"], "empty_documents": report["empty"]}
    found["bytes_not_utf8_replaced"] = report["repaired"]
    for path, overlap in report["overlap"].items():
        name = Path(path).name
        sample = f", 1 in {1 / overlap['sampled']:.0f}" if overlap["sampled"] < 1 else ""
        found[f"13-grams of {name}{sample}"] = overlap["ngrams"]
        found[f"share of them in training, {name}"] = overlap["share"]
    total = sum(report["tokens_of"].values())
    if len(report["tokens_of"]) > 1 and total:
        found |= {f"share of {name}": n / total for name, n in report["tokens_of"].items()}
    return found


def _documents(dataset: Dataset, train: Tokens, val: Tokens, eot_id: int | None) -> int | None:
    """End-of-text tokens; None where nothing says which they are."""
    counted = [shard["documents"] for shard in dataset.shards]
    if eot_id is None or min(counted) >= 0:
        return None if eot_id is None else sum(counted)
    chunks = [*train.chunks(), *val.chunks()]
    every = watched(chunks, len(chunks), "counting documents")
    return sum(int((ids == eot_id).sum()) for ids in every)
