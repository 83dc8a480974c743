"""The command line: sorts what was typed, calls the command, turns errors into one line and a code.

Each command is a module of `octavo.commands`, imported when it is called.
"""

import argparse
import importlib
import inspect
import keyword
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING
from types import ModuleType
from typing import NoReturn

from octavo.errors import ConfigError, OctavoError

# Answered without importing anything: `octavo --help` must be instant.
HELP = """\
octavo: a small, well-bound GPT

usage: octavo COMMAND ...        octavo COMMAND --help        octavo --version

learn
  data        prepare | inspect | verify  texts too large for memory become shards of tokens
  plan        CONFIG.yaml | TEXT... | RUN what a run will cost, before it begins
  train       CONFIG.yaml | TEXT... | RUN learn from a text, or go on with a run
  finetune    RUN TEXT...                 teach a model something more, with adapters or whole
  report      RUN...                      curves and samples of a run, or of several, on one page
  doctor      [RUN]                       what is slow or wrong, and the one thing to do
write
  generate    RUN --prompt TEXT           let a model write
  chat        RUN                         talk with a model
  serve       RUN...                      behind OpenAI's API, and on a page in the browser
judge
  eval        RUN                         how surprised is it by a text; HellaSwag and other tasks
  compare     RUN RUN                     which is better, and whether the evidence can tell
  ablate      CONFIG.yaml | TEXT...       a small fair study: what does each choice bring
  verify-resume  CONFIG.yaml | TEXT...    proof that a killed run ends as if it never was
see inside
  explain     RUN --text TEXT             every token: how probable, what else, who looked where
  attention   RUN --text TEXT --out PNG   what each head looks at, as a picture
  profile     RUN | CONFIG.yaml           where the time goes
  diff        RUN RUN                     settings and weights of two models, side by side
  compress    RUN FILE OUT                a file as the model's surprises; beside gzip, xz, zstd
  decompress  RUN FILE OUT                and back, byte for byte
change, bring in, take out
  quantize    RUN --to int8|int4|auto     smaller weights that write faster, with their price
  merge       RUN --out RUN               one plain model of a base and its adapter
  grow        RUN --out RUN               a larger model that computes the same, to train on
  import      SOURCE RUN                  a model from Hugging Face or nanoGPT becomes a run
  export      RUN --to hf|gguf|peft PATH  a run leaves for transformers, llama.cpp or PEFT

begin with
  octavo train my.txt                     a model of your own text, in runs/my
  octavo generate runs/my --prompt "The " what it has learnt

A RUN is a directory that train writes: configuration, tokenizer, checkpoints, metrics, report.html.
Any setting can follow as section.name=value, e.g. train.max_steps=500 (see octavo train --help).
"""
COMMANDS = tuple(re.findall(r"^  ([\w-]+) +(?:\[?[A-Z]|prepare)", HELP, re.MULTILINE))
SETTING = re.compile(r"--[a-z]\w*(\.\w+)+(=.*)?|[a-z]\w*(\.\w+)*=.*", re.DOTALL)


SPINS = "30000"  # a millisecond or less; the library's own choice is ten times that


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; errors are one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    spin_briefly()
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


def spin_briefly() -> None:
    """Let PyTorch's threads wait for each other in a way that leaves other programs room.

    Threads that spin for long keep a core from the very thread they wait for: training beside two
    busy programs on two cores is several times as fast so, and on a quiet machine as fast as
    before. What the user has set holds. Only before PyTorch is imported is it heard.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


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
    name = f"{command}_" if keyword.iskeyword(command) else command.replace("-", "_")
    module = importlib.import_module(f"octavo.commands.{name}")
    takes_settings = getattr(module, "TAKES_SETTINGS", False)
    parser = _parser(command, module, takes_settings and bool({"--help", "-h"} & set(rest)))
    args, settings = _parse(parser, rest)
    if settings and not takes_settings:
        raise ConfigError(f"{settings[0]!r} is a training setting", fix="leave it out here")
    module.run(args, settings)
    return 0


def _parser(command: str, module: ModuleType, full: bool) -> argparse.ArgumentParser:
    """A parser whose errors are ours; ``full`` puts the settings on the command's help page."""
    parser = _Parser(
        prog=f"octavo {command}",
        usage=f"octavo {command} {module.WORDS} [options]",
        description=module.PAGE,
        epilog=_settings_page() if full else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar=module.WORDS, help="as above")
    module.add_options(parser.add_argument)
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
            if "=" not in word and queue and _takes_value(parser, word, queue[0]):
                rest.append(queue.pop(0))
        else:
            bare.append(word)
    return parser.parse_args([*rest, "--", *bare]), settings


def _spelled(word: str) -> str:
    """The seeds' option spelling, --top_k, as ours, --top-k; values and settings stay."""
    name, equals, value = word.partition("=")
    plain = word.startswith("--") and "." not in name
    return name.replace("_", "-") + equals + value if plain else word


def _takes_value(parser: argparse.ArgumentParser, option: str, following: str) -> bool:
    action = parser._option_string_actions.get(option)
    if action is None or action.nargs == 0:
        return False
    return action.nargs != "?" or not following.startswith("-")


def _complain(message: str, code: int) -> NoReturn:
    """One line on standard error, in red where a person sees it, and the exit code."""
    label = "\x1b[31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    print(label, " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(code)
