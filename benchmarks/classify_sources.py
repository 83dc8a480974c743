"""Whether a fine-tuned classifier tells real texts apart: passages of several files, by their file.

    python benchmarks/classify_sources.py RUN plays.txt articles.txt ... --record

Passages of 120 characters are cut from each file and from the text RUN learned from, as many of
each; those with characters that RUN's tokenizer does not know are left out. The body stays frozen
but for adapters; the last quarter of a shuffled set is for validation and never trained on.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import numpy as np
from record import machine, row, versions, write

import octavo
from octavo.errors import DataError
from octavo.text.corpus import read_corpus
from octavo.training.loop import train
from octavo.training.request import finetune_request

LENGTH, EACH = 120, 800


def passages(text: str, lm: octavo.LanguageModel) -> list[str]:
    """Evenly spread passages of one text, without what the tokenizer does not know."""
    found = []
    for start in range(0, len(text) - LENGTH, max(len(text) // (2 * EACH), LENGTH)):
        passage = " ".join(text[start : start + LENGTH].split())
        try:
            lm.tokenizer.encode(passage)
        except DataError:
            continue
        found.append(passage)
    draw = np.random.default_rng(0).permutation(len(found))[:EACH]
    return [found[i] for i in sorted(draw)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    lm = octavo.load(args.run)
    assert lm.run is not None
    sources = {path.stem: path.read_text(encoding="utf-8") for path in args.texts}
    sources["its-own-text"] = read_corpus(lm.run.config.data.source).text
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "passages.csv"
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for label, text in sources.items():
                writer.writerows([passage, label] for passage in passages(text, lm))
        settings = [f"train.max_steps={args.steps}", "eval.every=100", "data.val_fraction=0.25"]
        words = [args.run, str(table)]
        request = finetune_request(words, settings, train_all=False, head_only=False, labels=True)
        result = train(request.config, Path(folder) / "run")
        lines = (result.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    best = max(
        (event for event in map(json.loads, lines) if event["event"] == "eval"),
        key=lambda event: event["step"] == result.best_step,
    )
    results = [
        row(what, "", best[name])
        for what, name in (("accuracy", "val_accuracy"), ("macro-F1", "val_macro_f1"))
    ]
    print(json.dumps(results))
    if args.record:
        names = ", ".join(sources)
        record = {"name": "classify-sources", "machine": machine(), "rounds": 1}
        record |= {"versions": versions("octavo", "torch"), "labels": names}
        command = "python benchmarks/classify_sources.py runs/quickstart TEXT... --record"
        print(write(record | {"command": command, "results": results}).name)


if __name__ == "__main__":
    main()
