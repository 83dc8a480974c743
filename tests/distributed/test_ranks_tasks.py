"""What else a run does is done once: validation, judges, samples, reports; whatever is learned."""

import csv
import json

import pytest
from crew import Crew, config, together, write_texts
from work import aloud, run, spiking

import octavo
from octavo.reporting.report import read_metrics
from octavo.training.loop import train
from octavo.training.request import finetune_request
from octavo.training.task import judge_validation

ITEM = {"activity_label": "Packing", "endings": ["jumps.", "the lazy dog.", "packs.", "jugs."]}
QUICK = [
    "train.max_steps=6", "train.micro_batch_size=4", "eval.every=3", "eval.windows=8",
    "checkpoint.every=0", "log.sample_every=0", "log.sample_tokens=4", "log.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    texts = write_texts(folder)
    settings = config(texts, "data.tokenizer=byte", "data.separator=false",
                      "data.mask_documents=false", "model.block_size=32")  # fmt: skip
    train(settings, folder / "base", quiet=True)
    with (folder / "mail.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(f"{'a fox' if i % 2 else 'two jugs'} {i}", i % 2) for i in range(40)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return folder


def events(path, kind):
    return [event for event in read_metrics(path) if event["event"] == kind]


def assert_same_course(one, other):
    """Adam magnifies rounding, so later losses agree only roughly."""
    assert events(one, "train")
    for kind, names in (("train", ["loss", "grad_norm"]), ("eval", ["val_loss"])):
        pairs = list(zip(events(one, kind), events(other, kind), strict=True))
        for a, b in pairs:
            assert [a["step"], a["tokens"]] == [b["step"], b["tokens"]]
            assert [a[n] for n in names] == pytest.approx([b[n] for n in names], rel=1e-3)


def judged(folder):
    items = folder / "items.jsonl"
    lines = [json.dumps({**ITEM, "ctx": f"{n} foxes", "label": n % 4}) for n in range(5)]
    items.write_text("\n".join(lines), encoding="utf-8")
    return [f"eval.hellaswag={json.dumps(str(items))}", "eval.hellaswag_every=3"]


@pytest.mark.parametrize(
    ("parallel", "protocol"),
    [("ddp", "completion"), pytest.param("fsdp", "harness", marks=pytest.mark.long)],
)
def test_a_run_is_validated_judged_and_sampled_once(folder, tmp_path, parallel, protocol):
    settings = config(
        folder / "texts.jsonl", *judged(tmp_path), f"train.parallel={parallel}",
        "data.tokenizer=byte", f"eval.hellaswag_protocol={protocol}", "log.sample_every=4",
        "train.max_steps=6", "model.block_size=48", "data.mask_documents=false",
    )  # fmt: skip
    together(tmp_path, 1, run, settings, tmp_path / "alone")
    crew = Crew(tmp_path, 2, aloud, settings, tmp_path / "shared")
    crew.results()
    assert crew.output().count("2 processes, each with 4 of a step's 8 rows") == 1
    assert crew.output().count("step 4: val") == 1
    assert_same_course(tmp_path / "alone", tmp_path / "shared")
    for kind in ("start", "judge", "sample", "end", "save"):
        steps = [event["step"] for event in events(tmp_path / "shared", kind)]
        assert steps == [event["step"] for event in events(tmp_path / "alone", kind)]
    for one, other in zip(
        *(events(tmp_path / n, "judge") for n in ("alone", "shared")), strict=True
    ):
        assert other["n"] == one["n"] == 5
        assert other["hellaswag_acc_norm"] == pytest.approx(one["hellaswag_acc_norm"], abs=0.21)
    texts = (tmp_path / "shared" / "samples.txt").read_text(encoding="utf-8")
    assert texts.count("--- step") == 2
    assert (tmp_path / "shared" / "report.html").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("labels", [False, pytest.param(True, marks=pytest.mark.long)])
def test_adapters_and_classifiers_learn_the_same(folder, tmp_path, labels, parallel):
    data = folder / ("mail.csv" if labels else "texts.jsonl")
    words = [str(folder / "base"), str(data)]
    request = finetune_request(words, [*QUICK, f"train.parallel={parallel}"], False, False, labels)
    together(tmp_path, 1, run, request.config, tmp_path / "alone")
    together(tmp_path, 2, run, request.config, tmp_path / "shared")
    assert_same_course(tmp_path / "alone", tmp_path / "shared")
    lm = octavo.load(tmp_path / "shared", device="cpu")
    if labels:
        assert judge_validation(lm).confusion.sum() == 4
        assert (tmp_path / "shared" / "confusion.png").exists()
    else:
        assert all(".lora_" in name for name in lm.run.load(lm.checkpoint).model_arrays())


@pytest.mark.long
def test_checkpointed_layers_and_chunked_losses_go_with_sharding(folder, tmp_path):
    """Both compute again in the backward pass, where sharded weights must be there again."""
    settings = config(
        folder / "texts.jsonl", "train.parallel=fsdp", "train.grad_checkpoint=true",
        "train.loss_chunk=7", "train.precision=bf16", "log.layers=true",
    )  # fmt: skip
    together(tmp_path, 1, run, settings, tmp_path / "alone")
    together(tmp_path, 2, run, settings, tmp_path / "shared")
    losses = [[e["loss"] for e in events(tmp_path / n, "train")] for n in ("alone", "shared")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.long)])
def test_a_spike_is_looked_into_and_gone_back_from_once(folder, tmp_path, parallel):
    """The first process looks at all rows of the step, in the whole model; all go back."""
    settings = config(
        folder / "texts.jsonl", f"train.parallel={parallel}", "train.on_spike=rewind",
        "train.max_steps=24", "eval.every=0", "checkpoint.every=5", "train.spike_sigmas=50",
    )  # fmt: skip
    together(tmp_path, 1, spiking, settings, tmp_path / "alone", 22)
    together(tmp_path, 2, spiking, settings, tmp_path / "shared", 22)
    one, other = (events(tmp_path / name, "spike") for name in ("alone", "shared"))
    assert [event["row"] for event in one] == [event["row"] for event in other] != [None]
    assert len(events(tmp_path / "shared", "rewind")) == 1
    assert_same_course(tmp_path / "alone", tmp_path / "shared")


@pytest.mark.long
def test_a_draft_is_trained_by_all_too(folder, tmp_path):
    settings = config(folder / "texts.jsonl", "train.draft=true", "train.max_steps=3")
    together(tmp_path, 2, run, settings, tmp_path / "run")
    assert events(tmp_path / "run" / "draft", "end")
