"""What Python users hold: a model and its tokenizer, loaded from a run, that write and judge text.

Nothing here imports torch until something needs it.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from octavo.checkpoint import Run, weights_sha256
from octavo.config import FinetuneConfig, ModelConfig
from octavo.errors import CheckpointError, ConfigError, DataError
from octavo.generating.choosing import ENGINES, choose_device, native_model
from octavo.generating.sampling import Sampling, make_sampling
from octavo.generating.speculative import (
    HOPED_READING,
    LookupDrafter,
    ModelDrafter,
    Pace,
    SpeculativeEngine,
)
from octavo.generating.writing import Engine, complete, start_ids, write
from octavo.model.counts import count_parameters
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.adapting.classify import Prediction
    from octavo.evaluating.perplexity import Score
    from octavo.generating.engine import TorchEngine
    from octavo.generating.native import NativeEngine, NativeModel
    from octavo.model.gpt import GPT

LARGEST_BATCH = 16  # rows written side by side
DRAFT = "draft"  # where a run keeps the tiny model trained beside it, a run itself


def load(
    path: Path | str,
    device: str = "auto",
    base: Path | str | None = None,
    speculate: str | None = None,
    weights: str | None = None,
    engine: str | None = None,
) -> "LanguageModel":
    """Load a run directory, one of its checkpoints, or a Hugging Face model directory.

    A run gives its best checkpoint if it has been validated, else its latest. An adapter's base is
    found by the path in its run, or at ``base`` if it was moved. ``speculate`` says what proposes
    tokens, see `LanguageModel.speculate`. ``weights`` takes what `octavo quantize` has packed, by
    its precision. ``engine`` is what writes: native, torch, or auto, which takes native for a run
    on the CPU (default: OCTAVO_ENGINE, else auto). Raises `ConfigError` where ``path`` is none of
    these and `CheckpointError` where a file is damaged or the base another.
    """
    path = Path(path)
    engine = engine or os.environ.get("OCTAVO_ENGINE") or "auto"
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}", fix=f"known: {', '.join(ENGINES)}")
    if (path / "config.json").is_file():
        from octavo.exchanging.huggingface import from_huggingface

        if weights or engine == "native":
            fix = f"octavo import {path} RUN"
            raise ConfigError("only runs have packed weights and the native engine", fix=fix)
        has_tokenizer = (path / "tokenizer.json").is_file()
        model = from_huggingface(path).to(choose_device(device))
        tokenizer = Tokenizer.load(path) if has_tokenizer else None
        lm = LanguageModel(model.config, tokenizer, model=model, home=path)
        lm.speculate(speculate)
        return lm
    run = Run.open(path)
    checkpoint = run.best or run.latest
    if checkpoint is None:
        raise ConfigError(
            f"{path} holds no checkpoint yet", fix=f"train it: octavo train {path} --resume"
        )
    lm = LanguageModel(
        run.config.model,
        run.tokenizer,
        run=run,
        checkpoint=checkpoint,
        device=device,
        weights=weights,
        engine=engine,
    )
    finetune = run.config.finetune
    if finetune.base and (run.config.lora.rank or finetune.head_only) and not weights:
        lm.base = load_base(finetune, base)
    lm.speculate(speculate)
    return lm


def load_base(finetune: FinetuneConfig, moved: Path | str | None = None) -> "LanguageModel":
    """The model that a fine-tuned run begins with, with exactly the weights it began with."""
    path = Path(moved or finetune.base or "")
    run = Run.find(path)
    if run is None:
        raise ConfigError(
            f"the base {path} is not there", fix="say where it is with --base RUN, or base=RUN"
        )
    wanted = finetune.base_sha256
    candidates = [found for found in (run.best, run.latest, *run.checkpoints) if found]
    hashes = {found: weights_sha256(found) for found in candidates}
    for checkpoint, sha256 in hashes.items():
        if sha256 == wanted or not wanted:
            return LanguageModel(
                run.config.model, run.tokenizer, run=run, checkpoint=checkpoint, device="cpu"
            )
    raise CheckpointError(
        f"this was trained on a base with the SHA-256 {wanted}",
        f"{path} has {', '.join(hashes.values()) or 'no checkpoint'}",
        "name the right base with --base RUN, or base=RUN",
    )


class LanguageModel:
    """A trained model: ``.generate .stream .logits .score``, and ``.model .tokenizer .config``."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        model: "GPT | None" = None,
        run: Run | None = None,
        checkpoint: Path | None = None,
        device: str = "auto",
        home: Path | None = None,
        weights: str | None = None,
        engine: str = "auto",
    ) -> None:
        """Give either a ``model`` or the ``run`` and ``checkpoint`` it is read from when needed.

        ``home`` is the directory it came from, a run's own where there is one; ``weights`` and
        ``engine`` as in `load`.
        """
        self.config, self.run, self.checkpoint, self.device = config, run, checkpoint, device
        self.weights, self.engine = weights, engine
        self._tokenizer = tokenizer
        self.home = run.path if run else home
        self.base: LanguageModel | None = None
        self.draft: LanguageModel | None = None
        self.pace: Pace | None = None
        if model is not None:
            self.model = model.eval()

    @cached_property
    def model(self) -> "GPT":
        """The PyTorch module, in evaluation mode; a `Classifier` where a run sorts texts.

        It may be changed: once it was asked for it is what writes, unless an engine or packed
        weights were chosen.
        """
        from octavo.adapting.assemble import assemble, load_trained

        assert self.run is not None
        assert self.checkpoint is not None
        if self.weights:
            from octavo.adapting.quantize import load_quantized

            return load_quantized(self.run, self.weights).to(choose_device(self.device))
        model = assemble(self.run.config, self.base.model if self.base else None)
        load_trained(model, self.run.load(self.checkpoint).model_tensors())
        return cast("GPT", model.to(choose_device(self.device)).eval())

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; a `ConfigError` for a model that takes and gives ids only."""
        if self._tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer: it takes and gives ids",
                fix="use generate_ids, or put a tokenizer.json beside it",
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether it takes and gives texts, not only ids."""
        return self._tokenizer is not None

    def generate(
        self,
        text: str | Sequence[str] | None = None,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        n: int = 1,
        **sampling: Any,
    ) -> str | list[str]:
        """Write on from ``text``: the continuation, without the prompt.

        A list of texts, or ``n`` > 1 copies of one, gives a list, prompt by prompt. ``sampling``
        holds fields of `Sampling`, or ``preset``. Without a text the model starts a new one.
        """
        prompts = [text] if text is None or isinstance(text, str) else list(text)
        rows = complete(*self._prepare(prompts, n, sampling), max_new_tokens, stop, n)
        return rows[0] if n == 1 and (text is None or isinstance(text, str)) else rows

    def stream(
        self,
        text: str | None = None,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Like `generate`, in pieces of whole characters as they are written."""
        for piece in write(*self._prepare([text], 1, sampling), max_new_tokens, stop):
            if piece.text:
                yield piece.text

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 200, **sampling: Any
    ) -> list[list[int]]:
        """The new ids after each prompt's ids; stops early only at the end-of-text token."""
        rows: list[list[int]] = [[] for _ in prompts]
        settings = make_sampling(**sampling)
        engine = self._engine(len(prompts))
        for piece in write(engine, self._tokenizer, prompts, settings, max_new_tokens):
            if piece.id is not None:
                rows[piece.row].append(piece.id)
        return rows

    def speculate(self, how: str | None) -> None:
        """Choose what proposes the next tokens when this writes; the text is the same either way.

        "off": nothing; "lookup": what followed the last tokens where they stood before; the path
        of a run: the smaller model there; "auto": the draft trained beside this run, else lookup.
        None is the draft where there is one, else nothing. What does not pay is left alone, and
        ``pace.report()`` says how it went. Raises `DataError` for a draft with another tokenizer.
        """
        self.draft = self.pace = None
        if how in (None, "auto"):
            own = Run.find(self.run.path / DRAFT) if self.run else None
            how = str(own.path) if own and own.latest else "lookup" if how else "off"
        if how == "off":
            return
        if how != "lookup":
            if not Path(how).exists():
                raise ConfigError(f"there is no draft {how}", fix="give off, lookup, auto or a run")
            self.draft = load(how, self.device, speculate="off", engine=self.engine)
            check_same_tokens(self, self.draft)
        self.pace = Pace()
        if self.draft:
            small, large = (count_parameters(lm.config).total for lm in (self.draft, self))
            self.pace.reading = HOPED_READING * small / large

    def make_ready(self) -> None:
        """Load now what the first text would load, so that it begins at once."""
        self._engine(1)

    def classify(self, texts: Sequence[str]) -> "list[Prediction]":
        """The likeliest label of each text and the probability of every label.

        Raises `ConfigError` for a model that writes.
        """
        from octavo.adapting.classify import Classifier, classify

        if not isinstance(self.model, Classifier):
            raise ConfigError(
                "this model writes, it has no labels", fix="octavo finetune RUN DATA.csv --labels"
            )
        return classify(self.model, self.tokenizer, texts)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits (T, V) after each of ``ids`` (T,), fp32; the text must fit block_size."""
        import torch

        if not 0 < len(ids) <= self.config.block_size:
            raise ConfigError(
                f"{len(ids)} ids do not fit a context of {self.config.block_size}",
                fix="give between 1 and block_size ids",
            )
        model = self.model
        batch = torch.tensor([list(ids)], device=model.tok_emb.weight.device)
        with torch.inference_mode():
            return model(batch)[0].float().cpu().numpy()

    def score(self, text: str, stride: int | None = None) -> "Score":
        """How surprised the model is by ``text``: nats, tokens and bytes.

        The first token is given. Longer texts are read in windows of block_size that move by
        ``stride`` (default: half a window), each token scored once.
        """
        from octavo.evaluating.perplexity import score_windows, strided_windows

        ids = self.tokenizer.encode_array(text)
        if len(ids) < 2:
            raise ConfigError("a text to score needs at least two tokens", f"it has {len(ids)}")
        block_size = self.config.block_size
        windows = strided_windows(ids, block_size, stride or max(block_size // 2, 1))
        return score_windows(self.model, *windows, self.tokenizer.byte_lengths())

    def _prepare(
        self, prompts: Sequence[str | None], n: int, sampling: dict[str, Any]
    ) -> tuple[Engine, Tokenizer, list[list[int]], Sampling]:
        """The first four arguments of `write`."""
        settings = make_sampling(**sampling)
        ids = [start_ids(self.tokenizer, prompt) for prompt in prompts]
        return self._engine(len(ids) * n), self.tokenizer, ids, settings

    def _engine(self, rows: int) -> Engine:
        """What writes so many rows, with drafts where they were chosen."""
        slots = min(rows, LARGEST_BATCH)
        engine = self.open_engine(slots)
        if self.pace is None:
            return engine
        draft = ModelDrafter(self.draft.open_engine(slots)) if self.draft else LookupDrafter()
        return SpeculativeEngine(engine, draft, self.config.block_size, self.pace)

    def open_engine(self, slots: int) -> "NativeEngine | TorchEngine":
        """An engine of its own that writes so many rows at once, without drafts.

        Raises `ConfigError` for a model that sorts texts.
        """
        vocab = self._tokenizer.vocab_size if self._tokenizer else self.config.vocab_size
        changeable = "model" in vars(self) and self.engine == "auto" and not self.weights
        if not changeable and self._native is not None:
            from octavo.generating.native import NativeEngine

            return NativeEngine(self._native, slots, vocab)
        from octavo.adapting.classify import Classifier
        from octavo.generating.engine import TorchEngine

        if isinstance(self.model, Classifier):
            raise ConfigError(
                "this model sorts texts, it does not write", fix="octavo eval RUN, or .classify"
            )
        return TorchEngine(self.model, slots, vocab)

    @cached_property
    def _native(self) -> "NativeModel | None":
        if self.run is None or self.checkpoint is None:
            return None
        return native_model(self.run, self.checkpoint, self.device, self.weights, self.engine)


def check_same_tokens(lm: LanguageModel, draft: LanguageModel) -> None:
    """Raise `DataError` where the ids of the two mean different things."""
    hashes = [
        m.tokenizer.fingerprint if m.has_tokenizer else f"of none, for {m.config.vocab_size} ids"
        for m in (lm, draft)
    ]
    if hashes[0] != hashes[1]:
        raise DataError(
            f"the draft's tokenizer has the SHA-256 {hashes[1]}, the model's {hashes[0]}",
            f"in {draft.home}",
            "octavo train RUN --draft trains one that fits",
        )
