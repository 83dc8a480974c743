"""A server told to end finishes what it writes, and none opens to strangers. Rows 44, 45."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import httpx
import pytest
from command_kit import complaint
from run_kit import make_run

from octavo.errors import ConfigError
from octavo.serving.limits import Limits
from octavo.serving.serve import serve


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@contextmanager
def serving(*words, host="127.0.0.1"):
    """`octavo serve` in a process of its own, and where it listens."""
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--max-tokens", "1000000"]
    command += map(str, words)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"serving run at http://{host}:"), process.stderr.read()
        yield process, line.split()[3].removesuffix("/v1;").replace("0.0.0.0", "127.0.0.1")
    finally:
        process.kill()
        process.wait()


def stream(url, tokens):
    body = {"prompt": "abc", "max_tokens": tokens, "seed": 1, "stream": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30)


def last_event(process, url, tokens, sign):
    """What a stream ends with whose server is told to end after the first event."""
    with stream(url, tokens) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        process.send_signal(sign)
        *_, event, end = lines
    assert end == "data: [DONE]"
    return json.loads(event.removeprefix("data: "))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_texts_in_work_are_finished(path, sign):
    with serving(path) as (process, url):
        last = last_event(process, url, 30_000, sign)
        assert last["choices"][0]["finish_reason"] == "length"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


def test_what_takes_longer_than_the_grace_is_told_so(path):
    with serving(path, "--grace", "0.3") as (process, url):
        last = last_event(process, url, 1_000_000, signal.SIGTERM)
        assert last["error"]["code"] == "closing"
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_ends_it_at_once(path):
    with serving(path) as (process, url), stream(url, 1_000_000) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # two signals at once are one
        process.send_signal(signal.SIGTERM)
        with suppress(httpx.RemoteProtocolError):
            list(lines)
        assert process.wait(10) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_the_loopback_only_with_a_key(host):
    with pytest.raises(ConfigError, match="--api-key-file") as error:
        serve(["nowhere"], host, 0, None, Limits())
    assert error.value.exit_code == 2


def test_starts_that_cannot_be(path, tmp_path, capsys):
    empty = tmp_path / "key.txt"
    empty.write_text("\n")
    for words in (
        [path, "--host", "0.0.0.0"],
        [path, "--api-key-file", empty],
        [path, "--api-key-file", tmp_path / "nowhere"],
        [path, "--port", 70000],
        [path, "--slots", 0],
        [tmp_path / "nowhere"],
    ):
        assert complaint(capsys, "serve", *words)[0] == 2
    with serving(path) as (_, url):
        code, line = complaint(capsys, "serve", path, "--port", url.rpartition(":")[2])
        assert code == 6
        assert "--port" in line


def test_a_key_from_the_environment_opens_it_to_others(path, monkeypatch):
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    with serving(path, "--host", "0.0.0.0", host="0.0.0.0") as (_, url):
        asked = f"{url}/v1/models"
        assert httpx.get(asked).status_code == 401
        assert httpx.get(asked, headers={"Authorization": "Bearer secret"}).status_code == 200
