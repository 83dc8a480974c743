"""lm-evaluation-harness and octavo say the same of the same model: of every item, not on average.

One module, because importing lm_eval and transformers takes seconds.
"""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from command_kit import answered
from model_kit import random_model

import octavo
from octavo.adapting.classify import Classifier
from octavo.errors import ConfigError, DataError, MissingExtraError, ResourceError
from octavo.evaluating import harness
from octavo.evaluating.hellaswag import HellaSwag, Item
from octavo.language_model import LanguageModel
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

TEXT = (
    "a man is sitting on the roof he begins to pull tiles [header] [title] [step] off   “quoted” "
    "naïve café 日本語 She’s then-what? 3.5 kg, water. Стол\tand\nnew lines, [substeps]: lift"
)
WORDS = TEXT.split(" ")


def make_items(count=60, seed=0):
    """Items of every kind: parted contexts or not, brackets, blanks, long ones, other scripts."""
    generator = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(generator.choice(WORDS, int(generator.integers(low, high))))

    for number in range(count):
        ctx_a, ctx_b = words(2, 90 if number % 5 == 0 else 25), words(0, 4) if number % 3 else ""
        endings = tuple(words(1, 14) + " x" for _ in range(4))
        parts = {"ctx_a": ctx_a, "ctx_b": ctx_b} if number % 4 else {}
        ctx = f"{ctx_a} {ctx_b}".strip() or "x"
        yield Item(words(1, 3), ctx, endings, int(generator.integers(4)), **parts)


@pytest.fixture(scope="module")
def lm():
    """Random weights, larger than a fresh model's: its choices are then decided clearly."""
    tokenizer = Tokenizer.train_bpe([TEXT * 20], 330)
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, block_size=64)
    model = random_model(ModelConfig(vocab_size=tokenizer.vocab_size, **shape), 3, noise=0.15)
    return LanguageModel(model.config, tokenizer, model=model)


@pytest.fixture(scope="module")
def exported(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    octavo.to_huggingface(lm, folder)
    return folder


@pytest.fixture(scope="module")
def hflm(exported):
    """What lm_eval itself makes of the exported model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4)


def task_of(items):
    """lm_eval's own HellaSwag task on our items; one without parts takes its ctx whole."""
    import datasets
    from lm_eval.tasks.hellaswag.utils import preprocess

    def process(dataset):
        def rendered(doc):
            ctx = doc["ctx"]
            if doc["ctx_a"] is not None:
                ctx = doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
            return {
                "query": preprocess(doc["activity_label"] + ": " + ctx),
                "choices": [preprocess(ending) for ending in doc["endings"]],
                "gold": doc["label"],
            }

        return dataset.map(rendered)

    rows = [{**vars(item), "endings": list(item.endings)} for item in items]
    return {
        "task": "hellaswag_generated",
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(rows)},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": process,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def lm_eval_on(model, items):
    """Log-likelihoods (N, 4), acc and acc_norm item by item, and the two figures of all."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model, tasks=[task_of(items)], task_manager=TaskManager(include_defaults=False)
    )
    samples = sorted(found["samples"]["hellaswag_generated"], key=lambda s: s["doc_id"])
    logprobs = np.array([[resp[0] for resp in s["filtered_resps"]] for s in samples])
    right = np.array([[s["acc"], s["acc_norm"]] for s in samples])
    return logprobs, right, found["results"]["hellaswag_generated"]


def test_harness_equals_lm_eval_item_by_item(lm, hflm):
    items = list(make_items())
    ours = HellaSwag(items, lm.tokenizer, "harness").score(lm.model)
    for model in (
        hflm,
        harness.adapt(lm.model, lm.tokenizer),
    ):  # its own model, and ours in its hands
        logprobs, right, figures = lm_eval_on(model, items)
        assert ours.logprobs == pytest.approx(logprobs, abs=2e-4)
        assert (ours.choices_acc == ours.labels).tolist() == right[:, 0].tolist()
        assert (ours.choices == ours.labels).tolist() == right[:, 1].tolist()
        assert ours.acc == pytest.approx(figures["acc,none"])
        assert ours.acc_norm == pytest.approx(figures["acc_norm,none"])
        assert ours.acc_stderr == pytest.approx(figures["acc_stderr,none"])
        assert ours.stderr == pytest.approx(figures["acc_norm_stderr,none"])
    # That the test has teeth: contexts were cut, the rules differ, choices are no mere guesses.
    lengths = [len(lm.tokenizer.encode(item.ctx)) for item in items]
    assert sum(length > lm.config.block_size for length in lengths) > 5
    assert 0 < (ours.choices != ours.choices_acc).sum() < len(items)
    ordered = np.sort(ours.logprobs, axis=1)
    assert np.median(ordered[:, 3] - ordered[:, 2]) > 1


def test_items_written_by_hand_are_rendered_as_the_task_itself_does():
    """The task's own code, on items that have everything it looks for."""
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs

    items = [
        Item("Roofing", "A man sits. he", ("pulls.", "b [step] c", "[t] d", "  e "), 1,
             "A man sits.", "he SAYS Ünder"),
        Item("How to cut", "x", ("a", "b", "c", "d"), 2, "[header] How to cut [title] Wash.  Dry.",
             ""),
    ]  # fmt: skip
    rows = [{**vars(item), "endings": list(item.endings)} for item in items]
    tokens = Tokenizer.byte()
    ours = HellaSwag(items, tokens, "harness").requests
    for number, doc in enumerate(process_docs(datasets.Dataset.from_list(rows))):
        for which, choice in enumerate(doc["choices"]):
            context, ending = ours[4 * number + which]
            assert tokens.decode([*context, *ending]) == f"{doc['query']} {choice}"
    assert tokens.decode(ours[0][0]) == "Roofing: A man sits. He says ünder"


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_rolling_likelihood_equals_hflm(lm, hflm):
    texts = [("a man is sitting",), (" ".join(WORDS * 4),), ("x",), ("",)]
    ours = harness.adapt(lm.model, lm.tokenizer).loglikelihood_rolling(
        requests("loglikelihood_rolling", *texts)
    )
    theirs = hflm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_an_empty_context_is_the_end_of_the_text_before(lm, hflm):
    pairs = [("", " a man"), ("", "x"), ("a man ", "is sitting")]
    ours = harness.adapt(lm.model, lm.tokenizer).loglikelihood(requests("loglikelihood", *pairs))
    theirs = hflm.loglikelihood(requests("loglikelihood", *pairs))
    assert [each[0] for each in ours] == pytest.approx([each[0] for each in theirs], abs=1e-4)
    assert [each[1] for each in ours] == [each[1] for each in theirs]


def test_a_choice_without_a_token_is_named_not_scored_as_certain(lm):
    with pytest.raises(DataError, match="a man"):
        harness.adapt(lm.model, lm.tokenizer).loglikelihood(
            requests("loglikelihood", ("a man", ""))
        )


def test_writing_equals_hflm(lm, hflm):
    """Greedy, cut at the first stop string, the longest contexts cut on the left."""
    asked = [
        ("a man is sitting on", {"until": ["\n\n"], "max_gen_toks": 12}),
        ("he begins to", {"until": [" "], "max_gen_toks": 12, "do_sample": False}),
        (" ".join(WORDS * 3), {"until": [], "max_gen_toks": 20, "temperature": 0.0}),
        ("off she", {"until": ["\n\n"], "max_gen_toks": 12}),
    ]
    ours = harness.adapt(lm.model, lm.tokenizer).generate_until(requests("generate_until", *asked))
    theirs = hflm.generate_until(requests("generate_until", *asked))
    assert ours == theirs
    assert all(ours[0::2])


def test_writing_takes_what_hflm_cannot(lm):
    """A task that asks for more tokens than the context holds, and one that samples."""
    asked = [
        (" ".join(WORDS), {"until": "", "max_gen_toks": 100}),
        ("", {"until": None, "max_new_tokens": 3, "do_sample": True, "temperature": 0.8}),
    ]
    texts = harness.adapt(lm.model, lm.tokenizer).generate_until(requests("generate_until", *asked))
    assert len(lm.tokenizer.encode(texts[0])) > 50
    assert texts[1]


def test_a_tokenizer_without_an_end_of_text_begins_with_a_newline():
    for text, first in (("ab\n", 0), ("ab", 0)):
        tokens = Tokenizer.char(text)
        model = GPT(ModelConfig(vocab_size=3, block_size=8, n_layer=1, n_head=1, d_model=8))
        adapted = harness.adapt(model, tokens)
        assert adapted.prefix_token_id == first


@pytest.fixture
def task(tmp_path):
    """A task of one's own as a YAML file, its data beside it."""
    rows = [{"q": f"a man is {word}", "choices": [" sitting", " off"], "gold": 0} for word in WORDS]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}}}\n"
        f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\n"
        f"doc_to_target: gold\nmetric_list: [{{metric: acc}}]\n",
        encoding="utf-8",
    )
    return path


def octavo_eval(capsys, *words):
    return answered(capsys, "eval", *words)


def test_the_command_runs_a_task_of_ones_own(exported, task, capsys):
    code, out, _ = octavo_eval(capsys, exported, "--tasks", task, "--limit", 7, "--json")
    assert code == 0
    assert 0 <= json.loads(out)["mine"]["acc,none"] <= 1
    code, out, _ = octavo_eval(capsys, exported, "--tasks", task)
    assert code == 0
    assert re.search(r"\|mine *\|.*\|acc ", out)


def test_an_unknown_task_is_answered_with_the_nearest(exported, capsys, monkeypatch):
    manager = SimpleNamespace(task_index={"hellaswag": 0, "piqa": 0})
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    code, _, err = octavo_eval(capsys, exported, "--tasks", "helaswag")
    assert code == 2
    assert "did you mean hellaswag?" in err


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub"), ResourceError),
        (ValueError("Unknown config shape"), ConfigError),
    ],
)
def test_a_task_that_fails_is_one_line(lm, task, monkeypatch, failure, kind):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("lm_eval.simple_evaluate", fail)
    with pytest.raises(kind, match=str(failure)) as error:
        harness.run_tasks(lm.model, lm.tokenizer, [str(task)])
    assert "\n" not in str(error.value)


def test_a_classifier_is_refused(lm):
    sorts = Classifier(GPT(lm.config), ["no", "yes"])
    with pytest.raises(ConfigError, match="classifier"):
        harness.adapt(sorts, lm.tokenizer)


def test_without_lm_eval_the_extra_is_named(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtraError, match=r"octavo\[eval\]"):
        harness.run_tasks(lm.model, lm.tokenizer, ["hellaswag"])
