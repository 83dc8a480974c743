"""`octavo eval`: judge a model."""

import dataclasses
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, one_run, print_facts, progress
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.language_model import LanguageModel

WORDS = "RUN"
TAKES_SETTINGS = False
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
    """What may be typed besides the words."""
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
    option("--base", metavar="RUN", help="where an adapter's base is, if it was moved")
    option("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto")
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
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
    if args.json:
        print_facts(dataclasses.asdict(found), as_json=True)
        return
    print(f"perplexity of the same {found.tokens:,} tokens after a context of")
    lengths = sorted({length for row in found.perplexity.values() for length in row})
    print(" " * 12 + "".join(f"{length:>10,}" for length in lengths))
    for way, row in found.perplexity.items():
        print(f"{way:<12}" + "".join(f"{_short(row.get(length)):>10}" for length in lengths))
    for remark in found.remarks:
        print(remark)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _hellaswag(lm: "LanguageModel", args: Namespace) -> None:
    """Which of four endings it finds likeliest."""
    from octavo.evaluating.hellaswag import read_items, score_hellaswag

    items = read_items(args.hellaswag, args.limit or 0)
    with progress("HellaSwag") as watch:
        score = score_hellaswag(lm, items, args.protocol or "completion", watch)
    print_facts(score.to_dict() if args.json else score.summary(), args.json)


def _tasks(lm: "LanguageModel", args: Namespace) -> None:
    """What lm_eval finds."""
    from octavo.evaluating.harness import as_table, run_tasks

    found = run_tasks(lm, args.tasks.split(","), args.limit)
    if args.json:
        print_facts(found["results"], as_json=True)
    else:
        print(as_table(found))


def _of_labels(lm: "LanguageModel", text: str | None) -> dict[str, Any]:
    """A classifier's figures on its validation texts."""
    from octavo.training.task import judge_validation

    if text:
        raise ConfigError("a classifier has no perplexity", fix="leave --perplexity out")
    figures = judge_validation(lm).to_dict()
    labels = figures.pop("labels")
    f1 = {label: each["f1"] for label, each in labels.items()}
    del figures["confusion"]  # its picture says more: confusion.png in the run
    return {**figures, "f1": f1}
