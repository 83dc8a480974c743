"""A tokenizer as llama.cpp knows them: a byte-level BPE, whose cuts go by a name.

Bytes and characters are written as BPEs too. A character beyond ASCII is several bytes, so merges
build it; what is outside the vocabulary llama.cpp leaves out of a text without a word, where octavo
would complain.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from octavo.errors import ConfigError
from octavo.text import tokenizer_json
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_json import EOT, Spec

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
NEVER = f"{EOT} {EOT}"  # llama.cpp wants merges; these two are never beside each other as symbols
BYTES = tokenizer_json.byte_characters()

# How Llama 3 cuts a text before merging; Qwen the same, but for numbers, digit by digit.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("gpt-2",): "gpt-2",
    ("digits", "gpt-2"): "smollm",
    (LLAMA3,): "llama-bpe",
    (QWEN2,): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What the ``tokenizer.ggml`` keys of a file say."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    """The name of its cuts."""
    end: int
    """The id that begins and ends a text."""
    end_is_new: bool
    """Whether that id is one more than the tokenizer has: llama.cpp cannot do without one."""
    remarks: list[str]


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """``tokenizer`` in llama.cpp's words; `ConfigError` for one that it could not read texts with.

    Where the tokenizer has no end of text one is appended: llama.cpp would take the id 11 for it.
    """
    spec = tokenizer.spec
    names, merges = _names(spec), [f"{first} {second}" for first, second in _merges(spec)]
    types = [NORMAL if name else UNUSED for name in names]
    for token in spec["added_tokens"]:
        names[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    remarks = []
    if tokenizer.kind == "char":
        remarks.append("llama.cpp leaves characters outside the vocabulary out of a text")
    if spec["normalizer"]:
        remarks.append(f"llama.cpp does not normalize texts ({spec['normalizer']['type']})")
    end = tokenizer.eot_id
    if end is None:
        names, types = [*names, EOT], [*types, CONTROL]
    return Vocabulary(
        tokens=[name or f"[unused {index}]" for index, name in enumerate(names)],
        types=types,
        merges=merges or [NEVER],
        pre=_pre_tokenizer(spec),
        end=len(names) - 1 if end is None else end,
        end_is_new=end is None,
        remarks=remarks,
    )


def _names(spec: Spec) -> list[str]:
    """Each id's token, spelled in GPT-2's stand-ins for bytes; empty where the file has none."""
    names = [""] * len(tokenizer_json.token_bytes(spec))
    for token, index in spec["model"]["vocab"].items():
        names[index] = _spelled(token) if tokenizer_json.layout(spec) == "char" else token
    return names


def _merges(spec: Spec) -> Iterator[tuple[str, str]]:
    """The file's merges, or those that build characters of several bytes, byte by byte."""
    if tokenizer_json.layout(spec) != "char":
        yield from tokenizer_json.merges_of(spec)
        return
    special = {token["content"] for token in spec["added_tokens"]}
    characters = map(_spelled, spec["model"]["vocab"].keys() - special)
    pairs = {(c[:cut], c[cut]) for c in characters for cut in range(1, len(c))}
    yield from sorted(pairs)  # no order is wrong: each needs the one before it


def _spelled(text: str) -> str:
    return "".join(BYTES[byte] for byte in text.encode())


def _pre_tokenizer(spec: Spec) -> str:
    """llama.cpp's name for the way the tokenizer cuts a text."""
    if tokenizer_json.layout(spec) == "char":
        return "gpt-2"  # single characters survive any cut
    if tokenizer_json.layout(spec) == "sentencepiece":
        raise ConfigError(
            "GGUF would need the scores of a SentencePiece model, which tokenizer.json lacks",
            fix="export --to hf, and convert that with llama.cpp's own script",
        )
    cut = spec["pre_tokenizer"] or {}
    steps = [name for step in cut.get("pretokenizers", [cut]) if (name := _step(step))]
    if tuple(steps) not in PRE_TOKENIZERS:
        raise ConfigError(
            f"llama.cpp has no name that octavo knows for these cuts: {' then '.join(steps)}",
            fix="export --to hf, and convert that with llama.cpp's own script",
        )
    return PRE_TOKENIZERS[tuple(steps)]


def _step(step: Spec) -> str:
    """A step of cutting; nothing where it does not cut."""
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "gpt-2" if step.get("use_regex", True) else ""
        case "Digits" if step["individual_digits"]:
            return "digits"
        case "Split":
            return str(step["pattern"].get("Regex"))
    return str(step.get("type"))
