"""`octavo decompress`: a compressed file back, byte for byte."""

from argparse import Namespace

from octavo.commands.compress import three_words
from octavo.commands.shared import Option, print_facts, progress

WORDS = "RUN FILE OUT"
TAKES_SETTINGS = False
PAGE = """\
Give back what `octavo compress` was given, byte for byte.

  octavo decompress runs/my book.octz book.txt

RUN is the model that the file was written with; its engine, precision and threads are in the file.
Another model is refused (code 4), and so is an engine that computes something else (8) and a
damaged file (3). Nothing is written unless the original's checksum is met."""


def add_options(option: Option) -> None:
    """What may be typed besides the words."""
    option("--base", metavar="RUN", help="where an adapter's base is, if it was moved")
    option("--json", action="store_true", help="print one JSON object")


def run(args: Namespace, settings: list[str]) -> None:
    """Do it."""
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
    if args.json:
        print_facts({"bytes": len(data), "compressed_bytes": len(compressed)}, as_json=True)
    else:
        print(f"{out}: {len(data):,} bytes, as they were")
