"""The command line as people type it: in this process, in one of its own, in a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from octavo.cli import main

SEA = "She sells sea shells by the sea shore; the shells she sells are sea shells.\n" * 30

SMALL = [
    "model.block_size=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16",
    "train.max_steps=6", "train.micro_batch_size=4", "eval.windows=4",
    "log.sample_tokens=5", "eval.every=3",
]  # fmt: skip


def octavo(*words):
    """The exit code of a command called in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


def answered(capsys, *words):
    """The exit code of a command, what it printed, and what it complained of."""
    code = octavo(*words)
    return code, *capsys.readouterr()


def printed(capsys, *words):
    """What a command prints that ends well."""
    assert octavo(*words) == 0
    return capsys.readouterr().out


def figures(capsys, *words):
    """The one JSON object that it prints when it is asked for figures."""
    return json.loads(printed(capsys, *words, "--json"))


def complaint(capsys, *words):
    """The exit code of a command that is refused, and its one line."""
    code, _, error = answered(capsys, *words)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return code, error


def sea_run(folder, *settings):
    """The small run ``folder/sea`` that the command trains on ``folder/sea.txt``."""
    (folder / "sea.txt").write_text(SEA, encoding="utf-8")
    words = ["--out", folder / "sea", "--quiet"]
    assert octavo("train", folder / "sea.txt", *SMALL, *settings, *words) == 0
    return folder / "sea"


def python(program, *words, ends=0, **options):
    """A program in a process of its own, which ends with the exit code ``ends``."""
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, **options)
    assert done.returncode == ends, done.stderr
    return done


def without_torch(program, **options):
    """A program in a process of its own, which ends well and never imports torch."""
    check = "assert 'torch' not in sys.modules, 'torch was imported'"
    return python(f"import sys\n{program}\n{check}\n", **options)


def octavo_without_torch(*words, **options):
    """A command in a process of its own, which ends well and never imports torch."""
    program = f"""
from octavo.cli import main
try:
    main({[str(word) for word in words]})
except SystemExit as end:
    assert not end.code, end.code
"""
    return without_torch(program, **options)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, folder, *words):
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo", *words], cwd=folder,
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "INPUTRC": "/dev/null"},
        )  # fmt: skip
        os.close(follower)
        self.unread = b""

    def type(self, keys):
        os.write(self.leader, keys)

    def read_until(self, wanted=b"", at_least=0):
        """What came up to ``wanted``; what comes after it waits for the next call."""
        deadline = time.monotonic() + 60
        while wanted not in self.unread or len(self.unread) < at_least:
            assert time.monotonic() < deadline, self.unread
            if select.select([self.leader], [], [], 0.1)[0]:
                self.unread += os.read(self.leader, 65536)
        found, self.unread = self.unread.split(wanted, 1) if wanted else (self.unread, b"")
        return found

    def send(self, number):
        os.killpg(self.process.pid, number)

    def ended(self):
        code = self.process.wait(timeout=30)
        os.close(self.leader)
        return code


def wait_until(condition, seconds=30):
    """Until it holds, which is soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
