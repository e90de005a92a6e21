"""Hands the page, and an exported folder where one is to be opened, to a browser on this machine.

Knows HTTP and which files there are; neither the model nor what the page does with it. Listens on the
loopback address only, answers GET and HEAD, and gives out the files that it listed when it started: a request
can name none beyond them.
"""

from __future__ import annotations

import io
import json
import re
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError, FoxEdgeError
from fox_edge.quant import GGUF, ONNX

HERE = Path(__file__).parent
PAGE_FILES = (
    "index.html",
    "style.css",
    "page.css",
    "page.js",
    "drop.js",
    "features.js",
    "worker.js",
    "memory.js",
    "folder.js",
    "gguf.js",
    "llama.js",
    "onnx.js",
    "engine.js",
    "generate.js",
    "tokenizer.js",
)
VENDORED = (
    "jinja.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.wasm.min.mjs",
    "tokenizers.min.mjs",
    "wllama-compat.js",
    "wllama-compat.wasm",
    "wllama.mjs",
    "wllama.wasm",
)
# What the page asks for first: where the model is that it shall open.
SERVED = "served.json"
FORMATS = (GGUF, ONNX)
_PART = 1 << 20  # bytes that are read at once
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


def serve(artifact: Artifact | None, port: int = 0) -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever`; `port` 0 takes a free one. None: what is dropped is opened.

    Raises ArtifactError for an artifact that the page cannot open, FoxEdgeError when the page's packages were
    not put into vendor/ or the port is taken.
    """
    if artifact is not None and artifact.manifest.format not in FORMATS:
        raise ArtifactError(
            f"{artifact.path}: is {artifact.manifest.format}, but the page opens {' and '.join(FORMATS)}"
        )
    files: dict[str, Path | bytes] = {name: HERE / name for name in PAGE_FILES}
    files |= {f"vendor/{name}": HERE / "vendor" / name for name in VENDORED}
    missing = next((name for name in files if not (HERE / name).is_file()), None)
    if missing is not None:
        raise FoxEdgeError(f"{missing} is missing: build the page with `npm ci && npm run vendor` in {HERE}")
    if artifact is not None:
        files |= {f"model/{name}": artifact.path / name for name in (MANIFEST, *artifact.manifest.files)}
    files[SERVED] = json.dumps({"model": None if artifact is None else "model/"}).encode()
    files[""] = files["index.html"]
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, files))
    except OSError as error:
        raise FoxEdgeError(f"port {port} of 127.0.0.1 cannot be opened ({error.strerror})") from None


class _Handler(BaseHTTPRequestHandler):
    """One request; `files` maps what a URL may say to what it gets."""

    protocol_version = "HTTP/1.1"

    def __init__(self, files: dict[str, Path | bytes], *arguments: object) -> None:
        self.files = files
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """The file itself."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Its headers."""
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        found = self.files.get(name)
        if found is None or (isinstance(found, Path) and not found.is_file()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        opened: IO[bytes] = found.open("rb") if isinstance(found, Path) else io.BytesIO(found)
        with opened as file:
            size = file.seek(0, io.SEEK_END)
            piece = _asked_for(self.headers.get("Range"), size)
            first, last = piece or (0, size - 1)
            self.send_response(HTTPStatus.PARTIAL_CONTENT if piece else HTTPStatus.OK)
            kind = _TYPES.get(Path(name or "index.html").suffix, "application/octet-stream")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(last - first + 1))
            if piece:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                file.seek(first)
                _copy(file, self.wfile, last - first + 1)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not worth a line each."""


def _asked_for(ranged: str | None, size: int) -> tuple[int, int] | None:
    """The first and the last byte that a Range header asks for (RFC 9110, 14.2); None: the whole file.

    One range of `bytes=FIRST-LAST` is served, others are passed over, as a server may.
    """
    found = re.fullmatch(r"bytes=(\d{1,15})-(\d{1,15})?", ranged or "")
    if found is None:
        return None
    first, last = int(found[1]), min(int(found[2] or size), size - 1)
    return (first, last) if first <= last else None


def _copy(source: IO[bytes], target: io.BufferedIOBase, count: int) -> None:
    """So many bytes from one file to another, or as many as there are."""
    while count > 0 and (part := source.read(min(count, _PART))):
        target.write(part)
        count -= len(part)
