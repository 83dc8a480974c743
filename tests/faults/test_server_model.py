"""A model that fails at one text is that text's error and nobody else's. Row 43."""

import threading

import pytest
from run_kit import LETTERS, make_run
from serving_kit import running, streamed

from octavo.errors import NonFiniteError


def healthy(lm, seed):
    """Whether this seed's text does without the sick token."""
    try:
        return lm.generate("abc", 40, top_k=4, seed=seed)
    except NonFiniteError:
        return None


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_sick_token_ends_its_own_request(tmp_path, monkeypatch, engine):
    """One token becomes NaN: a prompt with it is a 500, a text that draws it ends with an error."""
    monkeypatch.setenv("OCTAVO_ENGINE", engine)
    path = make_run(tmp_path / "run", poison=LETTERS.encode("h")[0], block_size=128)
    with running(path, slots=8) as server, server.http() as http:
        lm = server.models.find(None).lm
        seed = next(seed for seed in range(100) if healthy(lm, seed))
        well = {"prompt": "abc", "max_tokens": 40, "top_k": 4, "seed": seed}
        wanted = lm.generate("abc", 40, top_k=4, seed=seed)
        found = []

        def ask():
            found.append(http.post("/v1/completions", json=well).json()["choices"][0]["text"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        ill = http.post("/v1/completions", json={"prompt": "ahb", "max_tokens": 100})
        assert ill.status_code == 500
        assert ill.json()["error"]["code"] == "model_error"
        assert "not finite" in ill.json()["error"]["message"]
        hot = {"prompt": "abc", "max_tokens": 4000, "temperature": 100, "seed": 1}
        events = streamed(http, hot)
        assert events[-1]["error"]["code"] == "model_error"
        assert "text" in events[0]["choices"][0]
        for thread in threads:
            thread.join(30)
        assert found == [wanted] * 4
        assert http.post("/v1/completions", json=well).json()["choices"][0]["text"] == wanted
        assert http.get("/health").status_code == 200
