"""`octavo export`: a model leaves for the tools of others."""

from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, add_common, exactly, print_facts
from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    import numpy as np

    from octavo.language_model import LanguageModel
    from octavo.text.tokenizer import Tokenizer

WORDS = "RUN PATH"
PAGE = """\
A run leaves for the tools of others, checked by their own code before it does.

  octavo export runs/my --to hf my-model            for AutoModelForCausalLM, AutoTokenizer, vLLM
  octavo export runs/my --to gguf my.gguf           for llama.cpp, Ollama, LM Studio
  octavo export runs/my --to gguf my.gguf --type Q8_0
  octavo export runs/my-voice --to peft my-voice    an adapter, for PEFT

Nothing appears unless what was written computes the same logits (and greedy text and perplexity)
when their code reads it; otherwise the exit code is 8. A Hugging Face directory holds a model card
with the run's numbers."""


def add_options(option: Option) -> None:
    option("--to", choices=["hf", "gguf", "peft"], required=True, help="whose format")
    option("--type", choices=["F32", "F16", "Q8_0", "Q4_0"], default="F16", help="GGUF's numbers")
    option("--architecture", metavar="C", help="a class of transformers; default: the first to fit")
    option("--force", action="store_true", help="write over an earlier export")
    add_common(option, "base", "json")


def run(args: Namespace, settings: list[str]) -> None:
    source, target = exactly(args.words, WORDS, f"octavo export RUN --to {args.to} PATH")
    from octavo.exchanging.staging import refuse_occupied
    from octavo.language_model import load

    refuse_occupied(Path(target), args.force)
    lm = load(source, device="cpu", base=args.base)
    match args.to:
        case "hf":
            facts = to_huggingface(lm, target, args.architecture, args.force)
        case "gguf":
            facts = _to_gguf(lm, target, args)
        case _:
            facts = _to_peft(lm, target, args)
    print_facts({"path": target, **facts}, args.json)


def to_huggingface(
    lm: "LanguageModel",
    directory: Path | str,
    architecture: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write ``lm`` as a directory that transformers loads in one step; return the parity figures.

    Raises `ConfigError` where no stock class holds the model or something lies at ``directory``,
    and `ParityError` where transformers computes something else; then nothing is left.
    """
    from octavo.exchanging.exporting import export_huggingface
    from octavo.exchanging.model_card import facts_of
    from octavo.exchanging.tokenizer_config import read_settings

    tokenizer = lm.tokenizer if lm.has_tokenizer else None
    rows, text = comparison_rows(lm, tokenizer)
    return export_huggingface(
        lm.model,
        tokenizer,
        directory,
        rows,
        text,
        name=lm.home.resolve().name if lm.home else "model",
        facts=facts_of(lm.run, lm.checkpoint) if lm.run and lm.checkpoint else {},
        tokenizer_config=read_settings(lm.home) if lm.home else {},
        architecture=architecture,
        force=force,
    )


def _to_gguf(lm: "LanguageModel", target: str, args: Namespace) -> dict[str, Any]:
    from octavo.exchanging.gguf import export_gguf

    rows, text = comparison_rows(lm, lm.tokenizer)
    return export_gguf(
        lm.model, lm.tokenizer, target, rows, text, kind=args.type, architecture=args.architecture
    )


def _to_peft(lm: "LanguageModel", target: str, args: Namespace) -> dict[str, Any]:
    from octavo.exchanging.peft import to_peft

    if lm.base is None or lm.base.run is None:
        raise ConfigError(f"{lm.home} has no adapter", fix="name a run of octavo finetune")
    base = lm.base.run.path.name
    difference = to_peft(lm.model, "default", target, base, args.architecture, args.force)
    return {"base": base, "difference_to_peft": difference}


def comparison_rows(lm: "LanguageModel", tokenizer: "Tokenizer | None") -> tuple["np.ndarray", str]:
    """Ids (N, T + 1) to compare on, and what they are: validation text where it is at hand."""
    from octavo.exchanging.parity import random_rows
    from octavo.training.task import check_same_text, prepare

    if lm.run and tokenizer and lm.run.config.data.source is not None:
        with suppress(OctavoError):  # the text is elsewhere by now, or another
            task = prepare(lm.run.config, "cpu", lm.run.path, tokenizer)
            check_same_text(task, lm.run.path)
            if task.val is not None and lm.config.block_size > 1:
                return task.val[0], "the run's validation text"
    vocab_size = tokenizer.vocab_size if tokenizer else lm.config.vocab_size
    return random_rows(vocab_size, lm.config.block_size, tokenizer), "random ids"
