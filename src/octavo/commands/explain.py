"""`octavo explain`: a page on what a model makes of a text."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.commands.shared import Option, add_common, one_run, print_facts
from octavo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from octavo.language_model import LanguageModel

WORDS = "RUN"
PAGE = """\
See what a model makes of a text, token by token, on one page that opens offline: how probable each
token was, what else was expected, what each layer would have said and each head looks at, and which
spans stand word for word in the text it learned from.

  octavo explain runs/my --text "To be, or not to be" --out page.html
  octavo explain runs/my --file chapter.txt --out page.html
  octavo explain runs/my --prompt "To be" --max-new-tokens 100     what it writes, explained
  octavo explain runs/my --file essay.txt --corpus books/          look spans up somewhere else

RUN may be a Hugging Face directory. A model without a tokenizer takes ids: --text "17 4 92".
A text longer than the context is read in windows, as when the model writes."""


def add_options(option: Option) -> None:
    option("--text", metavar="TEXT", help="the text")
    option("--file", metavar="FILE", help="the text, from a file; - is standard input")
    option("--prompt", metavar="TEXT", help="let the model write on from this, and explain both")
    option("--max-new-tokens", type=int, default=100, metavar="N", help="how much it writes; 100")
    option("--preset", default="nucleus", metavar="P", help="conservative, nucleus or greedy")
    option("--seed", type=int, default=1337, metavar="N", help="same seed, same text")
    option("--out", default="explain.html", metavar="FILE", help="the page; default: explain.html")
    option("--corpus", metavar="FILE", help="look spans up here; default: the run's training text")
    add_common(option, "weights", "base", "device", "json")


def run(args: Namespace, settings: list[str]) -> None:
    if sum(given is not None for given in (args.text, args.file, args.prompt)) != 1:
        raise ConfigError("which text?", fix="give one of --text, --file and --prompt")
    from octavo.disk import write_atomic
    from octavo.explaining.explained import explain
    from octavo.explaining.token_page import notes, render
    from octavo.language_model import load

    lm = load(one_run(args.words), args.device, args.base, weights=args.weights)
    if args.prompt is not None:
        ids = read_ids(lm, args.prompt)
        preset = {"preset": args.preset, "seed": args.seed}
        [new] = lm.generate_ids([ids], args.max_new_tokens, **preset)
    else:
        ids, new = read_ids(lm, text_of(args.text, args.file)), []
    page = explain(lm, ids + new, len(new), args.corpus)
    write_atomic(Path(args.out), render(page).encode("utf-8"))
    reading = page.reading
    facts = {
        "page": args.out,
        "tokens": len(reading.ids),
        "written": page.written,
        "left_out": page.left_out,
        "perplexity": 2**reading.bits if len(reading.ids) > 1 else None,
        "longest_verbatim": page.longest if page.source.documents else None,
        "verbatim_share": round(page.verbatim, 4) if page.source.documents else None,
        "remarks": notes(page),
    }
    print_facts({name: fact for name, fact in facts.items() if fact is not None}, args.json)


def text_of(text: str | None, file: str | None) -> str:
    """The text given, or the one in a file."""
    if file is None:
        return text or ""
    from octavo.text.files import decode, read_bytes

    path = Path("standard input" if file == "-" else file)
    return decode(sys.stdin.buffer.read() if file == "-" else read_bytes(path), path)


def read_ids(lm: "LanguageModel", text: str) -> list[int]:
    """The ids of a text; of a model without a tokenizer the text holds them as numbers."""
    if lm.has_tokenizer:
        return lm.tokenizer.encode(text)
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        wrong = str(error).rpartition(":")[2].strip()
        raise DataError(
            f"this model takes ids, and {wrong} is none", fix='write numbers: "17 4 92"'
        ) from None
