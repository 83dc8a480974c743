"""The command line: what one types and what one reads. The work is done in the rooms below."""

import argparse
import inspect
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Any, NoReturn

from octavo.errors import ConfigError, OctavoError

# Answered without importing anything: `octavo --help` must be instant.
HELP = """\
octavo: a small, well-bound GPT

usage: octavo COMMAND ...        octavo COMMAND --help        octavo --version

  train     CONFIG.yaml | TEXT... | RUN   learn from a text, or go on with a run
  generate  RUN --prompt TEXT             let a model write
  eval      RUN                           how surprised is it by a text
  plan      CONFIG.yaml | TEXT...         what a run will cost, before it begins

begin with
  octavo train my.txt                     a model of your own text, in runs/my
  octavo generate runs/my --prompt "The " what it has learnt

A RUN is a directory that train writes: configuration, tokenizer, checkpoints, metrics, report.html.
Any setting can follow as section.name=value, e.g. train.max_steps=500 (see octavo train --help).
"""
COMMANDS = ("train", "generate", "eval", "plan")
SETTING = re.compile(r"--[a-z]\w*(\.\w+)+(=.*)?|[a-z]\w*(\.\w+)*=.*", re.DOTALL)
PAGES = {
    "train": """\
Learn from a text, or go on with a run.

  octavo train my.txt                             a model of your own text, in runs/my
  octavo train notes/ 'more/*.md' book.txt        folders, globs and several files
  octavo train posts.jsonl data.field=text        a field of .jsonl or .csv
  cat *.txt | octavo train -                      standard input
  octavo train shakespeare                        a corpus by name: python-docs, shakespeare
  octavo train quickstart.yaml train.max_steps=500 --out runs/short
  octavo train runs/my --resume                   go on where it was stopped

A configuration names only what differs from the defaults below; a text named here wins over the
configuration's. Ctrl-C saves and exits with code 75. The run directory holds report.html.""",
    "generate": """\
Let a model write: prints the continuation of the prompt and nothing else.

  octavo generate runs/my --prompt "The "
  octavo generate runs/my --prompt "The " --temperature 0.8 --top-p 0.9 --stop "."
  octavo generate runs/my --preset greedy --max-new-tokens 50
  octavo generate runs/my --interactive

Without RUN the newest one under runs/ is taken. The same seed writes the same text.
Presets: conservative (temperature 0.6, top-k 40), nucleus (0.8, top-p 0.9), greedy.""",
    "eval": """\
How surprised is a model by a text: nats a token, perplexity, bits a byte.

  octavo eval runs/my                             on the text it was validated on
  octavo eval runs/my --perplexity other.txt      on any text, however long""",
    "plan": """\
What a run will cost, by arithmetic: parameters by group, operations, memory, disk, epochs.

  octavo plan my.txt model.n_layer=12
  octavo plan gpt2-124m.yaml --json""",
}
SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "flatter above 1, sharper below; 0 is greedy"),
    "top_k": (int, "keep the K likeliest tokens; 0 keeps all"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "min_p": (float, "keep tokens at least this share as likely as the likeliest"),
    "typical_p": (float, "keep the tokens closest to the expected surprise"),
    "repetition_penalty": (float, "above 1 makes tokens already there less likely"),
    "presence_penalty": (float, "subtracted once from tokens already written"),
    "frequency_penalty": (float, "subtracted for each time a token was written"),
    "seed": (int, "same seed, same text"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; errors are one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        sys.exit(_dispatch(words))
    except OctavoError as error:
        if debug:
            raise
        _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        _complain("interrupted", 130)
    except BrokenPipeError:  # `octavo generate ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        _complain(f"{what}; this is a bug in octavo; run again with --debug and report it", 1)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        import octavo

        print(f"octavo {octavo.__version__}")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        from octavo.settings import nearest

        guess = nearest(command, COMMANDS)
        fix = f"did you mean octavo {guess}?" if guess else "see octavo --help"
        raise ConfigError(f"unknown command {command!r}", fix=fix)
    run: Callable[[list[str]], None] = globals()[f"_{command}"]
    run(rest)
    return 0


def _train(words: list[str]) -> None:
    parser = _parser("train", "CONFIG.yaml | TEXT... | RUN")
    option = parser.add_argument
    option("--out", metavar="RUN", help="the run directory to write; default: runs/NAME")
    option("--resume", action="store_true", help="go on with the run that is there")
    option("--config", metavar="FILE", help="the same as naming CONFIG.yaml")
    option("--wandb-project", metavar="P", help="log to W&B: log.to=[wandb] log.project=P")
    option("--wandb-run-name", metavar="R", help="log.run_name=R")
    option("--quiet", action="store_true", help="print nothing but errors")
    parser.epilog = _settings_page() if "--help" in words or "-h" in words else None
    args, settings = _parse(parser, words)
    if args.wandb_project:
        settings += ["log.to=[wandb]", f"log.project={args.wandb_project}"]
    if args.wandb_run_name:
        settings.append(f"log.run_name={args.wandb_run_name}")
    from octavo.training.loop import train
    from octavo.training.task import read_request

    request = read_request([*args.words, *([args.config] if args.config else [])], settings)
    out = request.directory(args.out, args.resume)
    resume = args.resume or request.run is not None
    result = train(request.config, out, resume=resume, quiet=args.quiet)
    if not args.quiet:
        print(f"report: {result.run / 'report.html'}")
        print(f"write:  octavo generate {shlex.quote(str(result.run))} --max-new-tokens 300")


def _generate(words: list[str]) -> None:
    parser = _parser("generate", "RUN")
    option = parser.add_argument
    option("--prompt", metavar="TEXT", help="what to write on from; default: begin a new text")
    option("--max-new-tokens", "--max-tokens", type=int, default=200, metavar="N", help="length")
    option(
        "--preset", metavar="P", help="conservative, nucleus or greedy; what follows wins over it"
    )
    for name, (kind, meaning) in SAMPLING.items():
        option("--" + name.replace("_", "-"), type=kind, metavar="X", help=meaning)
    option("--stop", action="append", default=[], metavar="S", help="end before S; may be repeated")
    option("--n", type=int, default=1, metavar="K", help="write K texts")
    option("--stream", action="store_true", help="print as it is written; a terminal always does")
    option("--interactive", action="store_true", help="prompt after prompt; Ctrl-D ends")
    option("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto")
    option("--json", action="store_true", help="print one JSON object")
    args, settings = _parse(parser, words)
    _refuse(settings)
    from octavo.generating.terminal import talk, write_out
    from octavo.language_model import load

    lm = load(_one_run(args.words), device=args.device)
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    options = {"max_new_tokens": args.max_new_tokens, "stop": args.stop, "preset": args.preset}
    if args.interactive:
        talk(lm, options | sampling)
    else:
        write_out(lm, args.prompt, args.n, options | sampling, args.stream, args.json)


def _eval(words: list[str]) -> None:
    parser = _parser("eval", "RUN")
    option = parser.add_argument
    option("--perplexity", metavar="FILE", help="the text; default: the run's own validation part")
    option(
        "--stride", type=int, metavar="N", help="tokens between windows; default: half a context"
    )
    option("--device", default="auto", metavar="D", help="cuda, mps, cpu or auto")
    option("--json", action="store_true", help="print one JSON object")
    args, settings = _parse(parser, words)
    _refuse(settings)
    from octavo.language_model import load

    lm = load(_one_run(args.words), device=args.device)
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
    _print_facts(facts, args.json)


def _plan(words: list[str]) -> None:
    parser = _parser("plan", "CONFIG.yaml | TEXT... | RUN")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = _settings_page() if "--help" in words or "-h" in words else None
    args, settings = _parse(parser, words)
    from octavo.training.plan import make_plan
    from octavo.training.task import prepare, read_request

    request = read_request(args.words, settings)
    out = request.directory(None, resume=False)
    _print_facts(vars(make_plan(prepare(request.config, "cpu", out))), args.json)


def _parser(command: str, words: str) -> argparse.ArgumentParser:
    """A parser whose errors are ours, with the command's page as its help."""
    parser = _Parser(
        prog=f"octavo {command}",
        usage=f"octavo {command} {words} [options]",
        description=PAGES[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar=words, help="as above")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from octavo.settings import nearest

        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        guess = nearest(unknown[1], self._option_string_actions) if unknown else None
        fix = f"did you mean {guess}?" if guess else f"see {self.prog} --help"
        raise ConfigError(message, fix=fix)


def _settings_page() -> str:
    """Every setting with its default and meaning, for the help page."""
    from dataclasses import fields

    from octavo.config import Config
    from octavo.settings import field_docs

    default = Config()
    lines = ["settings, as section.name=value; their defaults:"]
    for section in vars(default):
        group = getattr(default, section)
        docs = field_docs(type(group))
        lines += ["", f"  {section}: {inspect.cleandoc(type(group).__doc__ or '').splitlines()[0]}"]
        for field in fields(group):
            value = "null" if field.default is None else getattr(field, "default", "")
            value = "[]" if value is MISSING else value
            lines += textwrap.wrap(
                f"{section}.{field.name}={value}".ljust(32) + "  " + docs[field.name],
                width=100,
                initial_indent="    ",
                subsequent_indent=" " * 38,
            )
    return "\n".join(lines)


def _parse(
    parser: argparse.ArgumentParser, words: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Sort the words, then parse: settings as ``section.name=value`` and everything else."""
    settings, rest, bare = [], [], []
    queue = [_spelled(word) for word in words]
    while queue:
        word = queue.pop(0)
        if SETTING.fullmatch(word) and not os.path.exists(word):
            if "=" not in word and queue:
                word += "=" + queue.pop(0)
            settings.append(word.removeprefix("--"))
        elif word.startswith("-") and word != "-":
            rest.append(word)
            if "=" not in word and _takes_value(parser, word) and queue:
                rest.append(queue.pop(0))
        else:
            bare.append(word)
    return parser.parse_args([*rest, "--", *bare]), settings


def _spelled(word: str) -> str:
    """The seeds' option spelling, --top_k, as ours, --top-k; values and settings stay."""
    name, equals, value = word.partition("=")
    plain = word.startswith("--") and "." not in name
    return name.replace("_", "-") + equals + value if plain else word


def _takes_value(parser: argparse.ArgumentParser, option: str) -> bool:
    action = parser._option_string_actions.get(option)
    return action is not None and action.nargs != 0


def _refuse(settings: list[str]) -> None:
    if settings:
        raise ConfigError(f"{settings[0]!r} is a training setting", fix="leave it out here")


def _one_run(words: list[str]) -> str:
    """The run named, or the newest under runs/."""
    if len(words) > 1:
        raise ConfigError(f"one run is wanted, {len(words)} words were given", ", ".join(words))
    if words:
        return words[0]
    from octavo.checkpoint import newest_run

    run = newest_run("runs")
    if run is None:
        raise ConfigError("no run is named and there is none under runs/", fix="name one")
    print(f"using {run}", file=sys.stderr)
    return str(run)


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Figures as one JSON object, or as aligned lines."""
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [(f"{name}: {part}", number) for part, number in value.items() if number]
        elif isinstance(value, list):
            lines += [("remark", item) for item in value]
        else:
            lines.append((name, value))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        shown = f"{value:,}" if isinstance(value, int) else value
        shown = f"{value:,.4g}" if isinstance(value, float) else shown
        print(f"{name.replace('_', ' '):<{width}}  {shown}")


def _complain(message: str, code: int) -> NoReturn:
    """One line on standard error, in red where a person sees it, and the exit code."""
    label = "\x1b[31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    print(label, " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(code)
