"""A HellaSwag score is worth something only with its protocol, its error and its items."""

import gzip
import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_kit import answered as octavo
from command_kit import complaint as refusal
from model_kit import random_model
from training_kit import trained

from octavo.errors import ConfigError, DataError, ResourceError
from octavo.evaluating import hellaswag
from octavo.evaluating.hellaswag import (
    HellaSwag,
    HellaSwagScore,
    Item,
    clean,
    read_items,
)
from octavo.model.gpt import GPT
from octavo.model_config import ModelConfig
from octavo.text.tokenizer import Tokenizer

TEXT = "A man sits on a roof. He is ripping level tiles off. She bends down, and grabs the pole.\n"
LINE = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man sits on a roof.",
    "ctx_b": "he", "ctx": "A man sits on a roof. he", "split": "val", "label": 3,
    "endings": ["wraps skis.", "rips tiles off.", "holds a cube.", "pulls up roofing."],
}  # fmt: skip


@pytest.fixture
def bytes_lm():
    """To this model an a is likelier than a b, and that than all else, whatever stands before."""
    shape = ModelConfig(
        vocab_size=257, block_size=64, n_layer=1, n_head=1, d_model=8, tie_embeddings=False
    )
    model = GPT(shape).eval()
    model.hidden = lambda ids, *rest: torch.ones(*ids.shape, 8)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[ord("a"), 0], model.lm_head.weight[ord("b"), 0] = 2.0, 1.0
    return SimpleNamespace(model=model, tokenizer=Tokenizer.byte(separator=True))


@pytest.fixture
def lm():
    tokenizer = Tokenizer.train_bpe([TEXT * 5], 300)
    shape = dict(block_size=48, n_layer=2, n_head=2, d_model=16)
    model = random_model(ModelConfig(vocab_size=tokenizer.vocab_size, **shape), noise=0.2)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def write(path, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def score_hellaswag(lm, items, protocol="completion"):
    return HellaSwag(items, lm.tokenizer, protocol).score(lm.model)


def item(ctx="c", endings=("a", "b", "c", "d"), label=0, **parts):
    return Item("label", ctx, tuple(endings), label, **parts)


def test_an_item_scored_by_hand(bytes_lm):
    """Sums favour short endings, means do not: "a" has one likely byte, "aabb" four of them."""
    norm = math.log(math.e**2 + math.e + 255)
    blank = 0 - norm
    a, b, c = 2 - norm, 1 - norm, 0 - norm
    endings = ("cc", "a", "aabb", "cccc")
    score = score_hellaswag(bytes_lm, [item(endings=endings, label=2)], "completion")
    by_hand = [blank + 2 * c, blank + a, blank + 2 * a + 2 * b, blank + 4 * c]
    assert score.logprobs[0] == pytest.approx(by_hand, abs=1e-5)
    assert score.lengths.tolist() == [[3, 2, 5, 5]]  # tokens, the blank among them
    assert (score.choices_acc.tolist(), score.choices.tolist()) == ([1], [2])
    assert (score.acc, score.acc_norm) == (0.0, 1.0)
    other = score_hellaswag(bytes_lm, [item(endings=endings, label=2)], "harness")
    assert other.logprobs[0] == pytest.approx(by_hand, abs=1e-5)
    assert other.lengths.tolist() == [[2, 1, 4, 4]]  # characters of the ending, without the blank


def test_characters_count_not_bytes(bytes_lm):
    score = score_hellaswag(bytes_lm, [item(endings=("é", "日本", "c", "d"))], "harness")
    assert score.lengths.tolist() == [[1, 2, 1, 1]]


def test_completion_encodes_context_and_endings_apart(lm):
    one = Item("Roof", "A man sits", ("on a roof.", "x", "y", "z"), 0, "A man", "sits")
    tokens = lm.tokenizer
    questions = HellaSwag([one], tokens, "completion").requests
    assert questions[0] == (tokens.encode("A man sits"), tokens.encode(" on a roof."))


@pytest.mark.parametrize(
    ("parts", "context"),
    [
        ({"ctx_a": "A man sits.", "ctx_b": "he LAUGHS"}, "Roofing: A man sits. He laughs"),
        ({"ctx_a": "A man sits.", "ctx_b": ""}, "Roofing: A man sits."),
        ({}, "Roofing: A man sits. he LAUGHS"),
        ({"ctx_a": "only this part"}, "Roofing: A man sits. he LAUGHS"),
    ],
)
def test_harness_capitalises_the_second_part_where_there_is_one(parts, context):
    tokens = Tokenizer.byte()
    one = Item("Roofing", "A man sits. he LAUGHS", ("a", "b", "c", "d"), 0, **parts)
    judged = HellaSwag([one], tokens, "harness")
    assert tokens.decode(judged.requests[0][0]) == context
    assert tokens.decode(judged.requests[0][1]) == " a"


def test_blanks_after_the_context_belong_to_the_ending():
    """lm_eval moves them: " [step]" at the end of a context leaves one behind."""
    tokens = Tokenizer.byte()
    one = Item("How to", "x", ("[header] cut it", "b", "c", "d"), 0, "Take it. [step]", "")
    context, ending = HellaSwag([one], tokens, "harness").requests[0]
    assert tokens.decode(context) == "How to: Take it."
    assert tokens.decode(ending) == "   cut it"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  [header] How to [title] Cut. [step] Take  it ", " How to. Cut. Take it"),
        ("a [substeps] b [] c", "a b c"),
        ("[unclosed b", "[unclosed b"),
        ("a    b", "a  b"),  # pairs of blanks once, as lm_eval does it
    ],
)
def test_brackets_are_cleaned_away(text, cleaned):
    assert clean(text) == cleaned


def test_items_without_parts_are_said_once_and_only_where_it_matters(lm):
    items = [item(), item(ctx_a="c", ctx_b="")]
    assert score_hellaswag(lm, items, "completion").remarks == []
    remarks = score_hellaswag(lm, items, "harness").remarks
    assert remarks == ["1 item without ctx_a and ctx_b: ctx taken whole, not capitalised"]


def test_an_ending_longer_than_the_context_is_cut_counted_and_still_scored(lm):
    long = "roof " * 200
    score = score_hellaswag(lm, [item(endings=(long, "b", long + "x", "d"))], "completion")
    assert score.cut_endings == 2
    assert score.lengths[0].tolist()[::2] == [48, 48]
    assert np.isfinite(score.logprobs).all()
    assert score.remarks == ["2 endings longer than the model's context, cut on the left"]
    ids = lm.tokenizer.encode(" " + long)
    with torch.inference_mode():
        logprobs = lm.model(torch.tensor([ids[-49:-1]]))[0].log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(ids[-48:])[:, None]).sum().item()
    assert score.logprobs[0, 0] == pytest.approx(wanted, abs=1e-4)


def test_an_item_gets_the_same_choices_in_any_company(lm):
    items = [
        item(f"A man sits on {'a roof ' * n}", (f"he {n}", "tiles", "the pole off", "bends"), n % 4)
        for n in range(12)
    ]
    together = score_hellaswag(lm, items, "harness")
    alone = [score_hellaswag(lm, [one], "harness") for one in items]
    assert together.logprobs == pytest.approx(np.vstack([one.logprobs for one in alone]), abs=1e-5)
    assert together.acc == np.mean([one.acc for one in alone])


def test_errors_of_a_mean_of_zeros_and_ones():
    logprobs = np.full((100, 4), -9.0)
    logprobs[:, 0] = -1.0
    score = HellaSwagScore("completion", np.arange(100) % 4, logprobs, np.ones((100, 4)), 0, 0)
    assert score.acc == score.acc_norm == 0.25
    assert score.stderr == pytest.approx(np.std(np.arange(100) % 4 == 0, ddof=1) / 10)
    assert score.z == 0
    assert "0.2500 ± 0.0435" in score.line()
    assert "completion, 100 items" in score.line()


def test_one_item_has_no_error_that_json_could_hold():
    score = HellaSwagScore("harness", np.array([1]), np.zeros((1, 4)), np.ones((1, 4)), 0, 1)
    assert json.loads(json.dumps(score.to_dict(), allow_nan=False))["stderr"] is None


def test_an_ending_that_is_nothing_but_a_mark_never_wins(lm):
    """Its length is 0; lm_eval divides by it and gets minus infinity."""
    score = score_hellaswag(lm, [item(endings=("[header]", "b", "c", "d"))], "harness")
    assert score.choices[0] != 0


def test_reads_the_official_schema_plain_and_gzipped(tmp_path):
    plain = write(tmp_path / "a.jsonl", LINE, "", {**LINE, "label": "2"})
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    items = read_items(plain)
    assert items == read_items(packed)
    assert [one.label for one in items] == [3, 2]
    assert items[0].ctx_b == "he"
    assert items[0].endings[3] == "pulls up roofing."
    assert read_items(plain, 1) == items[:1]
    bare = {name: LINE[name] for name in ("ind", "activity_label", "ctx", "label", "endings")}
    assert not read_items(write(tmp_path / "b.jsonl", bare))[0].ctx_a


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"ctx": "a', "line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ({**LINE, "endings": ["a", "b", "c"]}, "line 2 has not 4 endings"),
        ({**LINE, "endings": ["a", "b", "c", " "]}, "line 2 has not 4 endings"),
        ({**LINE, "endings": "abcd"}, "line 2 has not 4 endings"),
        ({**LINE, "label": 4}, "line 2 has the label 4"),
        ({**LINE, "label": ""}, "line 2 has the label ''"),
        ({**LINE, "ctx": None}, "line 2 has no context"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "broken.jsonl", LINE, line)
    with pytest.raises(DataError, match=complaint) as error:
        read_items(path)
    assert "broken.jsonl" in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="no item"):
        read_items(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="cannot read"):
        read_items(tmp_path / "absent.jsonl")
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(json.dumps(LINE).encode())[:-9])
    with pytest.raises(DataError, match="cannot unpack"):
        read_items(torn)


def test_the_official_file_is_checked_before_it_is_used(monkeypatch, tmp_path):
    body = json.dumps(LINE).encode()
    source = tmp_path / "served.jsonl"
    source.write_bytes(body)
    monkeypatch.setattr(hellaswag, "URL", source.as_uri())
    with pytest.raises(ResourceError, match="SHA-256"):
        read_items()
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(body).hexdigest())
    assert len(read_items()) == 1
    source.unlink()
    assert len(read_items()) == 1  # kept: asked for once


def test_a_character_the_model_never_saw_is_named_with_its_item():
    with pytest.raises(DataError, match=r"'é'.*item 2"):
        HellaSwag([item(), item("é")], Tokenizer.char("abcd "))


def test_a_classifier_is_refused(lm):
    from octavo.adapting.classify import Classifier

    with pytest.raises(ConfigError, match="classifier"):
        HellaSwag([item()], lm.tokenizer).score(Classifier(lm.model, ["no", "yes"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = [
        "data.tokenizer=byte", "model.block_size=32", "model.n_layer=1", "model.n_head=2",
        "model.d_model=16", "train.max_steps=2", "train.micro_batch_size=2",
        "log.sample_tokens=1", "eval.windows=2",
    ]  # fmt: skip
    return trained(TEXT * 30, tmp_path_factory.mktemp("hellaswag") / "run", *settings)


def test_the_command_prints_protocol_error_and_choices(run, tmp_path, capsys):
    path = write(tmp_path / "items.jsonl", *[{**LINE, "label": n % 4} for n in range(6)])
    code, out, _ = octavo(capsys, "eval", run, "--hellaswag", path, "--json", "--limit", 5)
    facts = json.loads(out)
    assert code == 0
    assert {"acc", "acc_norm", "stderr", "n", "protocol", "choices"} <= facts.keys()
    assert (facts["n"], facts["protocol"], len(facts["choices"])) == (5, "completion", 5)
    code, out, _ = octavo(capsys, "eval", run, "--hellaswag", path, "--protocol", "harness")
    assert code == 0
    assert "harness" in out
    assert "±" in out
    assert "chance 0.25" in out


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--hellaswag", "absent.jsonl"], 3, "absent.jsonl"),
        (["--protocol", "harness"], 2, "--hellaswag"),
        (["--limit", "5"], 2, "--hellaswag or --tasks"),
        (["--hellaswag", "x", "--limit", "0"], 2, "1 or more"),
        (["--hellaswag", "x", "--tasks", "y"], 2, "one judge at a time"),
        (["--hellaswag", "x", "--protocol", "mine"], 2, "completion"),
    ],
)
def test_the_command_refuses_in_one_line(run, capsys, words, code, complaint):
    found, said = refusal(capsys, "eval", run, *words)
    assert found == code
    assert complaint in said


def test_without_a_network_the_way_out_is_named(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "nowhere").as_uri())
    code, _, err = octavo(capsys, "eval", run, "--hellaswag")
    assert code == 6
    assert "--hellaswag FILE" in err
