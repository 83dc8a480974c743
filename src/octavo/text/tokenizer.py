"""Text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained on one's own text.

A tokenizer is one Hugging Face ``tokenizer.json``, and gives the ids that Hugging Face's libraries
give from that file. It takes the fastest way to them: numpy for characters and bytes, tiktoken for
BPEs of GPT-2's kind, the `tokenizers` library for any other BPE, such as Llama's. Special tokens
are read in a text only where asked for: ``<|endoftext|>`` in a book is thirteen characters.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from octavo.disk import write_atomic
from octavo.errors import ConfigError, DataError
from octavo.text import tokenizer_json
from octavo.text.tokenizer_json import EOT, LARGEST_VOCAB, Spec

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

REPLACEMENT = "\ufffd"
END_NAMES = (EOT, "</s>", "<|end_of_text|>")  # the end of a text as GPT-2, Llama 2 and 3 name it
# How GPT-2 cuts a text before merging; possessive, so that it does not run back over long words.
GPT2_CUT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Encodes and decodes as its ``tokenizer.json`` says; `char`, `load` and so on make one.

    ``kind`` is char, byte or bpe; ``eot_id`` is the end-of-text token's id, or None without one;
    ``spec`` is the file, parsed.
    """

    def __init__(self, spec: Spec) -> None:
        """Take a parsed file as it is; `load` also turns what may be wrong with it into errors."""
        self.spec = spec
        self._layout = tokenizer_json.layout(spec)
        self._tokens = tokenizer_json.token_bytes(spec)
        self.special: dict[str, int] = {
            token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]
        }
        self.kind: Literal["char", "byte", "bpe"] = "bpe"
        if self._layout == "char":
            self.kind = "char"
        elif self._tokens[:256] == [bytes([byte]) for byte in range(256)]:
            plain = not spec["model"]["merges"] and self.is_gpt2_kind
            self.kind = "byte" if plain else "bpe"
        self.vocab_size = len(self._tokens)
        self.eot_id = next((self.special[n] for n in END_NAMES if n in self.special), None)

    @classmethod
    def char(
        cls, text: str, separator: bool = False, unseen: Literal["error", "replace"] = "error"
    ) -> "Tokenizer":
        """One id for each character of ``text``, in the order of their code points.

        ``separator`` adds the end-of-text token, as the last id; with unseen="replace" U+FFFD
        stands for every other character. Raises `DataError` for a text without characters.
        """
        characters = set(text)
        if unseen == "replace":
            characters = {c for c in characters if not "\ud800" <= c <= "\udfff"} | {REPLACEMENT}
        if not characters:
            raise DataError("an empty text has no characters to learn")
        ordered = sorted(characters)
        _utf8("".join(ordered))
        vocab = _numbered([*ordered, EOT] if separator else ordered)
        return cls(tokenizer_json.char_spec(vocab, REPLACEMENT if unseen == "replace" else None))

    @classmethod
    def byte(cls, separator: bool = False) -> "Tokenizer":
        """The bytes of UTF-8, each its own id; ``separator`` adds the end-of-text token, 256."""
        names = tokenizer_json.byte_characters()
        return cls(tokenizer_json.byte_level_spec(_numbered(names + [EOT] * separator), []))

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's 50,257 tokens (Radford et al. 2019), from tiktoken's cache, ours or the network.

        Raises `ResourceError` when they cannot be had; `load` reads them from a directory.
        """
        return cls(tokenizer_json.fetch_gpt2())

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE (Sennrich et al. 2016) learned from ``texts``, end-of-text its last id.

        A text in which little repeats gives fewer tokens than ``vocab_size``, but at least 257.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers

        if not 257 <= vocab_size <= LARGEST_VOCAB:
            raise ConfigError(
                f"a byte-level BPE of {vocab_size} tokens", fix=f"give 257 to {LARGEST_VOCAB}"
            )
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(_slices(texts), trainer)
        learned = json.loads(library.to_str())
        vocab = learned["model"]["vocab"]
        merges = tokenizer_json.merges_of(learned)
        return cls(tokenizer_json.byte_level_spec(vocab | {EOT: len(vocab)}, merges))

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a ``tokenizer.json``, or a directory that holds one or GPT-2's pair of files.

        Raises `DataError` for anything that is not a BPE tokenizer this class can use.
        """
        path = Path(path)
        try:
            if path.is_dir() and not (path / "tokenizer.json").exists():
                return cls(tokenizer_json.read_pair(path))
            file = path / "tokenizer.json" if path.is_dir() else path
            tokenizer = cls(json.loads(file.read_text(encoding="utf-8")))
            tokenizer.encode("")  # makes the encoder, so that what is wrong shows here
            return tokenizer
        except DataError as error:
            raise DataError(error.what, f"in {path}", error.fix) from None
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"this is no tokenizer.json ({type(error).__name__}: {error})",
                f"in {path}",
                "restore the file, or name another tokenizer",
            ) from None

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to ``path``, or as tokenizer.json into it when it is a directory.

        Whole or not at all; raises `ResourceError` where the disk refuses.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        write_atomic(file, _utf8(json.dumps(self.spec, ensure_ascii=False, indent=2) + "\n"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the file says, whatever its white space and the order of its keys."""
        canonical = json.dumps(self.spec, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def is_gpt2_kind(self) -> bool:
        """Whether texts are cut and merged as GPT-2's are, and tiktoken can do it."""
        return tokenizer_json.is_gpt2_kind(self.spec)

    @property
    def special_tokens(self) -> list[str]:
        """What ``encode(..., special=True)`` reads as one token each."""
        return list(self.special)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of ``text``; ``special`` reads the names of special tokens in it as those tokens.

        Raises `DataError` for lone surrogates, and for a character that a character tokenizer has
        not seen, unless it was made to replace them.
        """
        return self.encode_array(text, special).tolist()

    def encode_array(self, text: str, special: bool = False) -> np.ndarray:
        """As `encode`, an array (T,): uint16 where every id of the vocabulary fits, else uint32."""
        names = sorted(self.special, key=len, reverse=True) if special else []
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        ids = [
            np.array([self.special[part]]) if number % 2 else self._encode_plain(part)
            for number, part in enumerate(parts)
        ]
        return np.concatenate(ids).astype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        if self._layout == "sentencepiece":  # takes off the space that its encoder puts in front
            return self._library.decode([*map(int, ids)], skip_special_tokens=False)
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``, joined."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; `DataError` for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"the id {token_id} is outside the vocabulary",
                f"which has the ids 0 to {self.vocab_size - 1}",
                "use ids of this tokenizer; padding the model adds ids that mean nothing",
            )
        return self._tokens[token_id]

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text in each token (vocab_size,), int64; special tokens are no text: 0."""
        lengths = np.array([len(token) for token in self._tokens], dtype=np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def stream(self) -> "Decoder":
        """A decoder for ids that come one at a time."""
        return Decoder(self)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size} tokens)"

    def _encode_plain(self, text: str) -> np.ndarray:
        """The ids of a text without special tokens, the fastest way that gives the file's ids."""
        if self.kind == "char":
            return self._encode_characters(text)
        data = _utf8(text)
        if self.kind == "byte":
            return np.frombuffer(data, dtype=np.uint8)
        if self._tiktoken is not None:
            with suppress(ValueError):  # its regular expressions give up on a million blanks
                return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def _encode_characters(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        unseen = ids < 0
        if unseen.any():
            position = int(unseen.argmax())
            character = text[position]
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) is unknown to the tokenizer",
                f"at position {position}",
                "leave it out, or train with data.unseen=replace or data.tokenizer=byte",
            )
        return ids

    @cached_property
    def _table(self) -> np.ndarray:
        """Code point to id; the last entry stands for all above: the replacement's id or -1."""
        model = self.spec["model"]
        known = {ord(c): index for c, index in model["vocab"].items() if len(c) == 1}
        unknown = model["vocab"].get(model.get("unk_token"), -1)
        table = np.full(max(known, default=0) + 2, unknown, dtype=np.int32)
        table[list(known)] = list(known.values())
        return table

    @cached_property
    def _tiktoken(self) -> "tiktoken.Encoding | None":
        """The same BPE in tiktoken, six times as fast; None where it would give other ids."""
        if not self.is_gpt2_kind:
            return None
        import tiktoken

        special = set(self.special.values())
        ranks = {token: i for i, token in enumerate(self._tokens) if i not in special}
        # It looks for special tokens all the same: without any, at every character, which takes
        # half as long again. None is ever read as such, so this one's id does not matter.
        named = {EOT: self.vocab_size}
        return tiktoken.Encoding(
            "octavo", pat_str=GPT2_CUT, mergeable_ranks=ranks, special_tokens=named
        )

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_str(json.dumps(self.spec))
        except Exception as error:  # the library raises nothing more special
            raise DataError(f"the tokenizer.json is not valid: {error}") from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # as plain text: encode_array splits them off itself
        return library


class Decoder:
    """Turns ids that come one at a time into text, never giving out half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes, often none or several."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _slices(texts: Iterable[str], size: int = 2**16) -> Iterator[str]:
    """Texts in slices: a long one takes sixty times its size to learn from, and only one core.

    The word that each cut goes through hardly changes how often words occur.
    """
    for text in texts:
        _utf8(text)
        yield from (text[start : start + size] for start in range(0, len(text), size))


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has half a character, the lone surrogate U+{ord(text[error.start]):04X}",
            f"at position {error.start}",
            "decode the text with errors='replace'",
        ) from None
