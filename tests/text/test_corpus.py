import hashlib
import io
import json
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.config import DataConfig
from octavo.errors import ConfigError, DataError, ResourceError
from octavo.text import corpus as module
from octavo.text.corpus import Corpus, choose_tokenizer, read_corpus, split, tokenize
from octavo.text.tokenizer import EOT, Tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with a folder of texts made in the wrong order."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    (texts / "b.txt").write_text("bee", encoding="utf-8")
    (texts / "sub" / "a.md").write_text("see", encoding="utf-8")
    (texts / "a.TXT").write_text("ay", encoding="utf-8")
    return tmp_path


def piped(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))


def test_a_file_is_read_to_the_byte(folder):
    """Line ends, blanks, accents and all; Python's text mode would have changed four of these."""
    data = "one\r\ntwo\n\rthree\u2028 é😀\t\x0c\n\n".encode()
    (folder / "my.txt").write_bytes(data)
    corpus = read_corpus("my.txt")
    assert corpus.text.encode() == data
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()
    assert corpus.name == "my.txt"
    assert corpus.description == "read 1 file, 29 bytes, 23 characters, from my.txt"


def test_a_byte_order_mark_is_no_text(folder):
    mark = b"\xef\xbb\xbf"
    (folder / "bom.txt").write_bytes(mark + mark + b"hello" + mark)
    assert read_corpus("bom.txt").text == "\ufeffhello\ufeff"  # only the first says: UTF-8


def test_a_folder_is_read_in_sorted_order_without_what_is_no_text(folder):
    (folder / "texts" / "picture.png").write_bytes(b"\x89PNG\x00")
    (folder / "texts" / "LICENSE").write_bytes(b"not known to be text")
    (folder / "texts" / ".hidden.txt").write_text("hidden")
    (folder / "texts" / ".git").mkdir()
    (folder / "texts" / ".git" / "log.txt").write_text("hidden")
    corpus = read_corpus("texts")
    assert corpus.documents == ["ay", "bee", "see"]
    assert corpus.text == "ay\n\nbee\n\nsee"
    assert corpus.description == (
        "read 3 files, 8 bytes, 12 characters, from texts; "
        "passed over 2 files (without a suffix, .png)"
    )


@pytest.mark.parametrize(
    ("source", "documents"),
    [
        ("texts/*.txt", ["bee"]),
        ("texts/**/*.*", ["ay", "bee", "see"]),
        (["texts/sub/a.md", "texts/b.txt"], ["see", "bee"]),
        (["texts/b.txt", "texts", "texts/b.txt"], ["bee", "ay", "see"]),
        (["texts/[ab].*", "-"], ["ay", "bee", "piped"]),
    ],
)
def test_globs_and_lists(folder, monkeypatch, source, documents):
    piped(monkeypatch, b"piped")
    assert read_corpus(source).documents == documents


def test_a_file_whose_name_looks_like_a_glob(folder):
    (folder / "a[1].txt").write_text("found")
    assert read_corpus("a[1].txt").text == "found"


def test_standard_input(monkeypatch):
    piped(monkeypatch, "pipéd\r\n".encode())
    corpus = read_corpus("-")
    assert (corpus.text, corpus.name) == ("pipéd\r\n", "standard input")
    assert corpus.description == "read standard input, 8 bytes, 7 characters"
    piped(monkeypatch, b"ab\xff")
    with pytest.raises(DataError, match=r"byte 2 \(0xff\).*standard input"):
        read_corpus("-")


def test_json_lines(folder):
    records = [{"id": 1, "text": "one\u2028é"}, {"text": "two", "id": 2}, {"text": "", "id": 3}]
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n"
    (folder / "a.jsonl").write_bytes(lines.encode())
    corpus = read_corpus("a.jsonl")
    assert corpus.documents == ["one\u2028é", "two"]
    assert corpus.description.endswith(", 10 characters, 2 documents, from a.jsonl")


def test_csv_columns(folder):
    long = "x" * 200_000  # the csv module stops at 131,072 unless told otherwise
    (folder / "a.csv").write_bytes(f'id,body\r\n1,"a ""b"",\r\nc"\r\n\r\n2,{long}\r\n'.encode())
    assert read_corpus("a.csv", field="body").documents == ['a "b",\r\nc', long]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", '{"id": 1, "body": "x"}', r"line 1 has no field 'text'.*there: id, body"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": ', r"line 3 is no JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]', r"line 2 is no JSON object"),
        ("a.jsonl", '{"text": ["x"]}', r"line 1 has no text under 'text' but \['x'\]"),
        ("a.jsonl", '{"text": "x\\ud83d"}', r"line 1 has half a character"),
        ("a.jsonl", "[" * 100_000, r"line 1 is no JSON"),
        ("a.csv", "id,body\n1,x\n", r"line 2 has no field 'text'.*there: id, body"),
        ("a.csv", "id,text\n1,x\n2\n", r"line 3 has not the header's 2 columns"),
        ("a.csv", "id,text\n1,x,y\n", r"line 2 has not the header's 2 columns"),
        ("a.csv", 'id,text\n1,"x"y\n', r"line 2 is no CSV"),
        ("a.csv", 'id,text\n1,"x', r"line 2 is no CSV"),
    ],
)
def test_broken_records_name_their_line(folder, name, data, problem):
    (folder / name).write_text(data, encoding="utf-8")
    with pytest.raises(DataError, match=problem) as error:
        read_corpus(name)
    assert f"in {name}" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no text"),
        (b"\xef\xbb\xbf", "no text"),
        (b"a", "a single character"),
        (b"abc\x00def", r"byte 3 \(0x00\)"),
        (b"abcdef\xe9 latin", r"byte 6 \(0xe9\)"),
        ("UTF-16".encode("utf-16"), r"byte 3 \(0x00\)"),
        (b"\xef\xbb\xbf\xff", r"byte 3 \(0xff\)"),
        (b"\xed\xa0\xbd", r"byte 0 \(0xed\)"),  # a surrogate in UTF-8's clothes
    ],
)
def test_what_is_no_text(folder, data, problem):
    (folder / "bad.txt").write_bytes(data)
    with pytest.raises(DataError, match=problem) as error:
        read_corpus("bad.txt")
    assert "in bad.txt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "guess"),
    [
        ("texts/c.txt", r"texts/b\.txt"),
        ("text", "texts"),
        ("shakespear", "shakespeare"),
        ("python_docs", "python-docs"),
        ("nowhere/at/all.txt", "name a file, a folder or python-docs"),
        ("texts/*.zip", None),
        ("a\x00b", None),
        ("x" * 5000, None),
    ],
)
def test_a_missing_text_names_what_is_there(folder, source, guess):
    with pytest.raises(DataError, match=guess or "there is no text"):
        read_corpus(source)


def test_a_folder_without_text_says_so(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").touch()
    with pytest.raises(DataError, match=r"no text among 1 file; in the folder pictures"):
        read_corpus("pictures")


def test_nothing_named_is_the_seeds_input_or_python_docs(folder, monkeypatch):
    monkeypatch.setattr(module, "python_docs", lambda: ["topic", "docstring é"])
    corpus = read_corpus(None)
    assert (corpus.name, corpus.text) == ("python-docs", "topic\n\ndocstring é")
    version = ".".join(map(str, sys.version_info[:3]))
    assert corpus.description == (
        f"read the documentation of Python {version}, 17 bytes, 18 characters, 2 documents"
    )
    (folder / "data").mkdir()
    (folder / "data" / "input.txt").write_text("mine")
    assert (read_corpus(None).name, read_corpus(None).text) == ("data/input.txt", "mine")
    assert read_corpus("python-docs").text == "topic\n\ndocstring é"


def test_shakespeare_is_downloaded_once(web, monkeypatch):
    url, web_folder = web
    data = b"First Citizen:\n"
    (web_folder / "input.txt").write_bytes(data)
    monkeypatch.setattr(module, "SHAKESPEARE_URL", url + "input.txt")
    monkeypatch.setattr(module, "SHAKESPEARE_SHA256", hashlib.sha256(data).hexdigest())
    assert read_corpus("shakespeare").text == "First Citizen:\n"
    (web_folder / "input.txt").unlink()
    corpus = read_corpus("shakespeare")
    assert corpus.description == "read Tiny Shakespeare, 15 bytes, 15 characters"


def test_shakespeare_is_never_replaced_by_something_else(no_network):
    with pytest.raises(ResourceError, match="python-docs") as error:
        read_corpus("shakespeare")
    assert error.value.exit_code == 6


@given(length=st.integers(2, 10_000), fraction=st.floats(0, 0.9))
def test_the_split_is_contiguous_and_disjoint(length, fraction):
    tokens = np.arange(length)
    train, val = split(tokens, fraction)
    np.testing.assert_array_equal(np.concatenate([train, val]), tokens)
    assert abs(len(val) - length * fraction) <= 1
    assert np.shares_memory(train, tokens)  # views: no second copy of a large text


def test_the_split_of_tiny_shakespeare_is_nanogpts():
    train, val = split(np.zeros(1_115_394, dtype=np.uint8), 0.1)
    assert (len(train), len(val)) == (1_003_854, 111_540)


CORPUS = Corpus("two", ["ab", f"c{EOT}\n"], "")


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("separator", [True, False])
def test_the_separator_stands_between_documents_and_nowhere_else(kind, separator):
    tokenizer = choose_tokenizer(CORPUS, DataConfig(tokenizer=kind, separator=separator))
    tokens = tokenize(CORPUS, tokenizer)
    assert tokens.dtype == np.uint16
    if separator or kind == "bpe":
        assert (tokens == tokenizer.eot_id).sum() == 1
        before, after = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))
        assert [tokenizer.decode(before), tokenizer.decode(after[1:])] == CORPUS.documents
    else:
        assert tokenizer.decode(tokens) == CORPUS.text


def test_the_tokenizer_is_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("char", "byte", "bpe"):
        assert choose_tokenizer(CORPUS, DataConfig(tokenizer=kind)).kind == kind
    assert choose_tokenizer(CORPUS, DataConfig()).kind == "char"
    monkeypatch.setattr(module, "CHAR_BELOW", len(CORPUS.text.encode()))
    assert choose_tokenizer(CORPUS, DataConfig()).kind == "bpe"
    Tokenizer.byte(separator=True).save("own.json")
    assert choose_tokenizer(CORPUS, DataConfig(tokenizer="own.json")).vocab_size == 257
    replacing = choose_tokenizer(CORPUS, DataConfig(tokenizer="char", unseen="replace"))
    assert replacing.decode(replacing.encode("aé")) == "a\ufffd"
    larger = Corpus("repeats", ["many words, many words, many words"], "")
    trained = choose_tokenizer(larger, DataConfig(tokenizer="bpe", bpe_vocab_size=260))
    assert trained.vocab_size == 260


@pytest.mark.parametrize(
    ("name", "guess"),
    [("chra", "char"), ("gpt-2", "gpt2"), ("own.jsn", "own.json"), ("%", "a path")],
)
def test_an_unknown_tokenizer_names_the_nearest(tmp_path, monkeypatch, name, guess):
    monkeypatch.chdir(tmp_path)
    Tokenizer.byte().save("own.json")
    with pytest.raises(ConfigError, match=guess):
        choose_tokenizer(CORPUS, DataConfig(tokenizer=name))


def test_gpt2_is_found_by_name(gpt2_files, monkeypatch):
    monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls: cls.load(gpt2_files)))
    assert choose_tokenizer(CORPUS, DataConfig(tokenizer="gpt2")).vocab_size == 50257
