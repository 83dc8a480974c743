import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_kit import python
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError, DataError, ResourceError
from octavo.text import tokenizer_json
from octavo.text.tokenizer import EOT, Tokenizer

GPT2_FINGERPRINT = "480ab6423ae132e82057c53f3b39b3debeeeefe14d912d970a60240f39547367"
KINDS = ["char", "char separated", "byte", "byte separated", "bpe", "gpt2"]


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="module")
def hugging_face(tokenizers, tmp_path_factory):
    """The same files, opened by transformers."""
    from transformers import PreTrainedTokenizerFast

    folder, opened = tmp_path_factory.mktemp("saved"), {}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / f"{name}.json")
        opened[name] = PreTrainedTokenizerFast(tokenizer_file=str(folder / f"{name}.json"))
    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_hugging_faces(kind, tokenizers, hugging_face, hard_texts):
    ours, theirs = tokenizers[kind], hugging_face[kind]
    for text in hard_texts.values():
        plain, special = ours.encode(text), ours.encode(text, special=True)
        assert plain == theirs.encode(text, split_special_tokens=True), text
        assert special == theirs.encode(text), text
        for ids in (plain, special):
            assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.vocab_size == len(theirs)


def test_ids_are_tiktokens(tokenizers, gpt2_files, hard_texts, tmp_path, monkeypatch):
    tiktoken = tiktoken_with_cache(gpt2_files, tmp_path, monkeypatch)
    theirs, ours = tiktoken.get_encoding("gpt2"), tokenizers["gpt2"]
    for text in hard_texts.values():
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    assert [ours.token_bytes(i) for i in range(50257)] == [
        theirs.decode_single_token_bytes(i) for i in range(50257)
    ]
    assert ours.encode("Hello world") == [15496, 995]  # as in every GPT-2 tutorial
    assert (ours.vocab_size, ours.eot_id) == (theirs.n_vocab, theirs.eot_token) == (50257, 50256)


def test_a_million_blanks_are_no_crash(tokenizers, hugging_face):
    """tiktoken's regular expressions give up there, and used to take the training run along."""
    text = "a" + " " * 1_000_001 + "b"
    assert tokenizers["gpt2"].encode(text) == hugging_face["gpt2"].encode(text)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(text, tokenizers):
    own = Tokenizer.char(text + "\n", separator=True)
    for tokenizer in (own, tokenizers["byte"], tokenizers["bpe"], tokenizers["gpt2"]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@given(data=st.data())
def test_a_stream_says_what_decode_says(data, tokenizers):
    """Of any ids, so of broken UTF-8 too: characters come whole or, at last, as U+FFFD."""
    tokenizer = tokenizers[data.draw(st.sampled_from(KINDS))]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    decoder = tokenizer.stream()
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_a_stream_never_gives_half_a_character(tokenizer, hard_texts):
    text = hard_texts["emoji"] + hard_texts["scripts"]
    decoder = tokenizer.stream()
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert decoder.flush() == ""


def test_an_unfinished_character_shows_at_the_end(tokenizers):
    decoder = tokenizers["byte"].stream()
    assert [decoder.push(byte) for byte in "a😀".encode()[:-1]] == ["a", "", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("b")) == "b"  # and is forgotten then


def test_a_saved_file_is_the_same_tokenizer(tokenizer, hard_texts, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    for name in ("kind", "vocab_size", "eot_id", "fingerprint"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    for text in hard_texts.values():
        assert again.encode(text) == tokenizer.encode(text)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """It used to be overwritten where it lay: a kill in between left half a tokenizer."""
    Tokenizer.char("ab").save(tmp_path)
    monkeypatch.setenv("OCTAVO_FAILPOINT", "tokenizer.json-prepared:full")
    with pytest.raises(ResourceError, match=r"cannot write .*tokenizer\.json"):
        Tokenizer.char("abc").save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_the_fingerprint_reads_past_white_space_and_order(tmp_path):
    tokenizer = Tokenizer.char("ab")
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    backwards = json.dumps(dict(reversed(spec.items())), indent=7)
    (tmp_path / "tokenizer.json").write_text(backwards, encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert Tokenizer.char("ac").fingerprint != tokenizer.fingerprint
    assert Tokenizer.char("ab", separator=True).fingerprint != tokenizer.fingerprint


def test_characters_are_numbered_as_nanogpt_does():
    tokenizer = Tokenizer.char("hello\n\t world")
    assert tokenizer.decode(range(tokenizer.vocab_size)) == "".join(sorted(set("hello\n\t world")))
    assert (tokenizer.kind, tokenizer.eot_id) == ("char", None)


def test_bytes_are_their_own_ids(tokenizers):
    text = "é😀\x00\r\n"
    assert tokenizers["byte"].encode(text) == list(text.encode())
    assert tokenizers["byte"].vocab_size == 256
    assert tokenizers["byte separated"].vocab_size == 257
    assert tokenizers["byte separated"].kind == tokenizers["byte"].kind == "byte"


def test_the_separator_is_plain_text_until_asked_for(tokenizers):
    for kind in ("char separated", "byte separated", "bpe", "gpt2"):
        tokenizer = tokenizers[kind]
        assert tokenizer.eot_id == tokenizer.vocab_size - 1
        assert tokenizer.eot_id not in tokenizer.encode(f"a{EOT}b")
        a, b = tokenizer.encode("a"), tokenizer.encode("b")
        assert tokenizer.encode(f"a{EOT}b", special=True) == [*a, tokenizer.eot_id, *b]
        assert tokenizer.encode(EOT, special=True) == [tokenizer.eot_id]
        assert tokenizer.decode([tokenizer.eot_id]) == EOT
        assert tokenizer.byte_lengths()[tokenizer.eot_id] == 0
    for kind in ("char", "byte"):
        assert tokenizers[kind].encode(EOT, special=True) == tokenizers[kind].encode(EOT)


def test_an_unseen_character_is_named():
    """The library drops it without a word: "naïve" became "nave"."""
    tokenizer = Tokenizer.char("nave")
    with pytest.raises(DataError, match=r"'ï' \(U\+00EF\).*position 2.*unseen=replace"):
        tokenizer.encode("naïve")
    with pytest.raises(DataError, match="'😀'"):
        tokenizer.encode("nave😀")


def test_an_unseen_character_is_replaced_when_asked(tokenizers, hugging_face, tmp_path):
    tokenizer = tokenizers["char replacing"]
    assert tokenizer.decode(tokenizer.encode("a😀b\ud83d é")) == "a\ufffdb\ufffd \ufffd"
    assert tokenizer.encode("a😀bé") == hugging_face["char replacing"].encode("a😀bé")
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("é") == tokenizer.encode("\ufffd")


def test_half_a_character_is_an_error_and_no_traceback(tokenizer):
    with pytest.raises(DataError, match=r"U\+D83D.*position 3"):
        tokenizer.encode("abc\ud83d")


def test_training_on_half_a_character():
    with pytest.raises(DataError, match=r"U\+DE00"):
        Tokenizer.char("ab\ude00")
    with pytest.raises(DataError, match=r"U\+DE00"):
        Tokenizer.train_bpe(["ab", "c\ude00"], 300)
    replacing = Tokenizer.char("ab\ude00", unseen="replace")
    assert replacing.decode(range(replacing.vocab_size)) == "ab\ufffd"


def test_nothing_to_learn_from():
    with pytest.raises(DataError, match="empty text"):
        Tokenizer.char("")
    assert Tokenizer.train_bpe([], 300).vocab_size == 257
    with pytest.raises(ConfigError, match="256 tokens"):
        Tokenizer.train_bpe(["text"], 256)


def test_ids_outside_the_vocabulary_mean_nothing(tokenizer):
    """Vocabularies are padded (50257 to 50304), and -1 is the last token of a Python list."""
    for outside in (-1, tokenizer.vocab_size, 50304):
        with pytest.raises(DataError, match=f"id {outside} is outside"):
            tokenizer.decode([outside])
        with pytest.raises(DataError, match="outside"):
            tokenizer.stream().push(outside)


def test_ids_never_wrap_around():
    """65,537 ids do not fit uint16: the last would silently be the first."""
    characters = "".join(chr(0x20000 + i) for i in range(2**16))
    fits, exceeds = Tokenizer.char(characters), Tokenizer.char(characters + "\U00030000")
    assert fits.encode_array(characters[-1]).dtype == np.uint16
    assert exceeds.encode_array("\U00030000").dtype == np.uint32
    assert fits.encode(characters[-1]) == [2**16 - 1]
    assert exceeds.encode("\U00030000") == [2**16]


def test_a_trained_bpe_is_reproducible_and_compresses():
    text = Path(tokenizer_json.__file__).read_text(encoding="utf-8")
    first, second = (Tokenizer.train_bpe([text, text], 500) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert (first.vocab_size, first.eot_id, first.kind) == (500, 499, "bpe")
    assert len(first.encode(text)) < 0.6 * len(text)


def test_a_long_text_is_learned_from_to_its_end():
    """It goes to the library in slices, which keep its memory bounded."""
    text = "the quick brown fox " * 10_000 + "zebra " * 20
    tokenizer = Tokenizer.train_bpe([text], 300)
    assert len(tokenizer.encode(" zebra")) == 1


def test_a_bpe_out_of_order_is_encoded_all_the_same(tokenizers, tmp_path):
    """tiktoken merges by id: where ids do not follow the merges it would give other tokens."""
    tokenizers["bpe"].save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    model, names = spec["model"], list(spec["model"]["vocab"])
    learned = names[256:-1]
    model["vocab"] |= dict(zip(learned, range(256 + len(learned) - 1, 255, -1), strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    shuffled, text = Tokenizer.load(tmp_path), Path(__file__).read_text(encoding="utf-8")
    assert [shuffled.token_bytes(i) for i in shuffled.encode(text)] == [
        tokenizers["bpe"].token_bytes(i) for i in tokenizers["bpe"].encode(text)
    ]


def third_party(family: str):
    """A small tokenizer as the family's published files describe theirs, made by the library."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, trainers
    from tokenizers import Tokenizer as Library
    from tokenizers import pre_tokenizers as cuts

    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    if family == "llama2":
        library = Library(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        library.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        library.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        library = Library(models.BPE(ignore_merges=family == "llama3"))
        library.normalizer = normalizers.NFC() if family == "qwen2" else None
        library.pre_tokenizer = cuts.Sequence(
            [cuts.Split(Regex(rule), "isolated"), cuts.ByteLevel(False, use_regex=False)]
        )
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=cuts.ByteLevel.alphabet(), show_progress=False
        )
    library.train_from_iterator(Path(__file__).read_text(encoding="utf-8").split("\n\n"), trainer)
    end = {"llama2": "</s>", "llama3": "<|end_of_text|>", "qwen2": EOT}[family]
    library.add_special_tokens([AddedToken(end, special=True), "<|im_start|>"])
    spec = json.loads(library.to_str())
    # The trainer takes bytes only as special tokens; in Llama's file they are plain vocabulary.
    added = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(spec | {"added_tokens": added}), end


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2"])
def test_other_peoples_files_load(family, tmp_path, hard_texts):
    from tokenizers import Tokenizer as Library

    text, end = third_party(family)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    ours, theirs = Tokenizer.load(tmp_path), Library.from_str(text)
    assert (ours.kind, ours.eot_id) == ("bpe", theirs.token_to_id(end))
    assert ours.vocab_size == theirs.get_vocab_size()
    texts = [t for name, t in hard_texts.items() if name not in ("sentencepiece", "special")]
    for sample in texts:
        ids = ours.encode(sample)
        assert ids == theirs.encode(sample, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)
        read = (" " + sample if sample else "") if family == "llama2" else theirs.decode(ids)
        assert ours.decode_bytes(ids) == read.encode()
    marked = f"a<|im_start|>b{end}c"
    assert ours.encode(marked, special=True) == theirs.encode(marked, add_special_tokens=False).ids
    assert ours.decode(ours.encode(marked)) == marked
    assert theirs.token_to_id(end) not in ours.encode(marked)


def broken(change):
    spec = tokenizer_json.byte_level_spec(
        {c: i for i, c in enumerate(tokenizer_json.byte_characters())}, []
    )
    change(spec)
    return json.dumps(spec)


BROKEN = {
    "not json": "{",
    "a list": "[]",
    "a number": "3",
    "nested too deep": "[" * 100_000,
    "empty": "",
    "no model": broken(lambda spec: spec.pop("model")),
    "no vocabulary": broken(lambda spec: spec["model"].pop("vocab")),
    "vocabulary as list": broken(lambda spec: spec["model"].update(vocab=["a"])),
    "empty vocabulary": broken(lambda spec: spec["model"].update(vocab={})),
    "text for an id": broken(lambda spec: spec["model"].update(vocab={"a": "0"})),
    "true for an id": broken(lambda spec: spec["model"].update(vocab={"a": True})),
    "negative id": broken(lambda spec: spec["model"].update(vocab={"a": -1})),
    "id of a billion": broken(lambda spec: spec["model"].update(vocab={"a": 10**9})),
    "half a character": broken(lambda spec: spec["model"].update(vocab={"\ud83d": 0})),
    "wordpiece": broken(lambda spec: spec["model"].update(type="WordPiece")),
    "unknown decoder": broken(lambda spec: spec.update(decoder={"type": "WordPiece"})),
    "no decoder": broken(lambda spec: spec.update(decoder=None)),
    "decoder as text": broken(lambda spec: spec.update(decoder="ByteLevel")),
    "broken added token": broken(lambda spec: spec.update(added_tokens=[{"id": 3}])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(BROKEN[name], encoding="utf-8")
    with pytest.raises(DataError, match=f"in {tmp_path}") as error:
        Tokenizer.load(path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_text_or_not_there(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            Tokenizer.load(path)


@pytest.mark.parametrize("family", ["llama2", "qwen2", "octavo"])
@pytest.mark.parametrize("merges", [[["no", "such"]], ["a"], [3], 3, None])
def test_merges_of_nothing_are_one_line_too(family, merges, tokenizers, tmp_path):
    """These only show when the file is put to use, which `load` therefore does."""
    spec = tokenizers["bpe"].spec if family == "octavo" else json.loads(third_party(family)[0])
    spec = spec | {"model": spec["model"] | {"merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(DataError, match=f"in {tmp_path}"):
        Tokenizer.load(tmp_path)


def tiktoken_with_cache(gpt2_files, cache, monkeypatch):
    """tiktoken, finding GPT-2's files where it keeps its downloads."""
    import tiktoken

    for name in tokenizer_json.GPT2_SHA256:
        key = hashlib.sha1((tokenizer_json.GPT2_URL + name).encode()).hexdigest()
        shutil.copy(gpt2_files / name, cache / key)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return tiktoken


def test_gpt2_from_either_pair_of_files_or_its_json(tokenizers, gpt2_files, tmp_path):
    shutil.copy(gpt2_files / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2_files / "vocab.bpe", tmp_path / "merges.txt")
    assert Tokenizer.load(tmp_path).fingerprint == GPT2_FINGERPRINT
    assert Tokenizer.load(gpt2_files).fingerprint == GPT2_FINGERPRINT
    tokenizers["gpt2"].save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == GPT2_FINGERPRINT


def test_gpt2_from_tiktokens_cache(gpt2_files, tmp_path, monkeypatch, no_network):
    tiktoken_with_cache(gpt2_files, tmp_path, monkeypatch)
    assert Tokenizer.gpt2().fingerprint == GPT2_FINGERPRINT
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path))
    assert Tokenizer.gpt2().fingerprint == GPT2_FINGERPRINT


def test_gpt2_downloads_once(gpt2_files, web, tmp_path, monkeypatch):
    url, folder = web
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(tokenizer_json, "GPT2_URL", url)
    for name in tokenizer_json.GPT2_SHA256:
        shutil.copy(gpt2_files / name, folder)
    assert Tokenizer.gpt2().fingerprint == GPT2_FINGERPRINT
    shutil.rmtree(folder)
    assert Tokenizer.gpt2().fingerprint == GPT2_FINGERPRINT


def test_gpt2_without_files_or_network(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ResourceError, match=r"encoder\.json.*TIKTOKEN_CACHE_DIR.*bpe") as error:
        Tokenizer.gpt2()
    assert error.value.exit_code == 6


def test_characters_and_bytes_need_no_library():
    """So a small run's first token does not wait for imports."""
    code = (
        "import sys; from octavo.text.tokenizer import Tokenizer\n"
        "for t in (Tokenizer.char('ab'), Tokenizer.byte(True)):\n"
        "    assert t.decode(t.encode('abba', special=True)) == 'abba'\n"
        "print(sorted({'torch', 'tiktoken', 'tokenizers', 'transformers'} & set(sys.modules)))"
    )
    assert python(code).stdout.strip() == "[]"


@settings(max_examples=30)
@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_broken_utf8_is_replaced_as_everywhere_else(ids, tokenizers, hugging_face):
    expected = bytes(ids).decode("utf-8", errors="replace")
    assert tokenizers["byte"].decode(ids) == expected == hugging_face["byte"].decode(ids)
