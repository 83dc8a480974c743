"""A server told to end finishes what it writes, and none opens to strangers. Rows 44, 45."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import httpx
import pytest
from serving_kit import make_run

from octavo.errors import ConfigError
from octavo.serving.limits import Limits
from octavo.serving.serve import serve

SERVE = [sys.executable, "-m", "octavo", "serve"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@contextmanager
def serving(*words):
    """`octavo serve` in a process of its own, and where it listens."""
    command = [*SERVE, "--port", "0", "--max-tokens", "1000000", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving run at http://127.0.0.1:"), process.stderr.read()
        yield process, line.split()[3].removesuffix("/v1;")
    finally:
        process.kill()
        process.wait()


def stream(url, tokens):
    body = {"prompt": "abc", "max_tokens": tokens, "seed": 1, "stream": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_texts_in_work_are_finished(path, sign):
    with serving(path) as (process, url):
        with stream(url, 30_000) as answer:
            lines = (line for line in answer.iter_lines() if line)
            events = [next(lines)]
            process.send_signal(sign)
            events += lines
        assert events[-1] == "data: [DONE]"
        last = json.loads(events[-2][6:])["choices"][0]
        assert last["finish_reason"] == "length"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


def test_what_takes_longer_than_the_grace_is_told_so(path):
    with serving(path, "--grace", "0.3") as (process, url):
        with stream(url, 1_000_000) as answer:
            lines = (line for line in answer.iter_lines() if line)
            events = [next(lines)]
            process.send_signal(signal.SIGTERM)
            events += lines
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["error"]["code"] == "closing"
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


def refused(*words, **environment):
    """The exit code and the line of a start that is refused."""
    result = subprocess.run(
        [*SERVE, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.returncode, result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_the_loopback_only_with_a_key(host):
    with pytest.raises(ConfigError, match="--api-key-file") as error:
        serve(["nowhere"], host, 0, None, Limits())
    assert error.value.exit_code == 2


@pytest.mark.long
def test_starts_that_cannot_be(path, tmp_path):
    empty = tmp_path / "key.txt"
    empty.write_text("\n")
    assert refused(path, "--host", "0.0.0.0")[0] == 2
    assert refused(path, "--api-key-file", empty)[0] == 2
    assert refused(path, "--api-key-file", tmp_path / "nowhere")[0] == 2
    assert refused(path, "--port", "70000")[0] == 2
    assert refused(path, "--slots", "0")[0] == 2
    assert refused(tmp_path / "nowhere")[0] == 2
    with serving(path) as (_, url):
        code, line = refused(path, "--port", url.rpartition(":")[2])
        assert code == 6
        assert "--port" in line


def test_a_key_from_the_environment_opens_it_to_others(path, monkeypatch):
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    process = subprocess.Popen(
        [*SERVE, str(path), "--host", "0.0.0.0", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        port = process.stdout.readline().split()[3].rpartition(":")[2].removesuffix("/v1;")
        url = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
    finally:
        process.kill()
        process.wait()
