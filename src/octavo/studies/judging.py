"""One ruler for several runs: the same windows of one text, or the same stretches of it.

Runs that share tokenizer, context and validation text are judged on windows, in nats a token. Where
one of these differs a window is not the same thing to both; then each model reads the whole text in
its own tokens, and what each stretch of bytes cost it is compared, in bits a byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from hashlib import sha256
from pathlib import Path

import numpy as np

from octavo.checkpoint import Run, weights_sha256
from octavo.errors import ConfigError, DataError
from octavo.evaluating.perplexity import strided_windows, token_nats
from octavo.language_model import LanguageModel
from octavo.text.batches import fixed_windows
from octavo.text.corpus import read_corpus
from octavo.text.token_files import Tokens
from octavo.training.source import read_source
from octavo.training.task import flatten

WINDOWS = 384  # places in a text, unless told otherwise: what a run validates on
STRETCH_BYTES = (1024, 4096)  # shorter ones would hang together, longer ones be too few


@dataclass(frozen=True)
class Windows:
    """The same windows for every run; a figure is the nats of one window."""

    x: np.ndarray
    y: np.ndarray
    text: str
    """What was read, in words."""
    remark: str = ""
    unit: str = "nats a token"
    units: str = "windows"

    @property
    def weights(self) -> np.ndarray:
        """Tokens scored in each window (N,)."""
        return (self.y != -100).sum(1)

    def figures(self, lm: LanguageModel) -> np.ndarray:
        """What each window costs this model (N,)."""
        nats = token_nats(lm.model, self.x, self.y, eot_id=_mask_id(lm))
        return nats.sum(1, dtype=np.float64)


@dataclass(frozen=True)
class Stretches:
    """The same bytes for every run, whatever its tokens; a figure is the bits of one stretch."""

    passage: str
    edges: np.ndarray
    """Where the stretches begin and end, in bytes (N + 1,)."""
    text: str
    remark: str
    unit: str = "bits a byte"
    units: str = "stretches"

    @property
    def weights(self) -> np.ndarray:
        """Bytes in each stretch (N,)."""
        return np.diff(self.edges)

    def figures(self, lm: LanguageModel) -> np.ndarray:
        """What each stretch costs this model (N,); a token across an edge is divided by bytes."""
        ids, ends = _token_ends(lm, self.passage)
        x, y = strided_windows(ids, lm.config.block_size, max(lm.config.block_size // 2, 1))
        nats = token_nats(lm.model, x, y)[y != -100]  # one for each token but the first
        total = np.concatenate(([0.0], np.cumsum(nats, dtype=np.float64)))
        return np.diff(np.interp(self.edges, ends, total)) / math.log(2)


Ruler = Windows | Stretches


def make_ruler(
    models: Sequence[LanguageModel], text: str | None = None, count: int | None = None
) -> Ruler:
    """What all ``models`` can be judged by alike: a text file, or what they were validated on.

    ``count`` windows or stretches are taken where the text has as many; without it as many as the
    runs validated on. Raises `ConfigError` where the validation texts differ or there is none.
    """
    count = count or max((lm.run.config.eval.windows if lm.run else WINDOWS) for lm in models)
    tokenizers = {lm.tokenizer.fingerprint if lm.has_tokenizer else "ids" for lm in models}
    alike = len(tokenizers) == len({lm.config.block_size for lm in models}) == 1
    differing = "tokenizers" if len(tokenizers) > 1 else "contexts"
    remark = f"the runs have different {differing}, so they are compared in bits a byte"
    if text is not None:
        passage = read_corpus(text).text
        if alike:
            tokens = models[0].tokenizer.encode_array(passage)
            return _windows(models, tokens, count, text)
        return _stretches(models, passage, count, text, remark)
    parts = [_validation_tokens(lm) for lm in models]
    if alike:
        rulers = [_windows(models, tokens, count, name) for tokens, name in parts]
        first = rulers[0]
        if all(np.array_equal(first.y, other.y) for other in rulers[1:]):
            return first
        remark = "the runs validated on different parts of a text; this is what they share"
    most = count * STRETCH_BYTES[1]
    named = [
        (_text_of(lm, tokens[-most:]), name)
        for lm, (tokens, name) in zip(models, parts, strict=True)
    ]
    shortest, name = min(named, key=lambda pair: len(pair[0]))
    for other, other_name in named:
        if not other.endswith(shortest):
            raise ConfigError(
                "the runs validated on different texts: "
                f"{name} with the SHA-256 {_sha256(shortest)}, "
                f"{other_name} with {_sha256(other)}",
                fix="judge both on one that neither learned from: --text FILE",
            )
    return _stretches(models, shortest, count, name, remark)


def find_runs(word: str) -> list[str]:
    """The runs that a word names: one, several joined by commas, a glob, or a folder of runs."""
    path = Path(word)
    if path.is_dir():
        one = Run.find(path) or (path / "config.json").is_file()
        inside = [] if one else [str(p.parent) for p in sorted(path.glob("*/config.yaml"))]
        return inside or [word]
    if "," in word:
        return [run for part in word.split(",") if part for run in find_runs(part)]
    if has_magic(word):
        found = [match for match in sorted(glob(word)) if Run.find(Path(match))]
        if not found:
            raise ConfigError(f"no run is called {word}", fix="put the pattern between quotes")
        return found
    return [word]


def check_side(models: Sequence[LanguageModel]) -> list[str]:
    """Remarks about runs that stand for one method; `ConfigError` where one counts twice, or sorts
    texts.
    """
    seen: dict[str, Path | None] = {}
    for lm in models:
        if lm.run and lm.run.config.finetune.labels:
            raise ConfigError(
                f"{lm.home} is a classifier, which finds no text likely",
                fix="octavo eval tells how often it is right",
            )
        digest = weights_sha256(lm.checkpoint) if lm.checkpoint else str(lm.home)
        if digest in seen:
            raise ConfigError(
                f"{seen[digest]} and {lm.home} are the same weights", fix="name each run once"
            )
        seen[digest] = lm.home
    settings = [flatten(lm.run.config) for lm in models if lm.run]
    free = ("train.seed", "train.device", "log.", "eval.", "checkpoint.")
    differing = [
        key
        for key in (settings[0] if settings else {})
        if not key.startswith(free) and any(other[key] != settings[0][key] for other in settings)
    ]
    if not differing:
        return []
    return [f"{models[0].home} and its fellows differ in more than the seed: {differing[0]}"]


def _windows(
    models: Sequence[LanguageModel], tokens: np.ndarray | Tokens, count: int, text: str
) -> Windows:
    """Windows that do not overlap: what is counted twice is no more evidence."""
    size = models[0].config.block_size
    masked = next((lm for lm in models if _mask_id(lm) is not None), models[0])
    count = max(min(count, (len(tokens) - 1) // size), 1)
    return Windows(*fixed_windows(tokens, size, count, _mask_id(masked)), text=text)


def _stretches(
    models: Sequence[LanguageModel], passage: str, count: int, text: str, remark: str
) -> Stretches:
    shortest, longest = STRETCH_BYTES
    passage = passage.encode()[: count * longest].decode(errors="ignore")
    begin = max(int(_token_ends(lm, passage)[1][0]) for lm in models)  # a first token is given
    size = len(passage.encode()) - begin
    if size < 2 * shortest:
        raise DataError(
            f"two stretches of {shortest} bytes are wanted, the text has {size} bytes",
            f"in {text}",
            "give a longer one: --text FILE",
        )
    edges = np.linspace(begin, begin + size, min(count, size // shortest) + 1).round()
    return Stretches(passage, edges, text, remark)


def _validation_tokens(lm: LanguageModel) -> tuple[np.ndarray | Tokens, str]:
    """The tokens that a run was validated on, and the name of their text."""
    config = lm.run.config if lm.run else None
    if lm.run is None or config is None or config.data.source is None:
        raise ConfigError(
            f"{lm.home} came from elsewhere, without a validation text", fix="use --text FILE"
        )
    if config.data.kind != "text":
        raise ConfigError(
            f"{lm.home} learned from records, of which no two runs have the same windows",
            fix="use --text FILE",
        )
    source = read_source(config, lm.run.path, lm.run.tokenizer)
    if not len(source.val):
        raise ConfigError(f"{lm.home} has no validation text", fix="use --text FILE")
    apart = config.data.val_source
    return source.val, str(apart) if apart else f"the validation part of {source.data['name']}"


def _text_of(lm: LanguageModel, tokens: np.ndarray | Tokens) -> str:
    """The text that tokens came from: documents with a blank line between two."""
    tokens, eot = np.asarray(tokens), lm.tokenizer.eot_id
    parts = np.split(tokens, np.flatnonzero(tokens == eot))
    documents = [lm.tokenizer.decode(part[part != eot]) for part in parts]
    return "\n\n".join(documents).lstrip("\ufffd")


def _token_ends(lm: LanguageModel, passage: str) -> tuple[np.ndarray, np.ndarray]:
    """A text's ids (T,) and the byte after each; `DataError` where tokens lose bytes."""
    try:
        ids = lm.tokenizer.encode_array(passage)
    except DataError as error:
        raise DataError(error.what, f"{error.where}, for {lm.home}", error.fix) from None
    ends = lm.tokenizer.byte_lengths()[ids].cumsum()
    off = len(passage.encode()) - int(ends[-1])
    if off not in (0, -1):  # Llama's tokenizer puts a blank in front
        raise DataError(
            f"the tokenizer of {lm.home} does not keep every byte of this text",
            fix="bits a byte compare only models that could give the text back",
        )
    return ids, ends + off


def _mask_id(lm: LanguageModel) -> int | None:
    """The end-of-text token that this run's attention does not cross, if it was trained so."""
    masked = lm.run is not None and lm.run.config.data.mask_documents
    return lm.tokenizer.eot_id if masked and lm.has_tokenizer else None


def _sha256(text: str) -> str:
    return sha256(text.encode()).hexdigest()
