"""OpenAI's own client, unchanged, against a real server; its texts are `octavo generate`'s."""

import math

import openai
import pytest
import torch
from run_kit import LETTERS, TALKING, make_run
from serving_kit import running, streamed

import octavo
from octavo.adapting.assemble import assemble
from octavo.checkpoint import Run, weights_sha256
from octavo.config import Config, FinetuneConfig, LoraConfig
from octavo.errors import ConfigError
from octavo.serving.models import load_models
from octavo.text.chat import ChatTemplate, encode_chat
from octavo.text.tokenizer import Tokenizer

BYTES = Tokenizer.byte(separator=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    base, talker = (
        make_run(folder / "base"),
        make_run(folder / "talker", TALKING, seed=1, chat=True),
    )
    with running(base, talker, make_run(folder / "bytes", BYTES, seed=2), slots=8) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


@pytest.fixture(scope="module")
def models(server):
    return {name: served.lm for name, served in server.models.by_name.items()}


def test_the_models_say_what_they_are(client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["base", "talker", "bytes"]
    base = found["base"]
    assert (base.object, base.owned_by, base.context, base.tokenizer) == (
        "model", "octavo", 64, "char",
    )  # fmt: skip
    assert (base.chat, found["talker"].chat) == (False, True)
    assert base.presets["nucleus"] == {"temperature": 0.8, "top_p": 0.9}
    assert base.parameters > 1000
    assert client.models.retrieve("talker").id == "talker"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        client.models.retrieve("x")


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_what_generate_writes(client, models, stream):
    how = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
    ours = {"top_k": 9, "repetition_penalty": 1.1}
    wanted = models["base"].generate(["abc", "a b"], 50, n=2, stop=["ab"], **how, **ours)
    answer = client.completions.create(
        model="base",
        prompt=["abc", "a b"],
        max_tokens=50,
        n=2,
        stop="ab",
        stream=stream,
        extra_body=ours,
        **({"stream_options": {"include_usage": True}} if stream else {}),
        **how,
    )
    texts, reasons, usage = [""] * 4, [None] * 4, None
    for chunk in answer if stream else [answer]:
        assert chunk.object == "text_completion"
        assert chunk.seed == 5
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert reasons[choice.index] is None
            reasons[choice.index] = choice.finish_reason
    assert texts == wanted
    ids = models["base"].tokenizer.encode
    stopped = [reason == "stop" for reason in reasons]
    assert stopped == [len(ids(text)) < 50 for text in texts]
    assert usage.prompt_tokens == 6
    assert usage.completion_tokens >= sum(len(ids(text)) for text in texts)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_same_request_as_text_or_as_ids(client, models):
    ids = LETTERS.encode("abc")
    asked = {"model": "base", "max_tokens": 9, "seed": 3}
    texts = [client.completions.create(prompt=p, **asked).choices[0].text for p in ("abc", ids)]
    assert texts == [models["base"].generate("abc", 9, seed=3)] * 2
    several = client.completions.create(prompt=[ids, ids[:1]], **asked)
    assert [choice.text for choice in several.choices] == models["base"].generate(
        ["abc", "a"], 9, seed=3
    )


def test_defaults_are_those_of_generate_but_for_the_seed(server, models):
    with server.http() as http:
        first, second = (http.post("/v1/completions", json={"prompt": None}) for _ in range(2))
        first, second = first.json(), second.json()
        assert first["model"] == "base"
        assert first["seed"] != second["seed"]
        again = http.post("/v1/completions", json={"seed": first["seed"]}).json()
        assert again["choices"] == first["choices"]
        assert first["choices"][0]["text"] == models["base"].generate(None, seed=first["seed"])
        calm = http.post("/v1/completions", json={"preset": "conservative", "seed": 1}).json()
        wanted = models["base"].generate(None, preset="conservative", seed=1)
        assert calm["choices"][0]["text"] == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_chat_follows_the_runs_template(client, models, stream):
    lm = models["talker"]
    parts = [{"type": "text", "text": "hat "}, {"type": "text", "text": "er"}]
    messages = [{"role": "developer", "content": "sag"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "sag"}, {"role": "user", "content": "hat er"}]
    ids, _ = encode_chat(lm.tokenizer, ChatTemplate.default(lm.tokenizer), plain)
    (new,) = lm.generate_ids([ids], 30, seed=2, temperature=0.8)
    wanted = lm.tokenizer.decode(new)
    answer = client.chat.completions.create(
        model="talker", messages=messages, max_tokens=30, seed=2, temperature=0.8, stream=stream
    )
    if stream:
        chunks = list(answer)
        assert chunks[0].object == "chat.completion.chunk"
        assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (
            len(chunks) - 1
        )
        text = "".join(c.choices[0].delta.content for c in chunks)
        answer = chunks[-1]
    else:
        assert answer.choices[0].message.role == "assistant"
        text = answer.choices[0].message.content
    assert text + "<|endoftext|>" == wanted
    assert answer.choices[0].finish_reason == "stop"


def test_a_base_model_does_not_chat(client):
    with pytest.raises(openai.BadRequestError, match="base is a base model") as refused:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "a"}])
    assert refused.value.code == "no_chat_template"


def test_logprobs_are_the_models_own(client, models):
    lm = models["base"]
    answer = client.completions.create(
        model="base", prompt="abc", max_tokens=6, logprobs=3, echo=True, seed=9, temperature=0.5
    )
    (choice,) = answer.choices
    text, told = choice.text, choice.logprobs
    assert text == "abc" + lm.generate("abc", 6, seed=9, temperature=0.5)
    assert "".join(told.tokens) == text
    assert told.text_offset == list(range(len(text)))
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    ids = LETTERS.encode(text)
    logits = lm.logits(ids)[:, : LETTERS.vocab_size]
    for place in range(1, len(ids)):
        row = logits[place - 1] - math.log(sum(math.exp(x) for x in logits[place - 1]))
        assert told.token_logprobs[place] == pytest.approx(row[ids[place]], abs=1e-4)
        best = {LETTERS.decode([int(i)]) for i in (-row).argsort()[:3]}
        assert set(told.top_logprobs[place]) == best | {text[place]}


def test_scoring_alone_writes_nothing(client):
    answer = client.completions.create(
        model="base", prompt="abc", max_tokens=0, logprobs=0, echo=True
    )
    assert answer.choices[0].text == "abc"
    assert len(answer.choices[0].logprobs.token_logprobs) == 3
    assert answer.choices[0].logprobs.top_logprobs is None
    assert answer.usage.completion_tokens == 0


def test_chat_logprobs(client):
    asked = {
        "model": "talker",
        "messages": [{"role": "user", "content": "hat er"}],
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **asked))
    content = whole.logprobs.content
    streamed = [entry for c in chunks for entry in c.choices[0].logprobs.content]
    assert streamed == content
    assert "".join(entry.token for entry in content) == whole.message.content
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.logprob


@pytest.mark.parametrize("model", ["base", "bytes"])
def test_explained_tokens_join_to_the_text(server, model):
    body = {"model": model, "prompt": "abc", "max_tokens": 40, "seed": 4, "explain": True}
    body |= {"top_k": 9, "top_p": 0.9, "n": 2, "stop": ["ea"]}
    texts, tokens = ["", ""], ["", ""]
    with server.http() as http:
        events = streamed(http, body)
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += "".join(token["text"] for token in choice["tokens"])
        assert tokens[choice["index"]] == texts[choice["index"]][: len(tokens[choice["index"]])]
        for token in choice["tokens"]:
            assert set(token) == {"id", "text", "p", "q", "alternatives", "cut"}
            assert token["q"] >= token["p"] > 0
            assert list(token["cut"])[:1] in (["top_k"], [])
    assert tokens == texts


def test_whole_characters_only(server, models):
    """Bytes that are no UTF-8 come out as U+FFFD, never as half a character or a broken event."""
    body = {"model": "bytes", "prompt": "é", "max_tokens": 60, "temperature": 2, "seed": 1}
    with server.http() as http:
        text = "".join(event["choices"][0]["text"] for event in streamed(http, body))
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text == whole == models["bytes"].generate("é", 60, temperature=2, seed=1)


def test_what_openai_clients_send_besides_is_ignored_and_what_would_matter_is_not(client):
    asked = {"model": "base", "prompt": "a", "max_tokens": 1}
    client.completions.create(**asked, user="me", best_of=1, logit_bias={}, suffix="")
    client.completions.create(**asked, extra_body={"metadata": {"a": "b"}, "store": True})
    for extra in ({"logit_bias": {"1": 5}}, {"best_of": 3}, {"suffix": "x"}, {"prefix": "x"}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**asked, extra_body=extra)
        assert next(iter(extra)) in refused.value.message


def test_adapters_are_models_of_their_own(tmp_path):
    base = octavo.load(make_run(tmp_path / "base"))
    finetune = FinetuneConfig(base=str(base.home), base_sha256=weights_sha256(base.checkpoint))
    config = Config(model=base.config, finetune=finetune, lora=LoraConfig(rank=2))
    model = assemble(config, base.model)
    torch.manual_seed(1)
    trained = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    Run.create(tmp_path / "voice", config, base.tokenizer, {}, trained)
    with running(tmp_path / "base", tmp_path / "voice") as server:
        texts = [
            server.openai().completions.create(model=m, prompt="abc", seed=1).choices[0].text
            for m in ("base", "voice")
        ]
    assert texts == [octavo.load(tmp_path / m).generate("abc", seed=1) for m in ("base", "voice")]
    assert texts[0] != texts[1]


def test_two_runs_of_one_name_are_refused(tmp_path):
    paths = [str(make_run(tmp_path / where / "run")) for where in ("a", "b")]
    with pytest.raises(ConfigError, match="two runs are called run"):
        load_models(paths, None, None)


def test_metrics_count(server):
    with server.http() as http:
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 7})
        http.get("/nowhere")
        text = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(lines['octavo_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(lines['octavo_requests_total{path="other",status="404"}']) >= 1
    assert float(lines['octavo_read_tokens_total{model="base"}']) >= 1
    assert float(lines['octavo_written_tokens_total{model="base"}']) >= 7
    assert float(lines['octavo_slots_in_use{model="base"}']) == 0
    assert float(lines['octavo_queue{model="base"}']) == 0
    assert float(lines['octavo_first_token_seconds_count{model="base"}']) >= 1
