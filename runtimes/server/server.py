"""`fox-edge serve`: opens the model, takes the port, and runs until it is told to stop.

Knows uvicorn, signals and sockets. What is asked and answered is app.py's, how answers are made engine.py's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from fox_edge.errors import FoxEdgeError, MissingPackageError
from fox_edge.progress import say
from runtimes.base import SessionOptions, SharingSession, split_prefix
from runtimes.chat.model import ChatModel, find_chat_model
from runtimes.server.engine import Engine
from runtimes.server.metrics import rss_bytes

try:
    import uvicorn

    from runtimes.server.app import make_app
    from runtimes.server.guard import Guard, loopback_names
    from runtimes.server.service import Service
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("fox_edge", "runtimes"):
        raise
    raise MissingPackageError(error.name or "fastapi", "serve") from None

API_KEY = "FOX_EDGE_API_KEY"
# After the grace time: for what was told to end to be sent.
_LAST_WORDS_S = 5
# How long a thread may keep the interpreter while another wants it: a token should not wait for that.
_SWITCH_S = 0.0005


@dataclass(frozen=True)
class ServeOptions:
    """What a user may choose about serving, beside the session."""

    host: str = "127.0.0.1"
    port: int = 8080
    slots: int = 4
    queue: int = 64
    max_tokens: int | None = None
    timeout_s: float | None = None
    grace_s: float = 30.0
    api_key: str | None = None
    name: str | None = None


def serve(
    spec: str, session: SessionOptions, options: ServeOptions, ready: Callable[[dict[str, Any]], None]
) -> None:
    """Serve a model until a signal comes; `ready` is told once when requests are taken.

    Raises FoxEdgeError when the port is taken, when a key is needed and there is none, and what opening the
    model raises.
    """
    local = is_loopback(options.host)
    key = options.api_key if options.api_key is not None else os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise FoxEdgeError(
            f"the API key is empty; set --api-key or {API_KEY} to a text that is hard to guess"
        )
    if key is None and not local:
        raise FoxEdgeError(
            f"--host {options.host} can be reached from other machines, so an API key is needed: "
            f"set --api-key or {API_KEY}"
        )
    model = find_chat_model(spec)
    listener = listen(options.host, options.port)
    with contextlib.closing(listener):
        service = open_service(model, spec, session, options)
        try:
            names = loopback_names(options.host) if local else None
            app = Guard(make_app(service), service.engine.metrics, key, names)
            server = _Server(app, service.engine, options.grace_s)
            url = _url(options.host, listener)
            server.on_started = lambda: ready(_ready(url, model, service, listener, key is not None))
            sys.setswitchinterval(_SWITCH_S)
            server.run([listener])
        finally:
            service.engine.close()


def open_service(model: ChatModel, spec: str, session: SessionOptions, options: ServeOptions) -> Service:
    """Open the model and start its engine. Raises FoxEdgeError."""
    if options.slots < 1 or options.queue < 0:
        raise FoxEdgeError(f"{options.slots} slots and a queue of {options.queue}: at least 1 and 0 are due")
    tokenizer = model.tokenizer()
    sampling, remark = model.sampling()
    for note in [*model.notes, *([remark] if remark else [])]:
        say(f"note: {note}")
    opened = model.open(replace(session, conversations=options.slots))
    try:
        if not isinstance(opened, SharingSession):
            raise FoxEdgeError(f"{model.runtime} cannot hold several conversations on the same weights")
        engine = Engine(opened, options.slots, options.queue)
    except BaseException:
        opened.close()
        raise
    engine.start()
    name = options.name or _own_name(spec)
    return Service(name, tokenizer, engine, _card(model), sampling, options.max_tokens, options.timeout_s)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises FoxEdgeError when it cannot."""
    if not 0 <= port <= 65535:
        raise FoxEdgeError(f"--port {port} is not a port from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise FoxEdgeError(f"cannot listen on {host}, port {port}: {reason}; choose another --port") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on that host; raises FoxEdgeError for an unknown name."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise FoxEdgeError(f"--host {host}: {error.strerror or error}") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


class _Server(uvicorn.Server):
    """uvicorn, whose end begins with the engine's: answers in flight get their grace time."""

    def __init__(self, app: Any, engine: Engine, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=int(grace_s) + _LAST_WORDS_S,
            )
        )
        self.on_started: Callable[[], None] | None = None
        self._engine, self._grace_s = engine, grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell."""
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end, then close connections."""
        self._engine.drain(self._grace_s)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for an end, a second one for an end at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are this server's; to have stopped for one is no failure, so none is raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _own_name(spec: str) -> str:
    """The model's id where the user gives none: the last part of its path."""
    return Path(split_prefix(spec)[1]).resolve().name


def _card(model: ChatModel) -> dict[str, Any]:
    """What is known about the model: its size, and what verification found."""
    card: dict[str, Any] = {
        "title": model.name,
        "runtime": model.runtime,
        "format": model.format,
        "quant": model.quant,
    }
    if model.artifact is None:
        return card
    manifest, found = model.artifact.manifest, model.artifact.manifest.verification or {}
    return card | {
        "bytes": model.artifact.total_bytes(),
        "parameters": manifest.parameters,
        "verified": bool(found.get("passed")),
        "mean_kl_nats": found.get("mean_kl_nats"),
        "top1_agreement_percent": found.get("top1_agreement_percent"),
    }


def _url(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


def _ready(
    url: str, model: ChatModel, service: Service, listener: socket.socket, locked: bool
) -> dict[str, Any]:
    """What is told once requests are taken."""
    return {
        "url": url,
        "port": listener.getsockname()[1],
        "model": service.name,
        "title": model.name,
        "runtime": model.runtime,
        "context": service.engine.context,
        "slots": service.engine.slots,
        "rss_bytes": rss_bytes(),
        "api_key": locked,
        "pid": os.getpid(),
    }


def ready_text(ready: dict[str, Any]) -> str:
    """That, as one line for the user."""
    memory = f", {ready['rss_bytes'] / 1e6:,.0f} MB of memory" if ready["rss_bytes"] else ""
    return (
        f"{ready['url']} serves {ready['title']}, on {ready['runtime']}, as '{ready['model']}': "
        f"{ready['slots']} x {ready['context']} tokens of context{memory}"
    )
