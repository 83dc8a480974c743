"""What the server's tests stand on: a real server on a real socket in a thread."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from octavo.serving.app import create_app
from octavo.serving.limits import Limits
from octavo.serving.listening import Server, listen
from octavo.serving.metrics import Metrics
from octavo.serving.models import Models, load_models


@dataclass
class Running:
    """A server in a thread."""

    server: Server
    models: Models
    port: int
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self) -> OpenAI:
        """The official client, as it is."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


def streamed(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a completion's stream, up to its end."""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@contextmanager
def running(*paths: Path, key: str | None = None, **limits: float) -> Iterator[Running]:
    """Serve runs until the block ends."""
    bounds, metrics = Limits(**{"grace": 0, **limits}), Metrics()
    cache = str(Path(__file__).parents[1] / ".cache")  # a module's fixture comes before a test's
    with pytest.MonkeyPatch.context() as patch, listen("127.0.0.1", 0) as listening:
        patch.setenv("OCTAVO_CACHE", cache)
        models = load_models([str(path) for path in paths], bounds, metrics, device="cpu")
        server = Server(create_app(models, bounds, metrics, key), models, bounds)
        loop = asyncio.new_event_loop()
        serve = server.serve(sockets=[listening])
        thread = threading.Thread(target=loop.run_until_complete, args=(serve,), daemon=True)
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
                assert thread.is_alive()
            yield Running(server, models, listening.getsockname()[1], key)
        finally:
            loop.call_soon_threadsafe(server.end)
            thread.join(30)
            assert not thread.is_alive()
            loop.close()
