"""Whatever is sent, the answer is OpenAI's error object and a 4xx, soon. Rows 37 to 39."""

import json
import os
import random
import socket
import time
from pathlib import Path

import pytest
from run_kit import LETTERS, make_run
from serving_kit import running

FUZZ = 10_000 if "OCTAVO_FAULTS" in os.environ else 300
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "run")
    with running(path, slots=4, tokens=50) as found:
        yield found


@pytest.fixture(scope="module")
def http(server):
    with server.http() as client:
        yield client


def check_refused(answer, *statuses):
    """An answer that says in OpenAI's way what is wrong, in few words."""
    assert answer.status_code in statuses, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 500
    assert "Traceback" not in answer.text
    return error


def raw(port, data, *more, wait=0.0):
    """What the server answers to these bytes, until it hangs up or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        for each in more:
            time.sleep(wait)
            connection.sendall(each)
        connection.settimeout(10)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.rstrip().endswith(b"}"):
            some = connection.recv(65536)
            if not some:
                break
            answer += some
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def send(http, body, path="completions"):
    """The answer to a body of these bytes."""
    headers = {"Content-Type": "application/json"}
    return http.post(f"/v1/{path}", content=body, headers=headers)


def post(*headers):
    lines = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""]])
def test_an_empty_prompt_is_refused(http, prompt):
    check_refused(http.post("/v1/completions", json={"prompt": prompt}), 400)


@pytest.mark.parametrize("prompt", ["a" * 65, [1] * 65, "a" * 500_000, [1] * 400_000])
def test_a_prompt_longer_than_the_context_is_refused(http, prompt):
    error = check_refused(http.post("/v1/completions", json={"prompt": prompt}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    whole = http.post("/v1/completions", json={"prompt": prompt[:64], "max_tokens": 2})
    assert whole.status_code == 200


def test_characters_and_ids_that_the_model_has_not(http):
    for prompt in ("äöü", "\u0000", [LETTERS.vocab_size], [-1], [2**70], "\ud800".join("ab")):
        check_refused(send(http, json.dumps({"prompt": prompt})), 400)


@pytest.mark.parametrize("temperature", [0, 1e-9, 0.5, 100])
@pytest.mark.parametrize("top_p", [0, 1e-9, 0.5, 1])
@pytest.mark.parametrize("top_k", [0, 1, 5, 10**9])
def test_extreme_settings_mean_what_they_mean_elsewhere(server, http, temperature, top_p, top_k):
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": 3}
    answer = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 8, **how})
    lm = server.models.find(None).lm
    assert answer.json()["choices"][0]["text"] == lm.generate("abc", 8, **how)
    if temperature < 1e-5:
        assert lm.generate("abc", 8, **how) == lm.generate("abc", 8, temperature=0)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1", '"1"', "true"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_what_is_no_number_in_bounds_is_refused(http, name, number):
    body = f'{{"prompt": "a", "{name}": {number}}}'
    assert name in check_refused(send(http, body), 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 51},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": 10**30},
        {"n": 0},
        {"n": 129},
        {"n": 65, "prompt": ["a", "b"]},
        {"logprobs": 21},
        {"logprobs": True},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 10**400},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": ["a"] * 17},
        {"stop": "a" * 257},
        {"stream": "yes"},
        {"stream_options": {"x": 1}},
        {"preset": "bold"},
        {"model": "../../etc/passwd"},
        {"model": 5},
        {"prompt": {"a": 1}},
        {"prompt": [1, "a"]},
        {"prompt": [1.5]},
        {"prompt": ["a"] * 129},
        {"unheard": 1},
        {"temperature": [1]},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
def test_the_schemas_are_strict(http, body):
    named = next(iter(body))
    error = check_refused(http.post("/v1/completions", json={"prompt": "a", **body}), 400, 404)
    assert error["param"] in (named, None)
    assert named in error["message"]


def test_bodies_are_bounded_and_are_not_read_when_they_are_not(server):
    """A body of a gigabyte, declared or in chunks, costs the server neither memory nor time."""
    port, before, began = server.port, resident(), time.monotonic()
    assert raw(port, post(f"Content-Length: {2**30}"))[0] == 413
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    status, error = raw(port, post("Transfer-Encoding: chunked") + chunk * 17)
    assert (status, error["code"]) == (413, "too_large")
    assert raw(port, post("Content-Length: 99999999999999999999999"))[0] in (400, 413)
    assert raw(port, post("Content-Length: -1"))[0] == 400
    assert raw(port, post("Content-Length: x"))[0] == 400
    assert raw(port, post("Content-Length: 5", "Content-Length: 6"))[0] == 400
    status, error = raw(port, post())
    assert (status, error["code"]) == (411, "length_required")
    assert time.monotonic() - began < 5
    assert resident() - before < 16 * MEGABYTE


def test_chunks_that_fit_are_a_body(server):
    body = json.dumps({"prompt": "abc", "max_tokens": 3, "nothing": 1}).encode()
    head = post("Transfer-Encoding: chunked", "Content-Type: application/json")
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body)))
    status, error = raw(server.port, head, chunks, b"0\r\n\r\n", wait=0.05)
    assert (status, error["param"]) == (400, "nothing")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"prompt":' * 90_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "a", "prompt": "b", "x": 1}',
        b"{" + b",".join(b'"x%d": 1' % i for i in range(50_000)) + b"}",
        b'{"prompt": [' + b"1.5," * 200_000 + b"1]}",
        b'{"max_tokens": ' + b"9" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_json_that_is_deep_wide_or_none_is_refused_within_a_second(http, body):
    began = time.monotonic()
    check_refused(send(http, body), 400)
    assert time.monotonic() - began < 2  # a second, and one for a busy machine


def test_paths_methods_and_types_that_are_not_there(http):
    check_refused(http.get("/etc/passwd"), 404)
    check_refused(http.get("/v1/models/../../../etc/passwd"), 404)
    check_refused(http.get("/v1/completions"), 405)
    form = http.post("/v1/completions", data={"prompt": "a"})
    assert "application/json" in check_refused(form, 400)["message"]


def test_other_origins_and_other_names_get_nothing(http):
    """A page from anywhere may point its own name at the loopback address, or send from its own."""
    answer = http.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert check_refused(answer, 403)["code"] == "unknown_host"
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/completions", headers=preflight)
    check_refused(answer, 405)
    assert not any("access-control" in name for name in answer.headers)


def test_the_key_is_asked_for(tmp_path):
    with running(make_run(tmp_path / "run"), key="open sesame") as server, server.http() as http:
        assert http.get("/v1/models").status_code == 200
        for wrong in (
            "",
            "Bearer",
            "Bearer open",
            "Bearer open sesame!",
            "Basic open sesame",
            "\xff",
        ):
            answer = http.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")})
            assert check_refused(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        closed = {"Authorization": ""}
        assert http.get("/metrics", headers=closed).status_code == 401
        assert http.get("/health", headers=closed).status_code == 200
        assert http.get("/ready", headers=closed).status_code == 200
        assert server.openai().completions.create(model="run", prompt="a", max_tokens=1).choices


VALUES = [
    None, True, False, 0, 1, -1, 7, 10**40, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "a",
    "abc", "ä", "\x00", "\ud800", "a" * 300, [], {}, [1], ["a"], [[1, 2]], [None], {"a": 1}, [[[]]],
    "nucleus", "run", [{"role": "user", "content": "a"}], {"include_usage": True}, {"type": "text"},
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "n", "stop", "stream", "stream_options", "explain",
    "seed", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "preset",
    "presence_penalty", "frequency_penalty", "best_of", "logit_bias", "tools", "functions",
    "response_format", "user", "logprobs", "top_logprobs", "echo", "suffix", "x",
]  # fmt: skip


@pytest.mark.timeout(FUZZ)
def test_fuzzed_requests_get_answers(http):
    """Fields of any value, bodies of any bytes: no 5xx, nothing slow, no traceback."""
    rng = random.Random(1337)
    seen = set()
    for number in range(FUZZ):
        body = {name: rng.choice(VALUES) for name in rng.sample(FIELDS, rng.randint(1, 6))}
        body.setdefault("max_tokens", 5)
        if rng.random() < 0.7:
            body["prompt"] = rng.choice(["a", "abc", [1, 2], ["a", "b"]])
        data = json.dumps(body).encode()
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            place = rng.randrange(len(data))
            data = data[:place] + bytes([rng.randrange(256)]) * rng.choice([0, 1, 2]) + data[place:]
        path = rng.choice(["completions", "completions", "chat/completions"])
        began = time.monotonic()
        answer = send(http, data, path)
        assert time.monotonic() - began < 5, (number, data)
        seen.add(answer.status_code)
        if answer.status_code != 200:
            check_refused(answer, 400, 404)
    assert {200, 400} <= seen


def resident():
    """Bytes of memory that this process, and so the server, has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
