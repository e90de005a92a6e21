"""A real server on a free port, with the embedded model behind it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, find_recipe
from runtimes.base import BatchingSession, SessionOptions
from runtimes.chat.model import find_chat_model
from runtimes.server import server
from runtimes.server.app import make_app
from runtimes.server.guard import Guard, loopback_names
from runtimes.server.server import ServeOptions, listen, open_service
from runtimes.server.service import Service

ONE = SessionOptions(threads=1)


@dataclass
class Served:
    """A running server. `send` is a plain request: status, headers, and the body as JSON or text."""

    url: str
    port: int
    service: Service

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(text) if "json" in found["content-type"] else text

    def chat(self, content: Any = "Tom has 12 apples.", **fields: Any) -> tuple[int, dict[str, str], Any]:
        """A chat of one message, or with `messages` in the fields."""
        body = {"model": self.service.name, "messages": [{"role": "user", "content": content}], **fields}
        return self.send("POST", "/v1/chat/completions", body)


Serve = Callable[..., contextlib.AbstractContextManager[Served]]


@contextlib.contextmanager
def running(spec: str, key: str | None = None, **options: Any) -> Iterator[Served]:
    """A server in a thread of this process, until the context ends."""
    chosen = ServeOptions(**options)
    service = open_service(find_chat_model(spec), spec, ONE, chosen)
    listener = listen("127.0.0.1", 0)
    app = Guard(make_app(service), service.engine.metrics, key, loopback_names("127.0.0.1"))
    runner = server._Server(app, service.engine, chosen.grace_s)
    started = threading.Event()
    runner.on_started = started.set
    thread = threading.Thread(target=runner.run, args=([listener],))
    thread.start()
    try:
        assert started.wait(20)
        port = listener.getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", port, service)
    finally:
        runner.should_exit = True
        thread.join()
        service.engine.close()


def slow_down(served: Served) -> None:
    """A thousand tokens take ten seconds from now on."""
    session: Any = served.service.engine._slots.all[0].cache.session
    name = "step_many" if isinstance(session, BatchingSession) else "step"
    step = getattr(session, name)

    def slow(*args: Any) -> Any:
        time.sleep(0.01)
        return step(*args)

    setattr(session, name, slow)


@pytest.fixture(scope="package")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The embedded model as GGUF."""
    folder: Path = tmp_path_factory.mktemp("serve") / "nano-int8"
    return export_gguf(Checkpoint.open("nano"), folder, find_recipe(GGUF, "int8"))


@pytest.fixture(scope="package")
def served(artifact: Artifact) -> Iterator[Served]:
    """One server for the tests that leave it as it is: two slots, four may wait, answers of up to 200."""
    with running(str(artifact.path), slots=2, queue=4, max_tokens=200) as it:
        yield it
