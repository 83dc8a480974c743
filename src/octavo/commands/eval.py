"""`octavo eval`: judge a model."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from octavo.commands.shared import Option, one_run, print_facts
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.language_model import LanguageModel

WORDS = "RUN"
TAKES_SETTINGS = False
PAGE = """\
How surprised is a model by a text: nats a token, perplexity, bits a byte. A classifier: how often
it is right.

  octavo eval runs/my                             on the text it was validated on
  octavo eval runs/my --perplexity other.txt      on any text, however long"""


def add_options(option: Option) -> None:
    """What may be typed besides the words."""
    option("--perplexity", metavar="FILE", help="the text; default: the run's own validation part")
    option(
        "--stride", type=int, metavar="N", help="tokens between windows; default: half a context"
    )
    option("--base", metavar="RUN", help="where an adapter's base is, if it was moved")
    option("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto")
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
    from octavo.language_model import load

    lm = load(one_run(args.words), device=args.device, base=args.base)
    if lm.run and lm.run.config.finetune.labels:
        print_facts(_of_labels(lm, args.perplexity), args.json)
        return
    if args.perplexity:
        from octavo.text.corpus import read_corpus

        text = read_corpus(args.perplexity).text
        score, name = lm.score(text, args.stride), args.perplexity
    else:
        from octavo.training.task import score_validation

        score, name = score_validation(lm), "the run's validation windows"
    facts = {
        "text": name,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }
    print_facts(facts, args.json)


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
