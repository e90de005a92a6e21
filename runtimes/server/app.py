"""The routes: OpenAI's three, health, metrics, and the chat page.

Knows FastAPI and the service; the shapes of requests and answers are elsewhere, and so is who may ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from runtimes.server.answer import Answer, Delta
from runtimes.server.engine import Job, QueueFull, ShuttingDown
from runtimes.server.errors import ApiError
from runtimes.server.metrics import CONTENT_TYPE, rss_bytes
from runtimes.server.page import Page
from runtimes.server.requests import ChatRequest, CompletionRequest, parse
from runtimes.server.service import Service
from runtimes.server.shapes import DONE, Shape, event

# When to ask again after a full queue.
_RETRY_AFTER_S = 5


def make_app(service: Service) -> FastAPI:
    """The application, without its guard."""
    app = FastAPI(title="fox-edge", docs_url=None, redoc_url=None, openapi_url=None)
    page = Page()

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy})

    @app.get("/health")
    async def health() -> Response:
        if service.engine.failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(service), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.describe()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return JSONResponse(service.describe())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete(service, request, parse(ChatRequest, await request.body()))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _complete(service, request, parse(CompletionRequest, await request.body()))

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]} is not something this server does"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        message = f"a bug in the server ({type(error).__name__})"
        return JSONResponse(ApiError(500, message).body(), 500)

    return app


async def _complete(service: Service, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
    """Have an answer written, and give it whole or as it grows."""
    _check_model(service, asked.model)
    answer = Answer(service.tokenizer, asked.stops())
    # Tokenizing a long prompt and reading a grammar take a while.
    job = await asyncio.to_thread(service.job, asked, answer)
    _submit(service, job)
    watch = asyncio.create_task(_cancel_on_disconnect(request, job))
    chat = isinstance(asked, ChatRequest)
    shape = Shape(
        chat,
        ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        service.name,
        int(time.time()),
        logprobs=job.logprobs is not None,
        usage=asked.include_usage,
    )
    try:
        batches = answer.deltas()
        first = await anext(batches)
        if not asked.stream:
            whole = await _whole(shape, first, batches)
            watch.cancel()
            return JSONResponse(whole)
        # What goes wrong before the first token still has a status of its own.
        opening = b"".join(event(chunk) for chunk in shape.opening()) + _events(shape, first)
    except BaseException:
        job.cancel()
        watch.cancel()
        raise
    return StreamingResponse(
        _stream(shape, opening, first, batches, job, watch),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


async def _whole(shape: Shape, first: list[Delta], batches: AsyncIterator[list[Delta]]) -> dict[str, object]:
    deltas = list(first)
    async for batch in batches:
        deltas += batch
    outcome = deltas[-1].outcome
    assert outcome is not None
    return shape.whole(deltas, outcome)


async def _stream(
    shape: Shape,
    opening: bytes,
    first: list[Delta],
    batches: AsyncIterator[list[Delta]],
    job: Job,
    watch: asyncio.Task[None],
) -> AsyncIterator[bytes]:
    """The events of an answer; what goes wrong on the way is its last event."""
    try:
        yield opening
        async for batch in batches:
            yield _events(shape, batch)
        yield DONE
    except ApiError as error:
        yield event(error.body())
    finally:
        job.cancel()
        watch.cancel()


def _events(shape: Shape, batch: list[Delta]) -> bytes:
    return b"".join(event(chunk) for delta in batch for chunk in shape.chunk(delta))


def _submit(service: Service, job: Job) -> None:
    try:
        service.engine.submit(job)
    except QueueFull as error:
        retry = {"Retry-After": str(_RETRY_AFTER_S)}
        raise ApiError(429, str(error), code="queue_full", headers=retry) from None
    except ShuttingDown as error:
        raise ApiError(503, str(error), code="shutting_down") from None


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        message = f"the model '{name[:100]}' is not served here, but '{service.name}' is"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _cancel_on_disconnect(request: Request, job: Job) -> None:
    """Wait for the client to hang up, and free the slot then."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()


def _metrics(service: Service) -> str:
    engine = service.engine
    return engine.metrics.text(
        {
            "slots": ("Conversations side by side.", engine.slots),
            "slots_busy": ("Answers being written.", engine.busy),
            "queue_depth": ("Requests that wait for a slot.", engine.queued),
            "rss_bytes": ("Resident memory of the process.", rss_bytes() or 0),
        }
    )
