"""HellaSwag items a second: octavo beside lm-evaluation-harness, on the same weights.

    python benchmarks/hellaswag.py RUN hellaswag_val.jsonl.gz --record
    python benchmarks/hellaswag.py RUN hellaswag_val.jsonl.gz --equality --record

Every so many of the file's items, by the harness's protocol: from texts to the two figures. lm_eval
runs its own HFLM on the run as exported, at batch size 1, its default, and at a larger one; and the
model that octavo adapts for it. Before anything is timed all must agree: the same choices by both
rules for every item, log-probabilities to a thousandth. --equality records that agreement alone.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
from measure import Work, measure, options, timed

TOLERANCE = 1e-3  # nats of an ending; sums of some thirty tokens, hundreds of nats
LARGER_BATCH = 8  # its fastest here
RULES = ("acc", "acc_norm")

Answer = tuple[np.ndarray, np.ndarray]
"""Log-probabilities (N, 4) and whether acc and acc_norm count each item as right (N, 2)."""


def items_of(file: Path, count: int) -> list[Any]:
    """So many items, spread over the file: its two sources stand one after the other."""
    from octavo.evaluating.hellaswag import read_items

    items = read_items(file)
    return items[:: len(items) // count][:count]


def octavo_work(run: Path, file: Path, count: int) -> Work:
    """Our judge."""
    from octavo.evaluating.hellaswag import HellaSwag
    from octavo.language_model import load

    lm, items = load(run, device="cpu"), items_of(file, count)
    score = HellaSwag(items, lm.tokenizer, "harness").score(lm.model)
    right = np.stack([score.choices_acc == score.labels, score.choices == score.labels], 1)

    def again() -> Any:
        return HellaSwag(items, lm.tokenizer, "harness").score(lm.model).acc_norm

    return Work((score.logprobs, right), functools.partial(timed, again, len(items)))


def hflm_work(exported: Path, batch: int, file: Path, count: int) -> Work:
    """lm_eval and the model it loads itself."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=batch)
    return _lm_eval_work(model, items_of(file, count))


def adapted_work(run: Path, file: Path, count: int) -> Work:
    """lm_eval and the model that octavo hands it."""
    from octavo.evaluating.harness import adapt
    from octavo.language_model import load

    lm = load(run, device="cpu")
    return _lm_eval_work(adapt(lm.model, lm.tokenizer), items_of(file, count))


def _lm_eval_work(model: Any, items: list[Any]) -> Work:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)

    def evaluate(log_samples: bool) -> Any:
        return simple_evaluate(
            model, tasks=[task(items)], task_manager=manager, log_samples=log_samples
        )

    samples = evaluate(True)["samples"]["hellaswag_of_file"]
    samples.sort(key=lambda sample: sample["doc_id"])
    logprobs = np.array([[resp[0] for resp in sample["filtered_resps"]] for sample in samples])
    right = np.array([[sample["acc"], sample["acc_norm"]] for sample in samples], dtype=bool)
    return Work((logprobs, right), functools.partial(timed, lambda: evaluate(False), len(items)))


def task(items: list[Any]) -> dict[str, Any]:
    """lm_eval's HellaSwag on these items; one without ctx_a and ctx_b takes its ctx whole."""
    import datasets
    from lm_eval.tasks.hellaswag.utils import preprocess

    def render(doc: dict[str, Any]) -> dict[str, Any]:
        parted = doc["ctx_a"] is not None and doc["ctx_b"] is not None
        ctx = f"{doc['ctx_a']} {doc['ctx_b'].capitalize()}" if parted else doc["ctx"]
        return {
            "query": preprocess(doc["activity_label"] + ": " + ctx),
            "choices": [preprocess(ending) for ending in doc["endings"]],
        }

    rows = [{**vars(item), "endings": list(item.endings)} for item in items]
    return {
        "task": "hellaswag_of_file",
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(rows)},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": lambda dataset: dataset.map(render),
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": rule, "aggregation": "mean", "higher_is_better": True} for rule in RULES
        ],
    }


def agreement(answers: dict[str, Answer]) -> dict[str, float]:
    """How far the first peer's items are from the others', at worst."""
    (logprobs, right), *others = answers.values()
    figures = {
        "items": len(right),
        "acc": float(right[:, 0].mean()),
        "acc_norm": float(right[:, 1].mean()),
    }
    figures["items with another acc"] = max(int((right != r)[:, 0].sum()) for _, r in others)
    figures["items with another acc_norm"] = max(int((right != r)[:, 1].sum()) for _, r in others)
    figures["largest difference of a log-probability"] = max(
        float(np.abs(logprobs - other).max()) for other, _ in others
    )
    figures["largest log-probability, without its sign"] = float(np.abs(logprobs).max())
    return figures


def equal_items(answers: dict[str, Answer]) -> None:
    """Raise unless all agree item by item."""
    figures = agreement(answers)
    for what, value in figures.items():
        print(f"{what:<44} {value:.6g}")
    worst = figures["largest difference of a log-probability"]
    if worst > TOLERANCE or any(figures[f"items with another {rule}"] for rule in RULES):
        raise SystemExit("error: the judges do not agree")


def main() -> None:
    parser = options("HellaSwag items a second")
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path, help="HellaSwag's validation items")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--equality", action="store_true", help="compare, and time nothing")
    asked = parser.parse_args()
    asked.versions = record.versions("octavo", "torch", "transformers", "lm_eval")
    import octavo

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        octavo.to_huggingface(octavo.load(asked.run), exported)
        makers = {
            "octavo": functools.partial(octavo_work, asked.run),
            "lm_eval, batch 1 (its default)": functools.partial(hflm_work, exported, 1),
            f"lm_eval, batch {LARGER_BATCH}": functools.partial(hflm_work, exported, LARGER_BATCH),
            "lm_eval, octavo's model": functools.partial(adapted_work, asked.run),
        }
        peers: dict[str, Callable[[], Work]] = {
            what: functools.partial(make, file=asked.file, count=asked.items)
            for what, make in makers.items()
        }
        if asked.equality:
            record_equality(peers, asked)
        else:
            measure("hellaswag", peers, equal_items, "items/s", asked)


def record_equality(peers: dict[str, Callable[[], Work]], asked: Any) -> None:
    """Ask all once."""
    answers = {what: make().answer for what, make in peers.items()}
    equal_items(answers)
    results = [record.row(what, "", value) for what, value in agreement(answers).items()]
    if asked.record:
        facts = {"name": "hellaswag-equality", "machine": record.machine(), "rounds": 1}
        facts |= {"versions": asked.versions, "command": record.command(), "results": results}
        print(record.write(facts))


if __name__ == "__main__":
    main()
