import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import DataError
from octavo.text.batches import Batches
from octavo.text.chat import ChatTemplate
from octavo.text.examples import IGNORE, Example, Examples, read_examples, split_examples
from octavo.text.tokenizer import EOT, Tokenizer

BYTES = Tokenizer.byte(separator=True)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *rows):
    """A .jsonl of the rows."""
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def learned(example, tokenizer=BYTES):
    """The text of the targets that count."""
    return tokenizer.decode(example.y[example.y != IGNORE])


def numbered(count):
    """Examples of lengths 1 to 4, each its own number."""
    return [Example(np.full(1 + i % 4, i), np.full(1 + i % 4, i)) for i in range(count)]


def test_only_the_completion_and_its_end_are_learned():
    write("a.jsonl", pair("2+2=", "4"), pair("Käse ", "ist 🧀"))
    first, second = read_examples("a.jsonl", "completion", BYTES, 64).examples
    assert BYTES.decode(first.x) == "2+2=4"
    assert first.y.tolist() == [IGNORE] * 3 + [ord("4"), BYTES.eot_id]
    assert learned(first) == "4" + EOT
    assert learned(second) == "ist 🧀" + EOT
    assert BYTES.decode([*second.x, second.y[-1]]) == "Käse ist 🧀" + EOT


@pytest.mark.parametrize("kind", ["char", "char separated", "byte", "bpe", "gpt2"])
def test_the_prompts_ids_are_those_of_the_prompt_alone(tokenizers, kind):
    """Generation encodes the prompt by itself: what is learned must come after just that."""
    tokenizer = tokenizers[kind]
    write("a.jsonl", pair("Say: ", "Hello, world!"))
    (example,) = read_examples("a.jsonl", "completion", tokenizer, 64).examples
    prompt = tokenizer.encode("Say: ")
    assert example.x[: len(prompt)].tolist() == prompt
    assert (example.y[: len(prompt) - 1] == IGNORE).all()
    assert (example.y[len(prompt) - 1 :] != IGNORE).all()
    end = EOT if tokenizer.eot_id is not None else ""
    assert learned(example, tokenizer) == "Hello, world!" + end


def test_without_a_prompt_a_text_begins_after_the_end_of_another():
    write("a.jsonl", pair("", "ab"))
    (example,) = read_examples("a.jsonl", "completion", BYTES, 8).examples
    assert BYTES.decode(example.x) == EOT + "ab"
    assert learned(example) == "ab" + EOT
    plain = read_examples("a.jsonl", "completion", Tokenizer.byte(), 8)
    assert learned(plain.examples[0]) == "b"  # nothing comes before the first
    assert plain.description.endswith("has no end-of-text token, so no end is learned")


def test_other_fields_and_csv():
    with open("rows.csv", "wb") as file:
        file.write(b"question,n,answer\r\nWhy?,1,So.\r\n")
    found = read_examples("rows.csv", "completion", BYTES, 64, fields=["question", "answer"])
    assert learned(found.examples[0]) == "So." + EOT
    with pytest.raises(DataError, match=r"names 1 field; .*have prompt and completion"):
        read_examples("rows.csv", "completion", BYTES, 64, fields=["question"])


def test_the_prompts_beginning_is_cut_off_and_said():
    write("a.jsonl", pair("abc", "de"), pair("b" * 10, "de"), pair("a", "0123456789"))
    found = read_examples("a.jsonl", "completion", BYTES, 5)
    short, cut, deep = found.examples
    assert BYTES.decode(short.x) == "abcde"
    assert BYTES.decode(cut.x) == "bbbde"
    assert learned(cut) == "de" + EOT
    assert learned(deep) == "6789" + EOT
    assert found.description == (
        f"read 1 file, {os.path.getsize('a.jsonl')} bytes, 3 examples, "
        "15 tokens, 11 to learn, from a.jsonl; "
        "2 cut on the left to 5 tokens, 1 of them into what is to be learned"
    )


def test_only_the_assistants_turns_are_learned():
    talk = [("system", "S"), ("user", "Hi"), ("assistant", "Yo"), ("user", "?"), ("assistant", "!")]
    messages = [{"role": role, "content": content} for role, content in talk]
    write("a.jsonl", {"messages": messages}, {"messages": [*messages, messages[1]]})
    first, second = read_examples("a.jsonl", "chat", BYTES, 99).examples
    assert learned(first) == f"Yo{EOT}!{EOT}"
    text = ChatTemplate.default(BYTES).render(messages)
    assert BYTES.decode([*first.x, first.y[-1]]) == text
    np.testing.assert_array_equal(first.x, second.x)  # an unanswered question teaches nothing
    np.testing.assert_array_equal(first.y, second.y)
    own = ChatTemplate("{% for m in messages %}{{ m.content }}|{% endfor %}")
    (named, _) = read_examples("a.jsonl", "chat", BYTES, 99, template=own).examples
    assert learned(named) == "Yo|!|"


def test_the_label_stands_at_the_last_token():
    write("a.jsonl", *[{"text": t, "label": n} for t, n in [("abc", 9), ("abcdefg", 10), ("z", 9)]])
    found = read_examples("a.jsonl", "labels", BYTES, 4)
    assert found.labels == ["10", "9"]
    assert [e.y.tolist() for e in found.examples] == [[-100, -100, 1], [-100] * 3 + [0], [1]]
    assert BYTES.decode(found.examples[1].x) == "defg"
    assert found.longest == 4
    assert found.description == (
        f"read 1 file, {os.path.getsize('a.jsonl')} bytes, 3 examples, "
        "8 tokens, 2 labels (10, 9), from a.jsonl; "
        "1 cut on the left to 4 tokens"
    )
    x, y = Examples(found.examples, 4, seed=0).all()
    assert x.tolist() == [[97, 98, 99, 0], [100, 101, 102, 103], [122, 0, 0, 0]]
    assert y.tolist() == [[-100, -100, 1, -100], [-100, -100, -100, 0], [1, -100, -100, -100]]
    assert x.dtype == y.dtype == np.int64


def test_labels_that_a_model_knows_keep_their_numbers():
    write("a.jsonl", {"text": "a", "label": "good"})
    found = read_examples("a.jsonl", "labels", BYTES, 4, labels=["bad", "fair", "good"])
    assert found.examples[0].y.tolist() == [2]
    assert found.labels == ["bad", "fair", "good"]
    with pytest.raises(DataError, match=r"line 1 has the label 'good', .*'bad', 'fair'"):
        read_examples("a.jsonl", "labels", BYTES, 4, labels=["bad", "fair"])


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        ("completion", {"prompt": "a"}, "no field 'completion'; .*data.fields; there: prompt"),
        ("completion", pair("a", ""), "an empty 'completion'"),
        ("completion", pair("a", 3), "no text under 'completion' but 3"),
        ("completion", pair("a", "\ud83d"), "half a character"),
        ("chat", {"text": "a"}, "no field 'messages'"),
        ("chat", {"messages": "a"}, "a conversation is a list"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "words of an assistant.* user"),
        ("chat", {"messages": [{"role": "assistant", "content": EOT}]}, "special token"),
        ("labels", {"text": "a"}, "no field 'label'"),
        ("labels", {"text": "a", "label": ""}, "an empty label"),
        ("labels", {"text": "a", "label": 0.5}, "no text under 'label' but 0.5"),
        ("labels", {"text": "", "label": "x"}, "an empty 'text'"),
        ("labels", {"text": 1, "label": "x"}, "no text under 'text'"),
    ],
)
def test_what_cannot_be_learned_names_its_line(kind, row, problem):
    good = {"messages": [{"role": "assistant", "content": "a"}], "text": "a", "label": "y"}
    write("a.jsonl", good | pair("a", "b"), row)
    with pytest.raises(DataError, match=f"line 2.*{problem}") as error:
        read_examples("a.jsonl", kind, BYTES, 16)
    assert "in a.jsonl" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 3


def test_a_character_the_tokenizer_never_saw_names_its_line():
    write("a.jsonl", pair("a", "b"), pair("a", "é"))
    with pytest.raises(DataError, match=r"line 2: the character 'é'.*in a.jsonl"):
        read_examples("a.jsonl", "completion", Tokenizer.char("ab"), 16)
    write("a.jsonl", pair("", "a"))
    with pytest.raises(DataError, match="line 1 is a single token"):
        read_examples("a.jsonl", "completion", Tokenizer.char("ab"), 16)


def test_one_label_is_nothing_to_tell_apart():
    write("a.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "x"})
    with pytest.raises(DataError, match=r"every record has the label 'x'; in a\.jsonl"):
        read_examples("a.jsonl", "labels", BYTES, 4)


def test_files_are_found_as_texts_are(tmp_path):
    (tmp_path / "sub").mkdir()
    write("sub/b.jsonl", pair("b", "B"))
    write("sub/a.jsonl", pair("a", "A"))
    (tmp_path / "sub" / "notes.txt").write_text("no records")
    folder = read_examples("sub", "completion", BYTES, 8)
    assert [learned(e)[0] for e in folder.examples] == ["A", "B"]
    listed = read_examples(["sub/b.jsonl", "sub/*.jsonl"], "completion", BYTES, 8)
    assert [learned(e)[0] for e in listed.examples] == ["B", "A"]
    data = b"".join((tmp_path / "sub" / n).read_bytes() for n in ("a.jsonl", "b.jsonl"))
    assert folder.sha256 == hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match=r"did you mean sub/a\.jsonl"):
        read_examples("sub/a.json", "completion", BYTES, 8)
    with pytest.raises(DataError, match=r"notes\.txt holds no records; give \.jsonl or \.csv"):
        read_examples("sub/notes.txt", "completion", BYTES, 8)
    write("empty.jsonl")
    with pytest.raises(DataError, match=r"no records; in empty\.jsonl"):
        read_examples("empty.jsonl", "completion", BYTES, 8)


@given(count=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
def test_an_epoch_shows_each_example_once(count, seed):
    examples = Examples(numbered(count), 4, seed)
    assert examples.windows == count
    for epoch in range(3):
        x, y = examples.rows(epoch * count, count)
        assert sorted(x[:, 0]) == list(range(count))
        np.testing.assert_array_equal(np.where(y == IGNORE, 0, y), x)


@given(data=st.data())
def test_rows_are_the_same_however_they_are_asked_for(data):
    examples = Examples(numbered(13), 5, seed=3)
    first, count = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 40))
    cut = data.draw(st.integers(0, count))
    whole = examples.rows(first, count)
    parts = examples.rows(first, cut), examples.rows(first + cut, count - cut)
    for i in range(2):
        assert whole[i].shape == (count, 5)
        np.testing.assert_array_equal(whole[i], np.concatenate([part[i] for part in parts]))


def test_the_order_is_that_of_windows_of_text():
    """One keyed permutation for both: what is known about one's order holds for the other's."""
    windows = Batches(np.arange(31), 1, seed=5).rows(7, 90)[0][:, 0]
    np.testing.assert_array_equal(Examples(numbered(30), 4, seed=5).rows(7, 90)[0][:, 0], windows)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_the_split_draws_from_a_sorted_file(fraction):
    """The last tenth of a file sorted by label has one label, and training misses it."""
    examples = numbered(1000)
    train, val = split_examples(examples, fraction)
    numbers = [[int(e.x[0]) for e in part] for part in (train, val)]
    assert len(val) == 1000 * fraction
    assert sorted(numbers[0] + numbers[1]) == list(range(1000))
    assert numbers == [sorted(part) for part in numbers]
    if val:
        assert abs(np.mean(numbers[1]) - 500) < 100
    assert split_examples(examples, fraction)[0] == train  # always the same draw


def test_no_examples():
    with pytest.raises(DataError, match="no examples"):
        Examples([], 4, seed=0)
