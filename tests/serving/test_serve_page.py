"""docs/serve.md is the contract: what it types works, and what it names is what there is."""

import json
import re
import shlex
from pathlib import Path

import pytest
from run_kit import make_run
from serving_kit import running

from octavo.commands import serve as command
from octavo.serving.schemas import ChatRequest, CompletionRequest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(make_run(tmp_path_factory.mktemp("runs") / "quickstart")) as found:
        yield found


def test_its_requests_are_answered(server, capsys):
    (curl,) = [block for block in blocks("sh") if block.startswith("curl")]
    body = json.loads(shlex.split(curl)[-1])
    with server.http() as http:
        answer = http.post("/v1/completions", json={**body, "prompt": "The ".replace("T", "t")})
        assert answer.json()["usage"]["completion_tokens"] <= body["max_tokens"]
    (python,) = blocks("python")
    assert "http://127.0.0.1:8000" in python
    exec(python.replace("http://127.0.0.1:8000", server.url).replace("The ", "the "), {})
    assert len(capsys.readouterr().out) == 200  # letters, and no end of text among them


def test_it_names_every_field_of_a_request_and_no_other():
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    unnamed = [name for name in fields if not re.search(rf"`[^`]*\b{name}\b[^`]*`", PAGE)]
    assert unnamed == []


def test_its_table_of_a_models_fields_is_the_entry(server):
    with server.http() as http:
        (entry,) = http.get("/v1/models").json()["data"]
    table = PAGE.split("**A model**")[1].split("**A request**")[0]
    named = {name for cell in re.findall(r"`([^`]*)`", table) for name in re.findall(r"\w+", cell)}
    assert set(entry) <= named


def test_an_explained_token_has_the_shape_that_is_shown(server):
    (shown,) = map(json.loads, blocks("json"))
    body = {"prompt": "a", "max_tokens": 1, "explain": True, "top_k": 2, "top_p": 0.5}
    with server.http() as http:
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    (token,) = choice["tokens"]
    assert set(token) == set(shown)
    assert set(token["alternatives"][0]) == set(shown["alternatives"][0])
    assert set(token["cut"]["top_k"]) == set(shown["cut"]["top_k"])


def test_it_lists_every_code():
    source = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("src/octavo/serving/*.py"))
    codes = set(re.findall(r"Refusal\(\s*\d+,\s*\"(\w+)\"", source))
    codes |= set(re.findall(r"40[45]: \"(\w+)\"", source)) - {"permission_error"}
    assert len(codes) > 10
    assert {code for code in codes if f"`{code}`" not in PAGE} <= {"cancelled", "bug"}


def test_its_commands_have_the_options():
    known = set()
    command.add_options(lambda *names, **_: known.update(names))
    for option in re.findall(r"(--[a-z-]+)", "".join(blocks("sh"))):
        assert option in known
