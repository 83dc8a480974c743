"""`octavo compare` and `octavo ablate` as people type them."""

import gzip
import json

import pytest
from command_kit import complaint, figures, octavo, printed

from octavo.evaluating.hellaswag import HellaSwag, read_items
from octavo.language_model import load

TEXT = "She sells sea shells by the sea shore: the shells she sells are sea shells.\n" * 60
SMALL = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "train.max_steps=4", "train.micro_batch_size=4", "eval.windows=16", "eval.every=0",
    "log.sample_tokens=1", "optim.lr=1e-2", "data.val_fraction=0.3",
]  # fmt: skip
ITEMS = [
    {"ctx": f"she sells {thing}", "endings": ["sea", "shells", "by the shore", "shells she sells"],
     "label": number % 4, "activity_label": "sea"}
    for number, thing in enumerate(["sea", "shells", "the sea", "shore", "sea shells", "she"])
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    (folder / "sea.txt").write_text(TEXT, encoding="utf-8")
    lines = "".join(json.dumps(item) + "\n" for item in ITEMS)
    (folder / "items.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    made = {"a/s1": [], "a/s2": ["train.seed=2"], "b/s1": ["model.mlp=gelu"]}
    made |= {"b/s2": ["train.seed=2", "model.mlp=gelu"], "byte": ["data.tokenizer=byte"]}
    for name, settings in made.items():
        words = [folder / "sea.txt", *SMALL, *settings, "--out", folder / name, "--quiet"]
        assert octavo("train", *words) == 0
    (folder / "empty").mkdir()
    (folder / "empty" / "config.yaml").write_bytes((folder / "byte" / "config.yaml").read_bytes())
    return folder


def test_two_runs_are_compared_in_words_and_as_json(here, capsys):
    said = printed(capsys, "compare", "a/s1", "b/s1")
    assert "on 16 windows of the validation part of" in said
    assert "95 % interval [" in said
    assert "these two weights, not about two methods" in said
    found = figures(capsys, "compare", "a/s1", "b/s1")
    finding = found["findings"]["nats a token"]
    assert finding["gain"] == pytest.approx(finding["a"] - finding["b"])
    assert finding["sentence"] in said
    assert found["a"] == ["a/s1"]


def test_a_run_beside_itself_is_exactly_equal(here, capsys):
    assert "the difference is exactly 0" in printed(capsys, "compare", "a/s1", "a/s1")


@pytest.mark.parametrize("words", [("a", "b"), ("a/s*", "b/s*"), ("a/s1,a/s2", "b/s2,b/s1")])
def test_several_seeds_a_side_are_named_in_three_ways(here, capsys, words):
    found = figures(capsys, "compare", *words)
    assert len(found["a"]) == len(found["b"]) == 2
    assert "2 and 2 seeds (paired" in found["remarks"][-1]


def test_the_order_in_which_seeds_are_named_changes_nothing(here, capsys):
    results = []
    for b in ("b/s1,b/s2", "b/s2,b/s1"):
        results.append(figures(capsys, "compare", "a", b)["findings"]["nats a token"])
    assert results[0]["interval"] == pytest.approx(results[1]["interval"])


def test_other_tokenizers_are_compared_in_bits_a_byte_and_it_is_said(here, capsys):
    (here / "long.txt").write_text(TEXT, encoding="utf-8")
    said = printed(capsys, "compare", "a/s1", "byte", "--text", "long.txt")
    assert "bits a byte, 95 % interval" in said
    assert "different tokenizers" in said


def test_hellaswag_counts_the_items_that_only_one_has_right(here, capsys):
    words = ["compare", "a/s1", "b/s1", "--hellaswag", "items.jsonl.gz", "--protocol", "harness"]
    findings = figures(capsys, *words)["findings"]
    assert findings["% HellaSwag acc"]["pairs"] == len(ITEMS)
    accuracy = findings["% HellaSwag acc_norm"]
    assert accuracy["gain"] == pytest.approx(accuracy["b"] - accuracy["a"])
    lm = load("a/s1")
    alone = HellaSwag(read_items("items.jsonl.gz"), lm.tokenizer, "harness").score(lm.model)
    assert accuracy["a"] == pytest.approx(100 * alone.acc_norm)
    said = printed(capsys, *words[:-2], "--limit", "4")
    assert "HellaSwag acc_norm (completion)" in said
    assert "alone is right on" in said or "exactly 0" in said


def test_published_scores_are_judged_without_any_run(capsys):
    words = ["compare", "0.3036", "0.3074", "--items", "10042", "--scores"]
    assert "z = 0.58, p = 0.56: not evidence" in printed(capsys, *words)
    assert figures(capsys, *words)["z"] == pytest.approx(0.58, abs=0.005)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a/s1"], 2, "1 word was given"),
        (["a/s1", "a/s2", "b/s1"], 2, "a pattern in quotes, or commas"),
        (["a/s1", "a/s3"], 2, "a/s3 is no run; looked for a/s3/config.yaml; did you mean"),
        (["a/s1", "empty"], 2, "holds no checkpoint yet"),
        (["a/s1", "b/s1", "--windows", "1"], 2, "give 2 or more"),
        (["a/s1", "b/s1", "--items", "10"], 2, "--items belongs to --scores"),
        (["0.3", "0.4", "--scores"], 2, "say --items N"),
        (["a", "b", "--scores", "--items", "10"], 2, "no two scores"),
        (["a/s1,a/s1", "b"], 2, "are the same weights"),
        (["a/s1", "b/s1", "--text", "none.txt"], 3, "none.txt"),
    ],
)
def test_bad_input_is_one_line(here, capsys, words, code, message):
    found, said = complaint(capsys, "compare", *words)
    assert found == code
    assert message in said


def test_a_study_prints_its_table_and_its_conclusion(here, capsys):
    words = ["ablate", "sea.txt", *SMALL, "--vary", "model.mlp=gelu,swiglu", "--seeds", "2"]
    assert octavo(*words, "--out", "study") == 0
    told = capsys.readouterr()
    assert "2 arms, 2 seeds: 4 runs in study" in told.err
    assert "4/4  swiglu, seed 1338: 4 steps" in told.err
    assert told.out.startswith("arm ")
    assert "model.mlp: " in told.out
    assert "recommended" in told.out
    saved = json.loads((here / "study" / "ablation.json").read_text(encoding="utf-8"))
    assert (here / "study" / "ablation.png").stat().st_size > 0
    assert octavo(*words, "--out", "study", "--json") == 0  # again: nothing left but to judge
    told = capsys.readouterr()
    assert json.loads(told.out) == saved
    assert "4/4" not in told.err
    compared = figures(capsys, "compare", "study/gelu", "study/swiglu")["findings"]["nats a token"]
    assert compared["interval"] == pytest.approx(saved["effects"][0]["interval"])


def test_a_study_that_cannot_be_is_refused_before_it_begins(here, capsys):
    words = ["ablate", "sea.txt", *SMALL, "--out", "never"]
    assert octavo(*words, "--vary", "model.positon=rope,none") == 2
    assert "did you mean model.position?" in capsys.readouterr().err
    assert octavo("ablate", "a/s1") == 2
    assert "begins with a configuration or a text" in capsys.readouterr().err
    assert not (here / "never").exists()
