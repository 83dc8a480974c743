"""`octavo chat` in a terminal, typed as a person types, and without one; it imports no torch."""

import json
import re
import signal
import time

import pytest
from command_kit import Terminal, octavo_without_torch
from run_kit import LETTERS, TALKING, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs to talk with")
    make_run(folder / "talker", TALKING, chat=True, block_size=128)
    make_run(folder / "base", LETTERS)
    return folder


def test_a_talk_in_a_terminal_where_ctrl_c_stops_the_answer_only(folder):
    endless = ["--max-new-tokens", "1000000", "--presence-penalty", "-1000"]  # one letter only
    chat = Terminal(folder, "chat", "talker", *endless)
    assert b"chat with the model" in chat.read_until(b"> ")
    chat.type(b"abd\x7fc\n")  # with a correction
    chat.read_until(b"c\r\n")
    chat.read_until(b"mmmmmmmm")
    chat.send(signal.SIGINT)
    chat.read_until(b"[stopped]")
    chat.read_until(b"> ")
    chat.type(b"half a line")
    chat.read_until(b"half a line")
    time.sleep(0.2)  # readline, while it is busy with a key, keeps a signal for the next one
    chat.send(signal.SIGINT)  # at the prompt: a new line, no end
    chat.read_until(b"> ")
    chat.type(b"/save said.jsonl\n")
    chat.read_until(b"saved as said.jsonl")
    chat.read_until(b"> ")
    chat.type(b"\x1b[A\n")  # the last line again
    chat.read_until(b"saved as said.jsonl")
    chat.read_until(b"> ")
    chat.type(b"\x04")
    assert chat.ended() == 0
    question, answer = json.loads((folder / "said.jsonl").read_text(encoding="utf-8"))["messages"]
    assert question == {"role": "user", "content": "abc"}
    assert len(answer["content"]) >= 8
    assert set(answer["content"]) == {"m"}


def test_a_base_model_says_once_what_it_does(folder):
    chat = Terminal(folder, "chat", "base", "--max-new-tokens", "5")
    assert b"a base model: it goes on with the text" in chat.read_until(b"> ")
    chat.type(b"abc\n")
    assert b"base model" not in chat.read_until(b"> ")
    chat.type(b"/quit\n")
    assert chat.ended() == 0


@pytest.mark.parametrize("run", ["talker", "base"])
def test_piped_lines_are_answered_without_torch(folder, run):
    words = ["chat", run, "--max-new-tokens", 9, "--seed", 3]
    first, second = (octavo_without_torch(*words, cwd=folder, input="abc\nabc\n") for _ in range(2))
    assert first.stderr == ""
    assert first.stdout == second.stdout
    assert len(first.stdout) > 4
    assert not re.search("> |chat with|base model", first.stdout)
