"""What the server counts, in Prometheus' text format.

Each number is written by one thread only: requests by the HTTP side, the rest by the engine. Reading them
from elsewhere may miss the last one, which does no harm. Knows numbers; not what they are about.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Histogram:
    """How many values were at most each bound, their number and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """The samples of this histogram: each bucket counts the smaller ones too."""
        out, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """All of the server's counters."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.answers: Counter[str] = Counter()
        self.prompt_tokens = self.cached_tokens = self.decoded_tokens = 0
        self._first_token = Histogram(_FIRST_TOKEN_S)
        self._token = Histogram(_TOKEN_S)

    def request(self, path: str, status: int) -> None:
        """A request was answered."""
        self.requests[path, status] += 1

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt got its slot; so many of its tokens need no run."""
        self.prompt_tokens += tokens
        self.cached_tokens += cached

    def first_token(self, seconds: float) -> None:
        """An answer's first token came so long after the request."""
        self.decoded_tokens += 1
        self._first_token.observe(seconds)

    def token(self, seconds: float) -> None:
        """Another token came so long after the one before."""
        self.decoded_tokens += 1
        self._token.observe(seconds)

    def answer(self, ending: str) -> None:
        """An answer ended."""
        self.answers[ending] += 1

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Prometheus' text; `gauges` are name -> (help, value) of what is measured now."""
        lines: list[str] = []

        def family(name: str, kind: str, help: str, samples: list[str]) -> None:
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} {kind}", *samples))

        requests = [
            f'fox_edge_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        family("fox_edge_requests_total", "counter", "HTTP requests answered.", requests)
        answers = [f'fox_edge_answers_total{{ending="{e}"}} {n}' for e, n in sorted(self.answers.items())]
        family("fox_edge_answers_total", "counter", "Answers, by how they ended.", answers)
        for name, value, help in (
            ("prompt", self.prompt_tokens, "Tokens of prompts."),
            ("cached", self.cached_tokens, "Tokens of prompts that were in a cache and needed no run."),
            ("decoded", self.decoded_tokens, "Tokens of answers."),
        ):
            name = f"fox_edge_{name}_tokens_total"
            family(name, "counter", help, [f"{name} {value}"])
        name = "fox_edge_first_token_seconds"
        family(name, "histogram", "From request to first token.", self._first_token.lines(name))
        name = "fox_edge_token_seconds"
        family(name, "histogram", "From token to token of one answer.", self._token.lines(name))
        for name, (help, number) in gauges.items():
            family(f"fox_edge_{name}", "gauge", help, [f"fox_edge_{name} {number:g}"])
        return "\n".join(lines) + "\n"


def rss_bytes() -> int | None:
    """This process's resident memory; None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None
