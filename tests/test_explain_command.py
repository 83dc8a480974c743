"""`octavo explain`, `octavo attention` and `octavo diff` as people type them."""

import base64
import json
import re

import numpy as np
import pytest
from command_kit import figures, octavo, printed

TEXT = "She sells sea shells by the sea shore: the shells she sells are sea shells.\n" * 30
SMALL = [
    "model.block_size=16", "model.n_layer=2", "model.n_head=2", "model.d_model=16",
    "train.max_steps=4", "train.micro_batch_size=4", "eval.windows=8", "log.sample_every=2",
    "log.sample_tokens=30", "advanced.log_attention=true",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    (folder / "sea.txt").write_text(TEXT, encoding="utf-8")
    assert octavo("train", folder / "sea.txt", *SMALL, "--out", folder / "run", "--quiet") == 0
    return folder


def test_training_keeps_the_attention_of_its_samples(folder):
    saved = sorted((folder / "run" / "attention").iterdir())
    assert [path.name for path in saved] == ["step-00000002.npz", "step-00000004.npz"]
    with np.load(saved[-1]) as file:
        attention, ids, tokens = file["attention"], file["ids"], file["tokens"]
    assert attention.shape == (2, 2, len(ids), len(ids))
    assert np.abs(attention.astype(np.float32).sum(-1) - 1).max() < 2e-3
    samples = (folder / "run" / "samples.txt").read_text(encoding="utf-8")
    assert "".join(tokens)[1:] in samples  # the first is the newline it begins with


def test_a_page_of_a_text(folder, capsys):
    text = "She sells sea shells by the"
    said = printed(capsys, "explain", "run", "--text", text, "--out", "a.html")
    assert "a.html" in said
    assert "longest verbatim  27" in said
    assert (folder / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_of_what_the_model_writes(folder, capsys):
    facts = figures(capsys, "explain", "run", "--prompt", "She ", "--max-new-tokens", 9)
    assert (facts["page"], facts["tokens"], facts["written"]) == ("explain.html", 13, 9)
    assert (
        octavo("generate", "run", "--prompt", "She ", "--max-new-tokens", 9, "--preset", "nucleus")
        == 0
    )
    text = capsys.readouterr().out.removesuffix("\n")
    page = (folder / "explain.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    ids = np.frombuffer(base64.b64decode(data["ids"]), "<i4")
    assert "".join(data["texts"][str(i)] for i in ids) == "She " + text


def test_a_file_and_a_corpus(folder, capsys):
    (folder / "other.txt").write_text("shells shells shells shells shells", encoding="utf-8")
    words = ("explain", "run", "--file", "other.txt", "--corpus", "other.txt", "--json")
    facts = figures(capsys, *words)
    assert (facts["longest_verbatim"], facts["verbatim_share"]) == (34, 1)
    assert "longer than the model's context of 16" in facts["remarks"][0]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("explain", "run"), 2, "which text?; give one of --text, --file and --prompt"),
        (("explain", "run", "--text", "a", "--prompt", "b"), 2, "which text?"),
        (("explain", "run", "--text", ""), 2, "the text is empty"),
        (("explain", "run", "--text", "é"), 3, "'é' (U+00E9) is unknown to the tokenizer"),
        (("explain", "run", "--file", "none.txt"), 3, "cannot read none.txt"),
        (("explain", "run", "--text", "sea", "--corpus", "none.txt"), 3, "there is no text"),
        (("explain", "run", "--text", "sea", "--out", "no/where.html"), 6, "cannot write"),
        (("explain", "nowhere", "--text", "sea"), 2, "nowhere is no run"),
        (("attention", "run"), 2, "which text?"),
        (("attention", "run", "--text", "sea", "--out", "a.gif"), 2, "ends in .png"),
        (("attention", "run", "--text", "sea", "--layer", 2), 2, "the layers are 0 to 1"),
        (("diff", "run"), 2, "A B are wanted, 1 word was given; run; octavo diff"),
        (("diff", "run", "nowhere"), 2, "nowhere is no run"),
    ],
)
def test_mistakes_are_one_line(words, code, said, capsys):
    assert octavo(*words) == code
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_picture_of_the_first_tokens(folder, capsys):
    words = ("attention", "run", "--text", "She sells sea shells by the", "--out", "heads.png")
    assert octavo(*words) == 0
    said = capsys.readouterr()
    assert "27 tokens: the first 16 are drawn" in said.err
    assert said.out == "drawn: heads.png, 16 tokens\n"
    assert (folder / "heads.png").stat().st_size > 10_000


def test_two_checkpoints_of_a_run(folder, capsys):
    words = ("train", "sea.txt", *SMALL, "train.seed=7", "--out", "other", "--quiet")
    assert octavo(*words) == 0
    capsys.readouterr()
    said = printed(capsys, "diff", "run", "run")
    assert "weights: identical, all" in said
    assert "settings: the same" in said
    said = printed(capsys, "diff", "run", "other")
    assert "train.seed  1337 -> 7" in said
    assert "blocks.0.attn.q_proj.weight" in said
    facts = figures(capsys, "diff", "run", "other")
    assert not facts["same_weights"]
    assert facts["settings"] == {"train.seed": [1337, 7]}
    relative = [change["relative"] for change in facts["changes"]]
    assert relative == sorted(relative, reverse=True)
