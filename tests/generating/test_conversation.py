"""A conversation asks the model what one would ask by hand, and says what it forgets."""

import json

import pytest
from run_kit import LETTERS, TALKING, make_run

import octavo
from octavo.errors import ConfigError
from octavo.generating.conversation import Conversation
from octavo.generating.sampling import Sampling
from octavo.text.chat import ChatTemplate, encode_chat

SAMPLING = Sampling(temperature=0.7, seed=5)


@pytest.fixture
def talker(tmp_path):
    return octavo.load(make_run(tmp_path / "talker", TALKING, chat=True, block_size=128))


@pytest.fixture
def base(tmp_path):
    return octavo.load(make_run(tmp_path / "base", LETTERS, block_size=32))


def begun(lm, *turns, length=12):
    """A conversation in which this was said."""
    conversation = Conversation(lm, SAMPLING, length, [])
    conversation.turns = [
        {"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)
    ]
    return conversation


def typing(monkeypatch, *lines):
    """What `input` gives, and then its end."""
    left = iter(lines)

    def next_line(prompt):
        for line in left:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", next_line)


def test_each_answer_goes_on_from_all_that_was_said_before(talker, capsys):
    conversation, template = begun(talker), ChatTemplate.default(TALKING)
    for message in ("abc", "hi", "see me"):
        turns = [*conversation.turns, {"role": "user", "content": message}]
        ids, _ = encode_chat(TALKING, template, turns)
        (new,) = talker.generate_ids([ids], 12, temperature=0.7, seed=5)
        wanted = TALKING.decode([i for i in new if i != TALKING.eot_id])
        assert conversation.say(message) == wanted
        assert capsys.readouterr().out == wanted + "\n"
        assert conversation.turns == [*turns, {"role": "assistant", "content": wanted}]


def test_the_oldest_turns_go_when_the_context_is_full(talker, capsys):
    conversation = begun(talker, "a" * 40, "b" * 20, "c" * 20, "d")
    answer = conversation.say("see")
    assert "the 2 oldest turns are forgotten" in capsys.readouterr().out
    assert answer == begun(talker, "c" * 20, "d").say("see")
    assert [turn["content"] for turn in conversation.turns] == ["c" * 20, "d", "see", answer]


@pytest.mark.parametrize(
    ("message", "said"), [("a" * 200, "the model sees 128 at once"), ("Ω", "U+03A9")]
)
def test_what_the_model_cannot_take_was_never_said(talker, capsys, message, said):
    conversation = begun(talker, "a", "b")
    turns = list(conversation.turns)
    assert conversation.say(message) == ""
    assert said in capsys.readouterr().out
    assert conversation.turns == turns


def test_a_base_model_goes_on_with_the_text(base, capsys):
    conversation = begun(base, length=8)
    how = {"max_new_tokens": 8, "temperature": 0.7, "seed": 5}
    first = conversation.say("abc")
    assert first == base.generate("abc", **how)
    second = conversation.say("bad")
    assert second == base.generate("abc" + first.removesuffix("\n") + "\nbad", **how)
    assert conversation.text.endswith("\nbad" + second)
    capsys.readouterr()
    before = conversation.text
    third = conversation.say("a" * 20)
    room = (before.removesuffix("\n") + "\n" + "a" * 20)[-24:]
    assert third == base.generate(room, **how)
    assert "only its last 24 tokens" in capsys.readouterr().out
    conversation.say("b")
    assert "last 24 tokens" not in capsys.readouterr().out  # said once


def test_commands_change_what_comes_next(talker, monkeypatch, capsys):
    typing(
        monkeypatch, "abc", "/reset", "/set temperature 0.2", "/set max-new-tokens=5", "/seed 9",
        "abc", "/set preset nucleus", "/quit", "never read",
    )  # fmt: skip
    conversation = begun(talker)
    conversation.hold()
    assert conversation.sampling == Sampling(temperature=0.8, top_p=0.9, seed=9)
    wanted = Conversation(talker, Sampling(temperature=0.2, seed=9), 5, []).say("abc")
    assert [turn["content"] for turn in conversation.turns] == ["abc", wanted]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", "/save FILE"),
        ("/set", "temperature 0.7"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature hot", "temperature is 'hot'; give a number"),
        ("/set top_k 1.5", "give a whole number"),
        ("/set temperature -1", "temperature"),
        ("/set max_new_tokens 0", "give a whole number of at least 1"),
        ("/save", "name a file"),
        ("/save x.txt", "nothing was said yet"),
        ("/dance", "there is no /dance; /help"),
    ],
)
def test_a_command_says_what_it_did_or_why_not(talker, monkeypatch, capsys, line, said):
    conversation = begun(talker)
    typing(monkeypatch, line)
    conversation.hold()
    assert said in capsys.readouterr().out
    assert (conversation.sampling, conversation.max_new_tokens) == (SAMPLING, 12)


def test_a_new_seed_is_another_one_and_a_slash_can_be_said(base, monkeypatch, capsys):
    typing(monkeypatch, "/seed", "//abc")
    conversation = begun(base)
    conversation.hold()
    assert conversation.sampling.seed != 5
    assert "'/' (U+002F) is unknown" in capsys.readouterr().out  # it was a message


def test_what_was_said_is_saved_as_finetune_takes_it(talker, base, monkeypatch, capsys, tmp_path):
    file, text, foreign = (tmp_path / name for name in ("said.jsonl", "said.txt", "foreign"))
    foreign.write_text("mine")
    conversation = begun(talker, "abc", "hi")
    typing(monkeypatch, f"/save {file}", "see", f"/save {file}", f"/save {foreign}")
    conversation.hold()
    assert "already there" in capsys.readouterr().out
    assert foreign.read_text() == "mine"
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": conversation.turns}
    assert len(conversation.turns) == 4
    typing(monkeypatch, f"/save {text}")
    begun(base, "abc", "bad", "a", "b").hold()
    assert text.read_text(encoding="utf-8") == "abcbad\nab\n"


def test_a_stopped_answer_was_said_as_far_as_it_came(talker, monkeypatch, capsys):
    conversation = begun(talker, length=50)
    conversation.sampling = Sampling(presence_penalty=-1000)  # repeats one letter, and no end

    def interrupted(*args, **kwargs):
        for count, piece in enumerate(real(*args, **kwargs)):
            if count == 3:
                raise KeyboardInterrupt
            yield piece

    from octavo.generating import conversation as module

    real = module.write
    monkeypatch.setattr(module, "write", interrupted)
    answer = conversation.say("abc")
    assert len(answer) == 3
    assert capsys.readouterr().out == answer + " [stopped]\n"
    assert conversation.turns[-1]["content"] == answer


def test_a_model_without_a_tokenizer_cannot_talk(talker):
    talker._tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        begun(talker)
