"""Stop strings: text that ends an answer, found while the answer streams.

Knows text only: neither tokens, nor who reads it. What may be the beginning of a stop string is held back
until more text decides, so that a reader never sees a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from fox_edge.errors import FoxEdgeError


class StopStrings:
    """Passes text on until one of `stops` appears; `found` is then that one, and nothing more comes out.

    The stop string that is whole first ends the text, of several the longest: however the text is cut.
    Raises FoxEdgeError for an empty stop string, which would end every answer before it began.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise FoxEdgeError("a stop string is empty, but it must have at least one character")
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can no longer be a part of a stop string, perhaps none."""
        if self.found is not None:
            return ""
        text = self._held + text
        whole = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if whole:
            end, _, self.found = min(whole)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """At the end of the answer: what was held back for nothing."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
