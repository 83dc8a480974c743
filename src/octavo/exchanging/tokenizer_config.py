"""``tokenizer_config.json``: what a tokenizer.json does not say, special tokens and chat template.

Only these are taken from a file: what else it holds names classes and code of other libraries.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import DataError
from octavo.manifest import read_json
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_json import EOT

FILE, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_settings(folder: Path) -> dict[str, Any]:
    """The special tokens' names and the chat template in a run or a Hugging Face directory."""
    given = read_json(folder / FILE) if (folder / FILE).is_file() else {}
    kept = {}
    for name in SPECIAL:
        token = given.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            kept[name] = token
    template = given.get("chat_template")
    if (folder / TEMPLATE).is_file():  # transformers 5 keeps it in a file of its own
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    return kept | ({"chat_template": template} if template is not None else {})


def full_settings(
    tokenizer: Tokenizer, block_size: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file must say for transformers to take tokenizer.json at its word."""
    ends: dict[str, Any] = {}
    if tokenizer.eot_id is not None:
        name = tokenizer.token_bytes(tokenizer.eot_id).decode()
        ends = {"eos_token": name}
        if name == EOT:  # GPT-2's custom, and ours: a text also begins after the end of another
            ends["bos_token"] = name
    return {
        **ends,
        **given,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; `DataError` where the tokenizer has none of that name."""
    ids = tokenizer.encode(token, special=True)
    if len(ids) != 1:
        raise DataError(f"the tokenizer has no token {token!r}, which {FILE} names")
    return ids[0]
