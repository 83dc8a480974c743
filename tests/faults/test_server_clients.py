"""Clients that dawdle, leave or come in crowds cost the others nothing. Rows 40 to 42."""

import asyncio
import json
import os
import socket
import time

import httpx
import pytest
from command_kit import wait_until
from run_kit import make_run
from serving_kit import running, streamed

LEAVING = 10_000 if "OCTAVO_FAULTS" in os.environ else 60


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", block_size=256)


def served(server):
    return server.models.find(None).scheduler


def request(body):
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


def quick(server):
    """How long a short text takes now."""
    began = time.monotonic()
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "seed": 1})
    assert answer.status_code == 200
    return time.monotonic() - began


def test_fifty_clients_of_one_byte_a_second_are_sent_away(path):
    """Half never finish their header lines, half their body; meanwhile others are served."""
    whole = request({"prompt": "abc"})
    with running(path, arrival=1.0) as server:
        clients = []
        for number in range(50):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            client.sendall(whole[: 30 if number % 2 else -5])
            clients.append(client)
        for client in clients:
            client.sendall(b"x")
        assert quick(server) < 1
        for client in clients:
            answer = b""
            while some := client.recv(4096):
                answer += some
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"
            client.close()


def test_an_idle_connection_may_be_used_again(path):
    """The clock of a request's first lines does not run while a text is written."""
    with running(path, arrival=0.3) as server, server.http() as http:
        for _ in range(3):
            answer = http.post("/v1/completions", json={"max_tokens": 4000, "seed": 1})
            assert answer.json()["usage"]["completion_tokens"] == 4000
            time.sleep(0.4)


def test_readers_that_take_nothing_lose_their_streams(path):
    big = {"prompt": "abc", "max_tokens": 60_000, "logprobs": 20, "stream": True}
    with running(path, arrival=0.5, slots=8, tokens=100_000) as server:
        clients = []
        for _ in range(4):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(request(big))
            clients.append(client)
        wait_until(lambda: len(served(server).seats) == 4)
        assert quick(server) < 5  # and not when the others have read 60,000 tokens, which is never
        wait_until(lambda: served(server).idle, 30)
        for client in clients:
            client.close()


def test_a_lagging_reader_gets_several_tokens_an_event(path):
    """And all of them: nothing is lost, and there are fewer events than tokens."""
    with running(path) as server, server.http() as http:
        events = streamed(http, {"prompt": "abc", "max_tokens": 2000, "seed": 1})
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == server.models.find(None).lm.generate("abc", 2000, seed=1)
        assert len(events) < 1000


@pytest.mark.timeout(60 + LEAVING)
def test_clients_that_leave_free_their_slots(path):
    """In a stream, in the middle of a long prompt, while they wait for a whole answer."""
    asked = [
        {"prompt": "abc", "max_tokens": 4000, "stream": True},
        {"prompt": "ab" * 128, "max_tokens": 4000, "n": 2, "stream": True},
        {"prompt": "abc", "max_tokens": 4000, "n": 3},
        {"prompt": "abc", "max_tokens": 4000, "explain": True, "stream": True},
    ]
    with running(path, slots=4, queue=LEAVING) as server:
        for number in range(LEAVING):
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(request(asked[number % 4]))
            if number % 3:
                time.sleep(0.002 * (number % 5))
            client.close()
        wait_until(lambda: served(server).idle, 30)
        scheduler = served(server)
        assert sorted(scheduler.free) == [0, 1, 2, 3]
        with server.http() as http:
            assert 'octavo_slots_in_use{model="run"} 0.0' in http.get("/metrics").text
            http.get("/health").raise_for_status()
        lm = server.models.find(None).lm
        answer = server.openai().completions.create(model="run", prompt="abc", seed=7, n=4)
        assert [choice.text for choice in answer.choices] == lm.generate(["abc"], seed=7, n=4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_gone_within_two_steps(path, stream):
    with running(path, slots=2, tokens=100_000) as server:
        scheduler = served(server)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request({"prompt": "a", "max_tokens": 90_000, "stream": stream}))
            wait_until(lambda: scheduler.seats)
            (job,) = {seat.job for seat in scheduler.seats}
        wait_until(lambda: job.over)
        turns = scheduler.turns
        wait_until(lambda: scheduler.idle)
        assert scheduler.turns - turns <= 2


def test_256_clients_at_once(path):
    """Slots and queue are filled; whoever comes then is told when to come again."""

    async def ask(client, number):
        body = {"prompt": "abc", "max_tokens": 400, "seed": number}
        return await client.post("/v1/completions", json=body)

    async def crowd(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(256)))

    with running(path, slots=8, queue=64) as server:
        answers = asyncio.run(crowd(server.url))
        lm = server.models.find(None).lm
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 64
        for number, answer in enumerate(answers):
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
            elif number % 16 == 0:
                text = answer.json()["choices"][0]["text"]
                assert text == lm.generate("abc", 400, seed=number)
        assert quick(server) < 1
