"""A prepared dataset holds what tokenizing everything in one go gives, however the text came."""

import csv
import gzip
import io
import json
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError, DataError, OctavoError, ResourceError
from octavo.text import hub, pipeline, streaming, tokenizer_json
from octavo.text.prepare_request import Request
from octavo.text.preparing import prepare
from octavo.text.shards import Dataset, verify
from octavo.text.streaming import after_word, digest
from octavo.text.tokenizer import Tokenizer

DOCUMENTS = [
    f"Document {n}: " + "all work and no play; " * (n % 5 + 1) + "é 👍🏽\n" for n in range(60)
]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Every border there is, many times: of batches, of stretches of a text, of shards."""
    monkeypatch.setattr(pipeline, "BATCH", 500)
    monkeypatch.setattr(streaming, "STRETCH", 64)


@pytest.fixture
def texts(tmp_path, hard_texts):
    """A .jsonl of documents that have broken tokenizers, and many plain ones."""
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in (*hard_texts.values(), *DOCUMENTS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def request(out, *sources, **asked):
    asked = {"tokenizer": "byte", "shard_tokens": 700, "processes": 1} | asked
    return Request([str(source) for source in sources], out, **asked)


def part(dataset, split):
    return np.asarray(dataset.tokens(split)).tolist()


def documents(dataset, split="train"):
    """The texts of a part, cut at the end-of-text tokens."""
    eot, found, begin = dataset.eot_id, [], 0
    ids = part(dataset, split)
    for end in (place for place, id in enumerate(ids) if id == eot):
        found.append(dataset.tokenizer.decode(ids[begin:end]))
        begin = end + 1
    assert begin == len(ids), "a document without its end"
    return found


def files(home):
    return {path.name: path.read_bytes() for path in home.iterdir()}


def for_validation(text, fraction):
    return int.from_bytes(digest(text.encode()).digest(), "little") < fraction * 2**64


def write(path, documents):
    """The documents as a file of the kind its name says."""
    if ".jsonl" in path.name:
        data = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in documents).encode()
    elif ".csv" in path.name:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["n", "text"], *([1, text] for text in documents)])
        data = file.getvalue().encode()
    elif path.suffix == ".parquet":
        import pyarrow as arrow
        from pyarrow import parquet

        table = arrow.table({"n": [1] * len(documents), "text": documents})
        parquet.write_table(table, path, row_group_size=7)
        return path
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def hub_of(folder):
    """A dataset that Hugging Face's library reads, without a network, as those of its hub."""
    (folder / "hub").mkdir()
    write(folder / "hub" / "a.parquet", DOCUMENTS)
    return f"hf:{folder / 'hub'}"


@pytest.mark.parametrize(
    ("kind", "format"), [("byte", "bin"), ("char", "npy"), ("bpe", "npy"), ("gpt2", "npy")]
)
def test_tokens_are_those_of_each_document_and_an_end(tmp_path, texts, gpt2_files, kind, format):
    asked = {"tokenizer": str(gpt2_files) if kind == "gpt2" else kind, "format": format}
    dataset = prepare(request(tmp_path / "out", texts, val_fraction=0.2, vocab_size=300, **asked))
    verify(Dataset.open(tmp_path / "out"))
    tokenizer, expected = dataset.tokenizer, {False: [], True: []}
    everything = [json.loads(line)["text"] for line in texts.read_text("utf-8").splitlines()]
    for text in filter(None, everything):
        expected[for_validation(text, 0.2)] += [*tokenizer.encode(text), tokenizer.eot_id]
    assert part(dataset, "train") == expected[False]
    assert part(dataset, "val") == expected[True]
    assert dataset.report["documents"] == len(everything) - dataset.report["empty"]
    assert dataset.report["empty"] == 1
    for split in ("train", "val"):
        sizes = [shard["tokens"] for shard in dataset.shards if shard["split"] == split]
        assert all(size == 700 for size in sizes[:-1])


def test_the_number_of_processes_changes_nothing(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(pipeline, "SMALL", 0)
    for processes in (1, 2):
        prepare(request(tmp_path / f"{processes}", texts, val_fraction=0.1, processes=processes))
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.parametrize("name", ["byte", "gpt2", "char"])
def test_a_long_text_read_in_stretches_has_the_tokens_of_the_whole(
    tmp_path, hard_texts, gpt2_files, name
):
    """A token must not be cut by the border of two stretches, nor see the text end there."""
    text = " ".join(hard_texts.values()).replace("\0", "") * 3
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    tokenizer = str(gpt2_files) if name == "gpt2" else name
    asked = {"tokenizer": tokenizer, "val_fraction": 0, "shard_tokens": 10_000}
    dataset = prepare(request(tmp_path / "out", path, **asked))
    assert part(dataset, "train") == [*dataset.tokenizer.encode(text), dataset.eot_id]


def test_a_text_is_not_cut_where_a_token_might_go_on(tmp_path):
    """Without GPT-2's rules one token may hold a blank and what stands before it."""
    names = [*tokenizer_json.byte_characters(), "aĠ"]
    vocab = {name: number for number, name in enumerate(names)}
    spec = tokenizer_json.byte_level_spec(vocab, [("a", "Ġ")])
    spec["pre_tokenizer"]["use_regex"] = False
    Tokenizer(spec).save(tmp_path / "own.json")
    (tmp_path / "long.txt").write_text("a " * 200, encoding="utf-8")
    asked = {"tokenizer": str(tmp_path / "own.json"), "val_fraction": 0}
    dataset = prepare(request(tmp_path / "out", tmp_path / "long.txt", **asked))
    assert part(dataset, "train") == [256] * 200


@settings(max_examples=300)
@given(text=st.text(alphabet=st.sampled_from("ab'1. \n\t\r\x1c\u00a0\u3000é👍"), max_size=40))
def test_after_a_word_a_text_may_be_cut(tokenizers, text):
    for name in ("gpt2", "bpe"):
        cut, encode = after_word(text), tokenizers[name].encode
        assert encode(text[:cut]) + encode(text[cut:]) == encode(text)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "folder", "hub"]
)
def test_documents_are_the_same_whatever_they_come_in(tmp_path, name):
    source = tmp_path / name
    if name == "folder":
        source.mkdir()
        for number, text in enumerate(DOCUMENTS):
            (source / f"{number:02}.txt").write_text(text, encoding="utf-8")
    elif name == "hub":
        source = hub_of(tmp_path)
    else:
        write(source, DOCUMENTS)
    dataset = prepare(request(tmp_path / "out", source, val_fraction=0.2))
    assert documents(dataset) == [t for t in DOCUMENTS if not for_validation(t, 0.2)]
    assert documents(dataset, "val") == [t for t in DOCUMENTS if for_validation(t, 0.2)]
    assert documents(dataset, "val")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "hub", "a.txt"])
def test_reading_goes_on_behind_any_piece(tmp_path, name):
    if name == "hub":
        source = streaming.Source(hub_of(tmp_path), "hub", tmp_path)
    elif name == "a.txt":
        (tmp_path / name).write_text("".join(DOCUMENTS), encoding="utf-8")
        (source,) = streaming.find_sources([str(tmp_path / name)], tmp_path)
    else:
        (source,) = streaming.find_sources([str(write(tmp_path / name, DOCUMENTS))], tmp_path)
    every = list(streaming.read(source, "text", after_word))
    for number in range(0, len(every), 9):
        position = json.loads(json.dumps(every[number].position))
        rest = list(streaming.read(source, "text", after_word, position))
        text = [piece.text + "|" * (name != "a.txt") for piece in rest]  # borders may be others
        assert "".join(text) == "".join(
            p.text + "|" * (name != "a.txt") for p in every[number + 1 :]
        )
        if source.kind in ("jsonl", "csv", "parquet"):  # lines are counted on, too
            assert [p.position for p in rest] == [p.position for p in every[number + 1 :]]


def test_standard_input_is_one_text_whose_end_is_for_validation(tmp_path, monkeypatch):
    text = "".join(DOCUMENTS)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    dataset = prepare(request(tmp_path / "out", "-", val_fraction=0.1))
    (train,), (val,) = documents(dataset), documents(dataset, "val")
    assert train + val == text
    assert train.endswith("\n")
    assert 0.05 < len(val) / len(text) <= 0.1
    said = []
    prepare(request(tmp_path / "out", "-", val_fraction=0.1), said.append)
    assert said == [f"{tmp_path / 'out'} is prepared already"]


def test_a_text_without_lines_is_cut_between_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é" * 99, encoding="utf-8")
    dataset = prepare(request(tmp_path / "out", path, val_fraction=0.25))
    assert documents(dataset) == ["é" * 74]
    assert documents(dataset, "val") == ["é" * 25]


def test_equal_documents_never_lie_in_both_parts_and_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [text for text in DOCUMENTS for _ in range(3)])
    dataset = prepare(request(tmp_path / "all", path, val_fraction=0.3))
    assert dataset.report["duplicates"] == 120
    assert not set(documents(dataset)) & set(documents(dataset, "val"))
    assert len(documents(dataset)) + len(documents(dataset, "val")) == 180
    once = prepare(request(tmp_path / "once", path, val_fraction=0.3, drop_duplicates=True))
    assert documents(once) == [t for t in DOCUMENTS if not for_validation(t, 0.3)]
    assert once.report["duplicates"] == 120
    assert once.report["documents"] == 60


def test_a_long_text_that_came_before_is_left_out_whole(tmp_path):
    """The decision is made at its first stretch and holds to its last."""
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("".join(DOCUMENTS) + "c" * (name == "c.txt"), "utf-8")
    asked = {"val_fraction": 0, "drop_duplicates": True}
    dataset = prepare(request(tmp_path / "out", *sorted(tmp_path.glob("*.txt")), **asked))
    assert documents(dataset) == ["".join(DOCUMENTS), "".join(DOCUMENTS) + "c"]


def test_validation_of_its_own_wins_over_training(tmp_path):
    train, val = write(tmp_path / "t.jsonl", DOCUMENTS), write(tmp_path / "v.csv", DOCUMENTS[:9])
    asked = {"val": [str(val)], "limit": 20}
    dataset = prepare(request(tmp_path / "out", train, drop_duplicates=True, **asked))
    assert documents(dataset, "val") == DOCUMENTS[:9]
    assert documents(dataset) == DOCUMENTS[9:20]
    both = prepare(request(tmp_path / "both", train, **asked))
    assert documents(both) == DOCUMENTS[:20]
    assert both.report["overlap"]["validation"]["share"] == 1
    with pytest.raises(ConfigError, match="would be trained on and validated"):
        prepare(request(tmp_path / "same", train, val=[str(train)]))


def test_ids_beyond_65535_are_not_wrapped(tmp_path):
    path = tmp_path / "a.txt"
    letters = [chr(n) for n in range(0x20, 0x1_2000) if not 0xD800 <= n < 0xE000]
    path.write_text("".join(letters), encoding="utf-8")
    asked = {"tokenizer": "char", "val_fraction": 0, "shard_tokens": 50_000}
    dataset = prepare(request(tmp_path / "out", path, **asked))
    assert len(letters) > 2**16
    assert {shard["dtype"] for shard in dataset.shards} == {"uint32"}
    assert part(dataset, "train") == [*dataset.tokenizer.encode("".join(letters)), len(letters)]


def test_what_is_no_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait \xff\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "half \\ud83d"}\n')
    dataset = prepare(request(tmp_path / "out", tmp_path, val_fraction=0))
    assert documents(dataset) == ["caf� au lait �\n", "caf�", "half �"]
    assert dataset.report["repaired"] == 4


def test_the_report_tells_shares_and_what_stands_in_both_parts(tmp_path):
    text = "the quick brown fox jumps over the lazy dog and runs away. "
    write(tmp_path / "a.jsonl", [text, "nothing of this is in the other one, I am sure"])
    write(tmp_path / "b.jsonl", ["something else entirely, for the share of it"])
    items = [{"ctx": "the quick brown", "endings": ["fox jumps", "xyzzy! xyzzy! xyzzy!"]}]
    bench = tmp_path / "bench"
    bench.write_text("".join(json.dumps(item) for item in items), encoding="utf-8")
    bench = bench.rename(tmp_path / "bench.jsonl")
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    dataset = prepare(request(tmp_path / "out", *names, val_fraction=0, benchmarks=[str(bench)]))
    report = dataset.report
    assert report["overlap"]["validation"] == {"ngrams": 0, "share": None, "sampled": 1.0}
    found = report["overlap"][str(bench)]
    first, second = "the quick brown fox jumps", "the quick brown xyzzy! xyzzy! xyzzy!"
    ngrams = {t[i : i + 13] for t in (first, second) for i in range(len(t) - 12)}
    assert found["ngrams"] == len(ngrams)
    assert found["share"] == pytest.approx(sum(n in text for n in ngrams) / len(ngrams))
    assert sum(report["tokens_of"].values()) == len(dataset.tokens("train"))
    assert (
        report["tokens_of"][str(names[1])]
        == len("something else entirely, for the share of it") + 1
    )


def test_only_so_many_documents(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    dataset = prepare(request(tmp_path / "out", path, limit=17, val_fraction=0))
    assert documents(dataset) == DOCUMENTS[:17]


def test_a_directory_is_for_one_request(tmp_path):
    path, out = write(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out"
    prepare(request(out, path))
    before, said = files(out), []
    prepare(request(out, path, processes=2, benchmarks=[str(path)]), said.append)
    assert "prepared already" in said[0]
    assert files(out) == before
    with pytest.raises(ConfigError, match=r"val_fraction was 0.01, now 0.5"):
        prepare(request(out, path, val_fraction=0.5))
    write(path, DOCUMENTS[:-1])
    with pytest.raises(ConfigError, match=r"a\.jsonl was changed, added or left out"):
        prepare(request(out, path))
    assert files(out) == before


def test_an_attempt_that_did_nothing_binds_nobody(tmp_path):
    """After `--field` was forgotten the right command must not be refused."""
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"has no field 'content'; .*there: n, text"):
        prepare(request(tmp_path / "out", path, field="content"))
    assert not (tmp_path / "out").exists()
    assert documents(prepare(request(tmp_path / "out", path, val_fraction=0))) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON.*a.jsonl"),
        ("a.jsonl", b'["text"]\n', "line 1 is no JSON object"),
        ("a.jsonl", b'{"body": "a", "n": 1}\n', "no field 'text'.*there: body, n"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has no text under 'text' but 5"),
        ("a.csv", b"n,body\n1,a\n", "line 2 has no field 'text'.*there: n, body"),
        ("a.csv", b"n,text\n1\n", "line 2 has not the header's 2 columns"),
        ("a.csv", b'n,text\n1,"a\n', "is no CSV"),
        ("a.jsonl.gz", b"no gzip", "cannot read .*a.jsonl.gz: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "abc"}' * 999, mtime=0)[:30],
            "cannot read .*a.jsonl.gz",
        ),
        ("a.parquet", b"PAR1 and nothing", "this is no parquet"),
        ("a.txt", b"abc\0def", "byte 3 is NUL: this is no text"),
        ("a.txt.gz", b"", "packed are read .jsonl.gz and .csv.gz"),
        ("a.txt", b"", "there is no text"),
        ("a.jsonl", b"\n\n", "there is no text"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "there is no text"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        prepare(request(tmp_path / "out", tmp_path / name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "there"), [("body", "no column 'body'.*there: n, text"), ("n", "holds no text")]
)
def test_a_parquet_without_the_column_lists_those_it_has(tmp_path, field, there):
    path = write(tmp_path / "a.parquet", DOCUMENTS)
    with pytest.raises(DataError, match=there):
        prepare(request(tmp_path / "out", path, field=field))


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, name in ((run, "config.yaml"), (other, "holiday.jpg")):
        folder.mkdir()
        (folder / name).touch()
    for out, message in ((run, "is a run"), (other, "holds holiday.jpg"), (path, "is a file")):
        with pytest.raises(ConfigError, match=message):
            prepare(request(out, path))
    assert [p.name for p in other.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"val_fraction": 1.0}, "val-fraction is 1.0"),
        ({"shard_tokens": 0}, "shard-tokens is 0"),
        ({"tokenizer": "gtp2"}, "did you mean gpt2"),
        ({"tokenizer": "bpe", "vocab_size": 5}, "BPE of 5 tokens"),
    ],
)
def test_a_request_that_cannot_be_is_refused(tmp_path, asked, message):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(ConfigError, match=message):
        prepare(request(tmp_path / "out", path, **asked))
    assert not (tmp_path / "out").exists()


def test_without_a_network_a_dataset_elsewhere_fails_at_once(tmp_path, no_network):
    """The library itself would try for half a minute, and print a line for each time."""
    for source in ("fineweb-edu", "hf:nobody/nothing"):
        with pytest.raises(ResourceError, match=r"Network is unreachable; .*name local files"):
            prepare(request(tmp_path / "out", source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rest", [":there-is-none", "::test"])
def test_a_configuration_or_split_that_is_none(tmp_path, rest):
    with pytest.raises(ConfigError, match="Available"):
        prepare(request(tmp_path / "out", hub_of(tmp_path) + rest))


def test_a_network_that_breaks_keeps_what_was_done(tmp_path, monkeypatch):
    source = hub_of(tmp_path)
    asked = request(tmp_path / "out", source, val_fraction=0.1)
    real = hub.rows

    def breaking(source, position):
        for number, row in enumerate(real(source, position)):
            if number == 40:
                raise ResourceError("reading failed: Connection reset", fix=hub.LOCALLY)
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(hub, "rows", breaking)
        with pytest.raises(OctavoError, match=r"Connection reset.*what was done is kept"):
            prepare(asked)
    said = []
    dataset = prepare(asked, said.append)
    assert said[0].startswith("going on after ")
    prepare(request(tmp_path / "straight", source, val_fraction=0.1))
    assert files(tmp_path / "straight") == files(tmp_path / "out")
    assert Tokenizer.load(dataset.home).fingerprint == dataset.tokenizer_sha256


@pytest.mark.parametrize("inside", [False, True])
def test_ctrl_c_keeps_what_was_done_but_no_half_batch(tmp_path, monkeypatch, inside):
    """Saved is what was done; not in the middle of a batch, whose tokens would come twice."""
    path, calls = write(tmp_path / "a.jsonl", DOCUMENTS), []
    real_show, real_append = pipeline.Preparation._show, pipeline.ShardWriter.append

    def show(*arguments):
        calls.append("batch")
        if len(calls) == 4 and not inside:
            raise KeyboardInterrupt
        real_show(*arguments)

    def append(*arguments):
        real_append(*arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt

    asked = {"val_fraction": 0.1, "shard_tokens": 10**6}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Preparation, "_show", show)
        patch.setattr(pipeline.ShardWriter, "append", append)
        with pytest.raises(KeyboardInterrupt):
            prepare(request(tmp_path / "out", path, **asked))
    said = []
    prepare(request(tmp_path / "out", path, **asked), said.append)
    assert said[0].startswith("reading" if inside else "going on after 0 shards, ")
    prepare(request(tmp_path / "straight", path, **asked))
    assert files(tmp_path / "straight") == files(tmp_path / "out")
