"""A model in the browser, to be measured: our page in a headless Chromium, which opens an artifact from us.

The page runs whole conversations and reads its own clock; here are only the choices that go in and the
figures that come out. There are no logits: what a page can tell is text, tokens and times. Knows the page's
address and what it exposes (`foxEdge`); not how it runs a model.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn
from urllib.parse import urlencode

from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import GGUF
from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits, Occupied, SessionOptions, TimedTurn, check_choices
from runtimes.browser.chromium import Chromium, descendants
from runtimes.browser.server import serve
from runtimes.browser.tree_memory import Held, Watch
from runtimes.kv_types import default_kv

_LOAD_S, _SETTLE_S = 600.0, 0.5
_NO_LOGITS = "in the browser there are text and times, but no logits: only fox-edge bench can measure it"


class BrowserSession:
    """A `runtimes.base.RemoteSession`. `load_s`: from asking for the page until the model could be asked."""

    length = 0

    def __init__(self, artifact: Artifact, options: SessionOptions, flags: Sequence[str] = ()) -> None:
        check_choices(options, "browser", [default_kv(artifact.manifest.format)])
        if options.speculate is not None:
            raise FoxEdgeError("--speculate: the page in the browser does not guess ahead")
        self._artifact = artifact
        self._by_text = artifact.manifest.format == GGUF
        self._tokenizer = Tokenizer.from_folder(artifact.path)
        with contextlib.ExitStack() as stack:
            address = stack.enter_context(_serving(artifact))
            self._chromium = Chromium(flags)
            stack.callback(self._chromium.close)
            time.sleep(_SETTLE_S)  # some of its processes come a little later
            self._empty = self._watch().look()
            with self._watch() as watch:
                opened = self._open(address, options)
            self._peak = watch.peak_bytes
            self._stack = stack.pop_all()
        self.load_s: float = opened["loadSeconds"]
        self.context: int = opened["context"]
        self.vocab_size: int = opened["vocabSize"]
        self.threads: int = opened["threads"]

    def converse(self, turns: Sequence[Sequence[int]], decode_tokens: int) -> list[TimedTurn]:
        """As RemoteSession's. llama.cpp in the page cuts text into tokens by itself: they may be others."""
        asked = [{"text": self._text(ids), "ids": list(ids)} for ids in turns]
        found = self._evaluate(f"foxEdge.converse({json.dumps(asked)}, {decode_tokens})")
        return [self._timed(turn, decode_tokens + 1) for turn in found]

    def occupied(self) -> Occupied:
        """What the browser's processes hold; see tree_memory.py."""
        now = self._watch().look() or Held(0, 0, 0)
        self._peak = max(self._peak, now.total)
        empty = None if self._empty is None else self._empty.total
        return Occupied(self._peak, now.anonymous, now.file, empty)

    def close(self) -> None:
        """End the browser and the server."""
        self._stack.close()

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Refused, as everything is that asks for logits."""
        self._refuse()

    def step(self, token: int) -> Logits:
        """Refused."""
        self._refuse()

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Refused."""
        self._refuse()

    def truncate(self, length: int) -> None:
        """Nothing: every conversation begins with an empty cache."""

    def reset(self) -> None:
        """Nothing, as truncate."""

    @staticmethod
    def need(_artifact: Artifact, _options: SessionOptions) -> NoReturn:
        """Refused: what a browser takes is its own affair."""
        raise FoxEdgeError("what a browser will take is not reckoned: fox-edge bench measures it")

    def _open(self, address: str, options: SessionOptions) -> dict[str, Any]:
        wanted = {"threads": options.threads, "context": options.context}
        query = urlencode({name: value for name, value in wanted.items() if value is not None})
        self._chromium.open(f"{address}?{query}")
        opened: dict[str, Any] = self._evaluate("foxEdge.opened")
        return opened

    def _evaluate(self, expression: str, timeout_s: float = _LOAD_S) -> Any:
        try:
            return self._chromium.evaluate(expression, timeout_s)
        except FoxEdgeError as error:
            raise FoxEdgeError(f"{self._artifact.path}: in the browser: {error}") from None

    def _text(self, ids: Sequence[int]) -> str | None:
        """A turn for llama.cpp, which puts <bos> before the first by itself; others take ids."""
        return self._tokenizer.decode(ids) if self._by_text else None

    def _timed(self, turn: dict[str, Any], expected: int) -> TimedTurn:
        stamps, asked = turn["stamps"], turn["asked"]
        if len(stamps) != expected:
            raise FoxEdgeError(f"{self._artifact.path}: the page wrote {len(stamps)} tokens of {expected}")
        return TimedTurn(turn["promptTokens"], asked, stamps[0] - asked, stamps)

    def _watch(self) -> Watch:
        return Watch(lambda: descendants(self._chromium.pid))

    def _refuse(self) -> NoReturn:
        raise FoxEdgeError(f"{self._artifact.path}: {_NO_LOGITS}")


@contextlib.contextmanager
def _serving(artifact: Artifact) -> Iterator[str]:
    """The page and the artifact on a free port, in a thread; gives the page's address."""
    server = serve(artifact)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
