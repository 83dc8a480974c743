"""The page says what the logits say, needs nothing else, and stays small."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from octavo.explaining import explained as explained_module
from octavo.explaining import token_page as token_page_module
from octavo.explaining.explained import explain, most_tokens
from octavo.explaining.token_page import notes, render
from octavo.generating.recording import Recorder

DTYPES = {"ids": "<i4", "rank": "<i4", "top_ids": "<i4", "lens_ids": "<i4", "attention": "u1"}
FLOATS = ("probability", "entropy", "top_probability", "lens_best", "lens_probability")


def data_of(html):
    """What the page's script reads."""
    [text] = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL
    )
    data = json.loads(text)
    for name in (*DTYPES, *FLOATS):
        raw = base64.b64decode(data[name], validate=True)
        data[name] = np.frombuffer(raw, DTYPES.get(name, "<f4"))
    return data


def page_of(lm, text, **options):
    return explain(lm, lm.tokenizer.encode(text), **options)


def test_the_page_holds_the_models_own_figures(make_run):
    lm = make_run()
    page = page_of(lm, "sea shells sells")
    data = data_of(render(page))
    ids = lm.tokenizer.encode("sea shells sells")
    logits = lm.logits(ids).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert data["ids"].tolist() == ids
    assert "".join(data["texts"][str(i)] for i in ids) == "sea shells sells"
    came = p[np.arange(len(ids) - 1), ids[1:]]
    assert data["probability"][:-1] == pytest.approx(came, rel=1e-5)
    assert data["entropy"] == pytest.approx(-(p * np.log2(p)).sum(-1), rel=1e-5)
    top = data["top_ids"].reshape(len(ids), -1)
    assert top.shape[1] * len(ids) == len(data["top_probability"])
    assert top[:, 0].tolist() == p.argmax(-1).tolist()
    lens = data["lens_probability"].reshape(len(ids), lm.config.n_layer + 1)
    assert lens[:-1, -1] == pytest.approx(came, rel=1e-5)
    assert {*map(str, top.flat), *map(str, data["lens_ids"])} <= data["texts"].keys()


def attention_in(data, token):
    """(layers, H, keys) of one token, as the page's script finds it."""
    starts = {t: w[0] for w in data["windows"] for t in range(w[1], w[2])}
    sizes = [data["layers"] * data["heads"] * (t - starts[t] + 1) for t in range(token + 1)]
    raw = data["attention"][sum(sizes[:-1]) : sum(sizes)]
    return (raw.reshape(data["layers"], data["heads"], -1) / 255.0) ** 2


def test_the_page_holds_the_attention(make_run):
    import torch

    lm = make_run()
    ids = lm.tokenizer.encode("she sells")
    recorder = Recorder()
    with torch.inference_mode():
        lm.model(torch.tensor([ids]), attend=recorder)
    data = data_of(render(page_of(lm, "she sells")))
    assert data["attended"] == len(ids)
    for token in range(len(ids)):
        wanted = torch.cat(recorder.calls)[:, :, token, : token + 1].numpy()
        found = attention_in(data, token)
        assert np.abs(found - wanted).max() < 1 / 255
        assert np.abs(found.sum(-1) - 1).max() < 0.02  # bytes


def test_a_text_longer_than_the_context_is_windowed_and_said(make_run):
    lm = make_run()
    page = page_of(lm, "she sells sea shells by the sea shore")
    assert "longer than the model's context of 16 tokens" in notes(page)[0]
    data, reading = data_of(render(page)), page.reading
    for token in (0, 15, 16, 23, 24, 36):
        wanted = reading.attention[token]
        assert attention_in(data, token).shape == wanted.shape
        assert np.abs(attention_in(data, token) - wanted).max() < 1 / 255


def test_what_stands_in_the_training_text_is_marked(make_run):
    lm = make_run()
    page = page_of(lm, "sea: she sells sea shells by the sea shore: the sea")
    assert page.longest == len("he sells sea shells by the sea shore: the s")
    data = data_of(render(page))
    [[first, last]] = data["spans"]
    said = "".join(data["texts"][str(i)] for i in data["ids"][first:last])
    assert said == "he sells sea shells by the sea shore: the s"
    html = render(page)
    assert f"<mark>{said}</mark>" in html
    assert "line 1, byte 1<" in html
    assert 0.5 < page.verbatim < 1


def test_nothing_verbatim_is_said_too(make_run):
    assert "No 24 bytes in a row" in render(page_of(make_run(), "sea"))


def test_a_text_that_is_gone_is_said_on_the_page(make_run, tmp_path):
    lm = make_run()
    (tmp_path / "sea.txt").unlink()
    html = render(page_of(lm, "she sells sea shells"))
    assert "cannot be read any more" in html
    assert "Nothing was looked up" in html


def test_the_page_needs_nothing_but_itself(make_run):
    html = render(page_of(make_run(), "she sells"))
    assert not re.search(r"(src|href|action)\s*=|url\(|@import|https?:|fetch\(|import\(", html)
    assert "default-src 'none'" in html
    assert not re.search(r"<!--[A-Z]+-->", html)  # every part is in its place


def test_a_text_cannot_end_the_script_or_begin_one(make_run, monkeypatch):
    evil = "</script><script>alert(1)</script><!--SCRIPT-->\u2028é"
    monkeypatch.setattr(token_page_module, "token_text", lambda tokenizer, token: evil)
    lm = make_run()
    page = dataclasses.replace(page_of(lm, "sea"), name=evil)
    html = render(page)
    assert html.count("<script") == html.count("</script>") == 2
    assert html.count('"use strict"') == 1
    assert set(data_of(html)["texts"].values()) == {evil}


def test_half_a_character_is_shown_as_its_bytes(make_lm):
    texts = data_of(render(page_of(make_lm("byte"), "é")))["texts"]
    assert [texts[str(byte)] for byte in "é".encode()] == ["\\xc3", "\\xa9"]


def test_ids_without_a_tokenizer_are_shown_as_numbers(make_lm):
    page = explain(make_lm(tokenizer=None), [3, 1, 4])
    data = data_of(render(page))
    assert [data["texts"][str(i)] for i in (3, 1, 4)] == ["3 ", "1 ", "4 "]
    assert "takes ids" in notes(page)[0]


def test_what_the_model_wrote_is_told_apart(make_run):
    lm = make_run()
    ids = lm.tokenizer.encode("she ")
    [new] = lm.generate_ids([ids], 5)
    data = data_of(render(explain(lm, ids + new, written=5)))
    assert data["written"] == 5
    assert data["ids"].tolist() == ids + new


@pytest.mark.parametrize(
    "shape", [{}, {"n_layer": 12, "n_head": 12, "d_model": 48, "n_kv_head": 12}]
)
def test_thousands_of_tokens_stay_under_five_megabytes(make_lm, shape):
    lm = make_lm(tokenizer="byte", block_size=256, **shape)
    ids = np.random.default_rng(0).integers(0, 256, most_tokens(lm.config.n_layer) + 50).tolist()
    page = explain(lm, ids, written=60)
    html = render(page)
    assert 3_000_000 < len(html.encode()) < 5_000_000
    assert page.left_out == 50
    assert page.written == 10
    assert any("the last 50 tokens" in note for note in notes(page))
    assert any("Attention is shown of the first" in note for note in notes(page))
    data = data_of(html)
    assert not data["complete"]
    last = data["attended"] - 1
    assert np.abs(attention_in(data, last) - page.reading.attention[last]).max() < 1 / 255


def test_the_budgets_hold_for_every_model():
    """A page's size hangs on these two numbers; base64 makes four bytes of three."""
    assert 4 / 3 * (explained_module.MOST_WEIGHTS + explained_module.MOST_FIGURES) < 4_300_000
