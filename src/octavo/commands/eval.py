"""`octavo eval`: judge a model."""

import dataclasses
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, add_common, one_run, print_facts, progress
from octavo.errors import ConfigError
from octavo.studies.readable import aligned

if TYPE_CHECKING:
    from octavo.language_model import LanguageModel

WORDS = "RUN"
PAGE = """\
How surprised is a model by a text: nats a token, perplexity, bits a byte. Which of four endings
does it find likeliest (HellaSwag), or any task of lm-evaluation-harness. A classifier: how often it
is right.

  octavo eval runs/my                             on the text it was validated on
  octavo eval runs/my --perplexity other.txt      on any text, however long
  octavo eval runs/my --hellaswag                 as build-nanogpt scores it
  octavo eval runs/my --hellaswag FILE.jsonl --protocol harness --limit 1000
  octavo eval runs/my --tasks arc_easy,piqa       what lm_eval finds (pip install "octavo[eval]")
  octavo eval runs/my --lengths                   does it read further than it was trained to"""


def add_options(option: Option) -> None:
    option("--perplexity", metavar="FILE", help="the text; default: the run's own validation part")
    option(
        "--stride", type=int, metavar="N", help="tokens between windows; default: half a context"
    )
    option(
        "--hellaswag",
        nargs="?",
        const="download",
        metavar="FILE",
        help="HellaSwag's items, .jsonl or .jsonl.gz; default: the official ones, downloaded",
    )
    option(
        "--protocol",
        choices=("completion", "harness"),
        help="completion (the default): no label, mean log-probability a token, as build-nanogpt; "
        "harness: as lm-evaluation-harness",
    )
    option("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness, or their .yaml files")
    option(
        "--lengths",
        action="store_true",
        help="perplexity of the same tokens after up to 4 contexts, RoPE plain and stretched",
    )
    option("--limit", type=int, metavar="N", help="only the first N items, of each task")
    add_common(option, "base", "device", "json")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.language_model import load

    _check(args)
    lm = load(one_run(args.words), device=args.device, base=args.base)
    if args.hellaswag:
        _hellaswag(lm, args)
    elif args.tasks:
        _tasks(lm, args)
    elif args.lengths:
        _lengths(lm, args)
    elif lm.run and lm.run.config.finetune.labels:
        print_facts(_of_labels(lm, args.perplexity), args.json)
    else:
        print_facts(_perplexity(lm, args), args.json)


def _check(args: Namespace) -> None:
    """Refuse options that would have no effect."""
    names = ("lengths" if args.lengths else "perplexity", "hellaswag", "tasks")
    judges = [name for name in names if getattr(args, name)]
    if len(judges) > 1:
        raise ConfigError(f"one judge at a time: --{' or --'.join(judges)}", fix="ask twice")
    if args.protocol and not args.hellaswag:
        raise ConfigError("--protocol is HellaSwag's", fix="add --hellaswag")
    if args.limit is not None and not (args.hellaswag or args.tasks):
        raise ConfigError("--limit counts items", fix="add --hellaswag or --tasks")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit} leaves no item", fix="give 1 or more")


def _perplexity(lm: "LanguageModel", args: Namespace) -> dict[str, Any]:
    """How surprised it is by a text."""
    if args.perplexity:
        from octavo.text.corpus import read_corpus

        text = read_corpus(args.perplexity).text
        score, name = lm.score(text, args.stride), args.perplexity
    else:
        from octavo.training.task import score_validation

        score, name = score_validation(lm), "the run's validation windows"
    facts = {"text": name, "loss": score.loss, "perplexity": score.perplexity}
    if score.bytes:  # a model of ids knows no bytes
        facts["bits_per_byte"] = score.bits_per_byte
    return {**facts, "tokens": score.tokens, "bytes": score.bytes}


def _lengths(lm: "LanguageModel", args: Namespace) -> None:
    """Perplexity by context length and way of stretching."""
    from octavo.adapting.classify import Classifier
    from octavo.evaluating.lengths import measure_lengths
    from octavo.text.corpus import read_corpus
    from octavo.training.task import validation_tokens

    if isinstance(lm.model, Classifier):
        raise ConfigError("a classifier has no perplexity", fix="leave --lengths out")
    if args.perplexity:
        tokens = lm.tokenizer.encode_array(read_corpus(args.perplexity).text)
    else:
        tokens = validation_tokens(lm)
    with progress("contexts") as watch:
        found = measure_lengths(lm.model, tokens, watch=watch)
    lengths = sorted({length for row in found.perplexity.values() for length in row})
    rows = [["", *(f"{length:,}" for length in lengths)]]
    rows += [[way, *(_short(row.get(n)) for n in lengths)] for way, row in found.perplexity.items()]
    said = [f"perplexity of the same {found.tokens:,} tokens after a context of"]
    said += [*aligned(rows, "<" + ">" * len(lengths)), *found.remarks]
    print_facts(dataclasses.asdict(found), args.json, "\n".join(said))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _hellaswag(lm: "LanguageModel", args: Namespace) -> None:
    """Which of four endings it finds likeliest."""
    from octavo.evaluating.hellaswag import HellaSwag, read_items

    items = read_items(args.hellaswag, args.limit or 0)
    with progress("HellaSwag") as watch:
        judge = HellaSwag(items, lm.tokenizer, args.protocol or "completion")
        score = judge.score(lm.model, watch)
    print_facts(score.to_dict(), args.json, "\n".join([score.line(), *score.remarks]))


def _tasks(lm: "LanguageModel", args: Namespace) -> None:
    """What lm_eval finds."""
    from octavo.evaluating.harness import as_table, run_tasks

    found = run_tasks(lm.model, lm.tokenizer, args.tasks.split(","), args.limit)
    print_facts(found["results"], args.json, as_table(found))


def _of_labels(lm: "LanguageModel", text: str | None) -> dict[str, Any]:
    """A classifier's figures on its validation texts."""
    from octavo.training.task import judge_validation

    if text:
        raise ConfigError("a classifier has no perplexity", fix="leave --perplexity out")
    found = judge_validation(lm).to_dict()  # which for which is a picture: confusion.png in the run
    f1 = {label: each["f1"] for label, each in found["labels"].items()}
    return {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "f1": f1}
