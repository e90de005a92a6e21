"""Hands the page and one exported folder to a browser on this machine.

Knows HTTP and which files there are; neither the model nor what the page does with it. Listens on the
loopback address only, answers GET and HEAD, and gives out the files that it listed when it started: a request
can name none beyond them.
"""

from __future__ import annotations

import shutil
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError, FoxEdgeError
from fox_edge.quant import ONNX

HERE = Path(__file__).parent
PAGE_FILES = (
    "index.html",
    "style.css",
    "page.js",
    "worker.js",
    "engine.js",
    "folder.js",
    "generate.js",
    "tokenizer.js",
)
VENDORED = (
    "jinja.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.wasm.min.mjs",
    "tokenizers.min.mjs",
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
# Threads in WebAssembly need a page that is isolated from other origins.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


def serve(artifact: Artifact, port: int = 0) -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever`; `port` 0 takes a free one.

    Raises ArtifactError for an artifact that is no ONNX model, FoxEdgeError when the page's packages were not
    put into vendor/ or the port is taken.
    """
    if artifact.manifest.format != ONNX:
        raise ArtifactError(
            f"{artifact.path}: is {artifact.manifest.format}, but the page opens {ONNX} folders"
        )
    files = {name: HERE / name for name in PAGE_FILES}
    files |= {f"vendor/{name}": HERE / "vendor" / name for name in VENDORED}
    missing = next((name for name, path in files.items() if not path.is_file()), None)
    if missing is not None:
        raise FoxEdgeError(f"{missing} is missing: build the page with `npm ci && npm run vendor` in {HERE}")
    files |= {f"model/{name}": artifact.path / name for name in (MANIFEST, *artifact.manifest.files)}
    files[""] = files["index.html"]
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, files))
    except OSError as error:
        raise FoxEdgeError(f"port {port} of 127.0.0.1 cannot be opened ({error.strerror})") from None


class _Handler(BaseHTTPRequestHandler):
    """One request; `files` maps what a URL may say to what it gets."""

    protocol_version = "HTTP/1.1"

    def __init__(self, files: dict[str, Path], *arguments: object) -> None:
        self.files = files
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """The file itself."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Its headers."""
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = self.files.get(unquote(urlsplit(self.path).path).removeprefix("/"))
        if path is None or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not worth a line each."""
