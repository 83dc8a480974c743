"""Hugging Face's ``tokenizer.json``: how octavo writes its tokenizers, and reads anyone's.

The file holds a BPE: a vocabulary from strings to ids, and merges of two tokens into one. What the
strings stand for is its layout: ``char``, themselves; ``byte-level``, GPT-2's printable stand-ins,
one character for each byte; ``sentencepiece``, text with ▁ for the space and <0x0A> for a byte.
"""

import hashlib
import json
import os
import re
import tempfile
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal

from octavo.errors import DataError
from octavo.text.download import fetch

EOT = "<|endoftext|>"
LARGEST_VOCAB = 2**24
Spec = dict[str, Any]
"""A parsed tokenizer.json."""

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_OTHERWISE = (
    "without a network name a directory that holds its encoder.json and vocab.bpe as the "
    "tokenizer, set TIKTOKEN_CACHE_DIR to a cache of tiktoken's, or choose tokenizer bpe"
)


def byte_characters() -> list[str]:
    """GPT-2's stand-in for each byte: Latin-1 where that is printable, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def char_spec(vocab: dict[str, int], replacement: str | None) -> Spec:
    """Characters as a BPE without merges; ``replacement`` is what an unknown one becomes."""
    return _spec(vocab, [], replacement, None, {"type": "Fuse"})


def byte_level_spec(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Spec:
    """A BPE over bytes that cuts texts as GPT-2 does."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return _spec(vocab, [" ".join(pair) for pair in merges], None, level, level)


def _spec(
    vocab: dict[str, int], merges: list[str], unknown: str | None, cut: Any, decoder: Any
) -> Spec:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = [{"id": vocab[EOT], "content": EOT, **flags, "special": True}] if EOT in vocab else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": end,
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def layout(spec: Spec) -> Literal["char", "byte-level", "sentencepiece"]:
    """What the vocabulary's strings stand for; `DataError` for a file that says it otherwise."""
    model, decoder = spec["model"], spec["decoder"] or {}
    if model["type"] != "BPE":
        raise DataError(
            f"a tokenizer of type {model['type']} is not supported",
            fix="use one of type BPE, as GPT-2's, Llama's and Qwen's are",
        )
    steps = {step["type"] for step in decoder.get("decoders", [decoder])} if decoder else set()
    if "ByteLevel" in steps:
        return "byte-level"
    if steps == {"Fuse"} and not (model["merges"] or spec["pre_tokenizer"] or spec["normalizer"]):
        return "char"
    if steps & {"ByteFallback", "Metaspace"}:
        return "sentencepiece"
    raise DataError(f"the decoder {sorted(steps)} is not supported", fix="use a byte-level BPE")


def token_bytes(spec: Spec) -> list[bytes]:
    """The bytes of every id; an id that the file leaves out has none."""
    vocab = spec["model"]["vocab"]
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids = [*vocab.values(), *added.values()]
    if not ids or not all(type(index) is int and 0 <= index < LARGEST_VOCAB for index in ids):
        raise DataError(f"ids are whole numbers from 0 to {LARGEST_VOCAB - 1}, and there is one")
    bytes_of = {"char": str.encode, "byte-level": _unspell, "sentencepiece": _from_pieces}
    convert = bytes_of[layout(spec)]
    tokens = [b""] * (max(ids) + 1)
    for token, index in vocab.items():
        tokens[index] = convert(token)
    for token, index in added.items():
        tokens[index] = token.encode()
    return tokens


def merges_of(spec: Spec) -> list[tuple[str, str]]:
    """The merges, first learned first; files write them as "a b" or as ["a", "b"]."""
    merges = spec["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in pairs]


def is_gpt2_kind(spec: Spec) -> bool:
    """Whether tiktoken gives this file's ids: GPT-2's cuts, and merges that rank as their ids do.

    tiktoken merges the pair whose result has the lowest id. That is the pair that was learned first
    when the results' ids ascend and all other tokens are single bytes.
    """
    model, cut = spec["model"], spec["pre_tokenizer"] or {}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    plain_cut = cut.get("type") == "ByteLevel" and not cut["add_prefix_space"]
    plain_cut = plain_cut and cut.get("use_regex", True) and not spec["normalizer"]
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    if not plain_cut or any(map(model.get, odd)) or len(special) < len(spec["added_tokens"]):
        return False
    results = [model["vocab"][first + second] for first, second in merges_of(spec)]
    learned = model["vocab"].keys() - special
    singles = learned.issuperset(byte_characters())
    ascend = all(earlier < later for earlier, later in pairwise(results))
    return singles and ascend and len(learned) == 256 + len(results)


def read_pair(directory: Path) -> Spec:
    """GPT-2's two files in a directory, by OpenAI's names or Hugging Face's."""
    for vocab, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (directory / vocab).exists() and (directory / merges).exists():
            return _parse_pair((directory / vocab).read_bytes(), (directory / merges).read_bytes())
    raise DataError(
        "no tokenizer",
        fix="it needs tokenizer.json, encoder.json and vocab.bpe, or vocab.json and merges.txt",
    )


def fetch_gpt2() -> Spec:
    """GPT-2's two files from tiktoken's cache, octavo's, or the network; else a `ResourceError`."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(named) if named else Path(tempfile.gettempdir()) / "data-gym-cache"
    files = []
    for name, sha256 in GPT2_SHA256.items():
        url = GPT2_URL + name
        kept = cache / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
        files.append(fetch(f"gpt2-{name}", url, sha256, GPT2_OTHERWISE, places=[kept]))
    return _parse_pair(*files)


def _parse_pair(vocab: bytes, merges: bytes) -> Spec:
    lines = merges.decode("utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return byte_level_spec(json.loads(vocab), [(first, second) for first, second in pairs])


BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def _unspell(token: str) -> bytes:
    """A byte-level token's bytes; one that is not spelled in stand-ins is its own text."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _from_pieces(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode()
