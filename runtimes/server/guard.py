"""What a request passes before any route sees it: who may ask, from where, and how much they may send.

A server on loopback is reachable by every page that the user's browser shows, so the Host header is checked
there (against DNS rebinding), and no page of another origin is let in anywhere. Knows ASGI and headers; not
what the routes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from runtimes.server.errors import ApiError
from runtimes.server.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 8 << 20
BODY_TIMEOUT_S = 30.0
# How long what a refused client still sends is read and thrown away, so that it gets to read the answer.
_LINGER_S = 1.0
# Open to everybody: the page (which asks for the key) and a sign of life.
_OPEN = ("/", "/health")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application around another. `names`: the Host names to answer to; None for any."""

    def __init__(
        self, app: App, metrics: Metrics, api_key: str | None = None, names: tuple[str, ...] | None = None
    ) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if api_key is None else api_key.encode()
        self._names = names

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.request(route.path if route else "other", message["status"])
                message["headers"] = [*message.get("headers", []), *_encoded(_HEADERS)]
            await send(message)

        try:
            self._check(scope)
            body = await _read(receive) if scope["method"] == "POST" else None
        except ApiError as error:
            await _refuse(error, receive, watched)
            return
        await self._app(scope, receive if body is None else _Again(body, receive), watched)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Raises ApiError for what shall not get through."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._names is not None and _host_name(host) not in self._names:
            raise ApiError(403, f"this server does not answer to the name '{host[:100]}'", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, f"pages of '{origin[:100]}' may not use this server", code="wrong_origin")
        if self._key is not None and scope["path"] not in _OPEN:
            self._check_key(headers.get("authorization", ""))
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"the body is '{kind[:100]}', but application/json is due")
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > MAX_BODY_BYTES:
                raise too_large(f"{int(length):,}")

    def _check_key(self, given: str) -> None:
        scheme, _, key = given.partition(" ")
        assert self._key is not None
        # Compared in full even where the beginning differs: the time taken tells nothing.
        if not hmac.compare_digest(key.strip().encode("latin-1", "replace"), self._key) or (
            scheme.lower() != "bearer"
        ):
            message = "a wrong API key" if given else "an API key is needed, as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class _Again:
    """A `receive` that gives a body that was read already, and then whatever comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _read(receive: Receive) -> bytes:
    """A request's body; raises ApiError when it is too long, takes too long, or breaks off."""
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the body broke off")
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > MAX_BODY_BYTES:
                    raise too_large(f"at least {size:,}")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="timeout") from None
    return b"".join(parts)


def too_large(size: str) -> ApiError:
    """The refusal of a body."""
    return ApiError(
        413, f"the body has {size} bytes, but at most {MAX_BODY_BYTES:,} are read", code="too_large"
    )


def loopback_names(host: str) -> tuple[str, ...]:
    """The names under which a server on loopback is asked for."""
    return tuple({*_LOOPBACK_NAMES, host.lower()})


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    with contextlib.suppress(ValueError):
        return (urlsplit(f"//{host}").hostname or "").lower()
    return ""


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer with an error and close the connection; what is still being sent is thrown away for a moment."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **error.headers,
    }
    await send({"type": "http.response.start", "status": error.status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
