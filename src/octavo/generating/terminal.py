"""A model's text on the terminal: as it is written, all at once, or prompt after prompt."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def write_out(
    lm: Any, prompt: str | None, n: int, options: Mapping[str, Any], stream: bool, as_json: bool
) -> None:
    """Print the continuation of ``prompt``, and nothing else, on standard output.

    ``lm`` is a `LanguageModel`, ``options`` what its ``generate`` takes. One text is streamed when
    asked for or when a person is watching; ``n`` texts are set apart by a line of dashes.
    """
    if as_json:
        texts = lm.generate([prompt], n=n, **options)
        facts = {"prompt": prompt or "", "texts": texts}
        if lm.pace:
            facts["speculation"] = lm.pace.report()
        print(json.dumps(facts, ensure_ascii=False))
    elif n == 1 and (stream or sys.stdout.isatty()):
        for piece in lm.stream(prompt, **options):
            print(piece, end="", flush=True)
        print()
    else:
        print("\n----\n".join(lm.generate([prompt], n=n, **options)))


def talk(lm: Any, options: Mapping[str, Any]) -> None:
    """Read prompts and write on from each until end of input; Ctrl-C stops a text, not the talk."""
    lm.make_ready()
    for prompt in typed("write a prompt and press Enter; Ctrl-C stops a text, Ctrl-D ends"):
        if prompt:
            flow(lm.stream(prompt, **options))


def typed(greeting: str) -> Iterator[str]:
    """The lines of standard input until its end; a person is greeted and asked for each.

    Lines can be edited and called back where there is readline; Ctrl-C begins a new one.
    """
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import gives `input` editing and history
    watched = sys.stdin.isatty()
    if watched:
        print(greeting)
    while True:
        try:
            line = input("> " if watched else "")
        except EOFError:
            print() if watched else None
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line


def flow(pieces: Iterable[str]) -> str:
    """Print a text as it is written and return it; Ctrl-C stops it and not the program."""
    shown = []
    try:
        for piece in pieces:
            shown.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except ValueError as error:  # an unseen character, say: the talk goes on
        print(f"error: {error}", end="")
    print(flush=True)
    return "".join(shown)
