"""`octavo decompress`: a compressed file back, byte for byte."""

from argparse import Namespace

from octavo.commands.compress import three_words
from octavo.commands.shared import Option, add_common, print_facts, progress

WORDS = "RUN FILE OUT"
PAGE = """\
Give back what `octavo compress` was given, byte for byte.

  octavo decompress runs/my book.octz book.txt

RUN is the model that the file was written with; its engine, precision and threads are in the file.
Another model is refused (code 4), and so is an engine that computes something else (8) and a
damaged file (3). Nothing is written unless the original's checksum is met."""


def add_options(option: Option) -> None:
    add_common(option, "base", "json")


def run(args: Namespace, settings: list[str]) -> None:
    from octavo.disk import write_atomic
    from octavo.explaining.compression import decompress, unpack
    from octavo.language_model import load
    from octavo.text.files import read_bytes

    path, source, out = three_words(args.words)
    compressed, where = read_bytes(source), f"in {source}"
    engine, device, weights = unpack(compressed, where)[0].made_with()
    lm = load(path, device, args.base, speculate="off", weights=weights, engine=engine)
    with progress("decompressing") as watch:
        data = decompress(lm, compressed, watch, where)
    write_atomic(out, data)
    facts = {"bytes": len(data), "compressed_bytes": len(compressed)}
    print_facts(facts, args.json, f"{out}: {len(data):,} bytes, as they were")
