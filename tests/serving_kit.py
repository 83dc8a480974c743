"""What the server's tests stand on: tiny runs, and a real server on a real socket in a thread."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import OpenAI

from octavo.checkpoint import Run
from octavo.config import Config
from octavo.generating.native_tables import tensor_shapes
from octavo.model_config import ModelConfig
from octavo.serving.app import create_app
from octavo.serving.limits import Limits
from octavo.serving.listening import Server, listen
from octavo.serving.metrics import Metrics
from octavo.serving.models import Models, load_models
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer

LETTERS = Tokenizer.char("abcdefgh \n:ASUimnrsty")  # spells what the chat template writes
TALKING = Tokenizer.char("abcdefgh \n:ASUimnrsty", separator=True)


def make_run(
    path: Path,
    tokenizer: Tokenizer = LETTERS,
    seed: int = 0,
    chat: bool = False,
    poison: int | None = None,
    **changes: int | str | bool,
) -> Path:
    """A run with random weights; at the token ``poison`` it overflows."""
    shape = {"block_size": 64, "n_layer": 2, "n_head": 2, "d_model": 16, "tie_embeddings": False}
    norm = "rmsnorm" if poison is None else "layernorm"
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **{"norm": norm, **shape, **changes})
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.standard_normal(size, dtype=np.float32) * 0.5
        for name, size in tensor_shapes(config).items()
        if not (config.tie_embeddings and name == "lm_head.weight")
    }
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["tok_emb.weight"]
    if poison is not None:
        weights["tok_emb.weight"][poison] = 3e38  # finite, but its mean and variance are not
    files = ChatTemplate.default(tokenizer).files() if chat else {}
    Run.create_with_weights(path, Config(model=config), tokenizer, files, weights)
    return path


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
