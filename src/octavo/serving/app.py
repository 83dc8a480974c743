"""The HTTP side: which paths there are, and every way out of them as OpenAI's objects.

What a request may hold is in `schemas`, who may send one in `gate`, what is written in
`scheduler`. All of this runs in the event loop and only hands work over.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from octavo.errors import OctavoError
from octavo.serving.answers import Answer, Choice, Part
from octavo.serving.gate import Gate
from octavo.serving.limits import Limits
from octavo.serving.metrics import Metrics
from octavo.serving.models import Models, Served, invalid
from octavo.serving.playground import playground
from octavo.serving.refusals import CODES, Refusal, closing
from octavo.serving.scheduler import Job, Written
from octavo.serving.schemas import DEFAULT_TOKENS, ChatRequest, CompletionRequest

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}


def create_app(
    models: Models,
    limits: Limits,
    metrics: Metrics,
    key: str | None = None,
    host: str = "localhost",
) -> FastAPI:
    """The server's app; without a ``key`` only requests to ``host`` and the loopback are taken."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        models.close()

    app = FastAPI(title="octavo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate, limits=limits, key=key, hosts={*LOOPBACK, host.lower()}, metrics=metrics
    )
    _tell_errors(app)
    _add_state_routes(app, models, metrics)
    app.get("/")(playground)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [each.about() for each in models.by_name.values()]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        return models.find(name).about()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = models.find(body.model)
        prompts = [served.encode(prompt) for prompt in body.prompts]
        return await _Work(models, served, body, prompts, body.stops).respond(request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        served = models.find(body.model)
        stops = [*body.stops, served.chat_stop()]
        prompt = served.encode_messages([message.plain() for message in body.messages])
        return await _Work(models, served, body, [prompt], stops).respond(request)

    return app


def _add_state_routes(app: FastAPI, models: Models, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = models.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 500)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if models.closing:
            raise closing()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


class _Work:
    """One request for text, from its row in the queue to its answer."""

    def __init__(
        self,
        models: Models,
        served: Served,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        stops: list[str],
    ) -> None:
        if models.closing:
            raise closing()
        self.body = body
        self.prompt_tokens, self.new_tokens = sum(map(len, prompts)), 0
        sampling, explain = body.sampling(), bool(body.explain)
        copies, tops = body.copies, body.tops
        most = min(DEFAULT_TOKENS, served.limits.tokens) if body.longest is None else body.longest
        rows = served.rows(prompts, copies, most, sampling, stops, tops, explain)
        chat = isinstance(body, ChatRequest)
        self.echo = isinstance(body, CompletionRequest) and bool(body.echo)
        score = self.echo and tops is not None
        self.job = Job(rows, served.limits.seconds, score)
        self.answer = Answer(served.name, served.tokenizer, sampling.seed, chat, tops, explain)
        self.prompt_of = [ids for ids in prompts for _ in range(copies)]
        self.choices: dict[int, Choice] = {}
        self.tokenizer = served.tokenizer
        served.scheduler.submit(self.job)

    async def respond(self, request: Request) -> Response:
        """The whole answer or a stream of it, begun: what fails before the first token is told by
        the status.
        """
        watch = asyncio.create_task(_cancel_when_gone(request, self.job))
        try:
            parts = self._parts()
            first = await anext(parts)
            if self.body.stream:
                stream = self._events(first, parts, watch)
                return StreamingResponse(
                    stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
                )
            texts = {first[0]: [first[1]]}
            async for index, part in parts:
                texts.setdefault(index, []).append(part)
        except BaseException:
            watch.cancel()
            self.job.cancel()
            raise
        watch.cancel()
        return JSONResponse(self.answer.whole(texts, self._usage()))

    async def _events(
        self,
        first: tuple[int, Part],
        parts: AsyncIterator[tuple[int, Part]],
        watch: asyncio.Task[None],
    ) -> AsyncIterator[bytes]:
        """Server-sent events. What was written while one was being sent goes into the next."""
        try:
            yield _event(self.answer.chunk(*first))
            async for index, part in parts:
                yield _event(self.answer.chunk(index, part))
            if self.body.wants_usage:
                yield _event(self.answer.usage_chunk(self._usage()))
        except Refusal as refusal:
            yield _event(refusal.body())
        finally:
            watch.cancel()
            self.job.cancel()
        yield b"data: [DONE]\n\n"

    async def _parts(self) -> AsyncIterator[tuple[int, Part]]:
        """What was written, choice by choice."""
        async for written in self.job:
            rows: dict[int, list[Written]] = {}
            for each in written:
                rows.setdefault(each.piece.row, []).append(each)
            for row, some in rows.items():
                if row not in self.choices:
                    tops = self.job.prompt_tops.get(row, [])
                    self.choices[row] = Choice(self.tokenizer, self.prompt_of[row], tops, self.echo)
                self.new_tokens += sum(each.piece.id is not None for each in some)
                yield row, self.choices[row].add(some)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }


async def _cancel_when_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _tell_errors(app: FastAPI) -> None:
    """Every failure as OpenAI's error object."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(OctavoError)
    async def unusable(request: Request, error: OctavoError) -> Response:
        return invalid(str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            return invalid("send JSON, with the header Content-Type: application/json").response()
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        param = where[0] if where and first["type"] != "json_invalid" else None
        what = first["msg"] if param is None else f"{param}: {first['msg']}"
        return invalid(what, param).response()

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> Response:
        code = CODES.get(error.status_code, "invalid_request")
        refusal = Refusal(error.status_code, code, str(error.detail))
        refusal.headers |= dict(error.headers or {})
        return refusal.response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return Refusal(500, "bug", "this is a bug in octavo; see the server's log").response()
