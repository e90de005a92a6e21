"""Which choices suit this machine: a probe of at most 20 seconds, and the rule that picks.

Settings are tried in the order of what they are expected to be worth, each on top of the best so far, until
the time is spent. Where memory counts a setting runs in a process of its own; numbers of threads share one.
What changes answers (a quantized KV cache) is tried for `memory` alone. Knows settings, figures and the rule;
what is kept, and how it is used, is runtimes/tuning.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine, memory
from benchmarks.common.subject import Subject, open_subject
from benchmarks.common.table import Column, render
from benchmarks.latency.measure import measure
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores, physical_cores
from fox_edge.progress import Progress
from fox_edge.quant import GGUF, PTE
from runtimes.base import SessionOptions
from runtimes.tuning import store, words

BUDGET_S = 20.0
# Enough tokens to tell settings apart, few enough for several of them.
PROMPT_TOKENS, DECODE_TOKENS = 64, 8
# What 'balance' weighs: seconds for a question of this length and an answer of that.
_QUESTION, _ANSWER = 234, 128
# Differences below this share are noise; then the other good decides.
SLACK = 0.05
Choices = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What one setting measured."""

    choices: Choices
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int
    eligible: bool = True

    @property
    def request_s(self) -> float:
        """Seconds for a question and its answer."""
        return _QUESTION / self.prompt_tokens_per_s + _ANSWER / self.decode_tokens_per_s

    def cost(self, prefer: str) -> float:
        """What is to be small."""
        if prefer == "memory":
            return self.peak_rss_bytes
        if prefer == "prompt":
            return 1 / self.prompt_tokens_per_s
        return 1 / self.decode_tokens_per_s if prefer == "decode" else self.request_s


def choose(rows: Sequence[Figures], prefer: str) -> Figures:
    """The best setting: of those within SLACK of the least cost, those within SLACK of the least other cost.

    Seconds are the other cost of memory, memory that of seconds; between those left the first cost decides.
    What changes answers must save more than SLACK.
    """
    rows = [row for row in rows if row.eligible]
    limit = (1 + SLACK) * min(row.cost(prefer) for row in rows)
    near = [row for row in rows if row.cost(prefer) <= limit]
    near = [row for row in near if "kv" not in row.choices] or near

    def other_cost(row: Figures) -> float:
        return row.request_s if prefer == "memory" else row.peak_rss_bytes

    limit = (1 + SLACK) * min(map(other_cost, near))
    return min((row for row in near if other_cost(row) <= limit), key=lambda row: row.cost(prefer))


@dataclass
class Probe:
    """Runs settings until the time is spent: `rows` were measured, `skipped` were not."""

    subject: Subject
    prefer: str
    budget_s: float = BUDGET_S
    run: Callable[..., dict[str, Any]] = run_worker
    clock: Callable[[], float] = time.monotonic
    rows: list[Figures] = field(default_factory=list)
    skipped: list[Choices] = field(default_factory=list)
    _longest_s: float = 0.0

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def seconds(self) -> float:
        """Time spent so far."""
        return self.clock() - self._start

    def measure_all(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Every setting of the plan that there is time for; the first one runs in any case."""
        self._measure({}, other_threads())
        for n, step in enumerate(plan(self.subject.format, self.prefer)):
            progress(n + 1)
            best = choose(self.rows, self.prefer).choices
            choices = {name: value for name, value in (best | step).items() if value is not None}
            if choices in [*self.skipped, *(row.choices for row in self.rows)]:
                continue
            if self.seconds + self._longest_s > self.budget_s:
                self.skipped.append(choices)
            else:
                self._measure(choices, eligible=step.get("kv") != "q4_0")

    def _measure(self, choices: Choices, others: Sequence[int] = (), eligible: bool = True) -> None:
        """One process: a setting, then the same with other numbers of threads."""
        start = self.seconds
        job = {
            "task": "tune",
            "subject": self.subject.spec,
            "session": choices,
            "other_threads": list(others),
            "left_s": self.budget_s - start,
        }
        try:
            # However slow the machine is, there must be one measurement.
            found = self.run(job, timeout_s=self.budget_s - start if self.rows else None)
        except WorkerError:
            if not self.rows:
                raise
            self.skipped.append(choices)
            return
        first, *more = found["passes"]
        self.rows.append(_figures(choices, first, found, eligible))
        for threads, figures in zip(others, more, strict=False):
            self.rows.append(_figures({"threads": threads}, figures, found, eligible))
        if more and self.subject.format == GGUF:
            self._mix(found)
        self._longest_s = max(self._longest_s, found["one_s"])

    def _mix(self, found: dict[str, Any]) -> None:
        """Prompts and decoding may each have the number of threads that they like best."""
        prompt = max(self.rows, key=lambda row: row.prompt_tokens_per_s)
        decode = max(self.rows, key=lambda row: row.decode_tokens_per_s)
        if prompt is decode:
            return
        counts = {
            "threads": decode.choices.get("threads", physical_cores()),
            "prompt_threads": prompt.choices.get("threads", physical_cores()),
        }
        speeds = {
            "prompt_tokens_per_s": prompt.prompt_tokens_per_s,
            "decode_tokens_per_s": decode.decode_tokens_per_s,
        }
        self.rows.append(_figures(counts, speeds, found, True))


def _figures(choices: Choices, speeds: dict[str, Any], found: dict[str, Any], eligible: bool) -> Figures:
    return Figures(
        choices,
        speeds["prompt_tokens_per_s"],
        speeds["decode_tokens_per_s"],
        found["peak_rss_bytes"],
        eligible,
    )


def plan(format: str, prefer: str) -> Iterator[Choices]:
    """Changes to try, those first that are expected to be worth most; None takes a choice back.

    Of these only `kv` changes answers by more than the order in which sums are taken.
    """
    if format == PTE:  # its cache is as it was exported
        return
    coarse, coarser = ("q8_0", "q4_0") if format == GGUF else ("int8", None)
    if prefer == "memory":
        yield {"kv": coarse}
    if format == GGUF:
        yield {"repack": False}
        yield {"mmap": False}
        yield {"mmap": False, "repack": None}
        if prefer != "memory":
            yield {"flash_attention": False}
    if prefer == "memory" and coarser:
        yield {"kv": coarser}


def other_threads() -> list[int]:
    """Numbers of threads worth trying beside the default, the number of physical cores."""
    cores = physical_cores()
    return [n for n in dict.fromkeys((cores // 2, available_cores())) if 0 < n != cores]


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'tune': {subject, session, other_threads, left_s} -> speeds, the first's peak.

    Other numbers of threads are tried while there is time for another like the first.
    """
    start = time.monotonic()
    subject = open_subject(job["subject"])
    subject.prepare()
    session = subject.open_session(SessionOptions(**job["session"]))
    prompt = [1 + 7919 * n % (session.vocab_size - 1) for n in range(PROMPT_TOKENS)]
    prompt = prompt[: max(1, session.context - DECODE_TOKENS - 1)]
    passes = [measure(session, prompt, DECODE_TOKENS)]
    peak, one_s = memory().peak_rss, time.monotonic() - start
    for threads in job["other_threads"]:
        if time.monotonic() - start + one_s > job["left_s"] / 2:
            break
        session.close()
        session = subject.open_session(SessionOptions(**job["session"], threads=threads))
        passes.append(measure(session, prompt, DECODE_TOKENS))
    session.close()
    return {"passes": passes, "peak_rss_bytes": peak, "one_s": one_s}


def tune(spec: str | Path, prefer: str = "balance", budget_s: float = BUDGET_S) -> dict[str, Any]:
    """Probe an artifact on this machine, keep the choice beside it, and tell what was measured.

    Raises FoxEdgeError for what cannot be tuned, or a folder that cannot be written to.
    """
    subject = open_subject(spec)
    if subject.target != subject.spec:
        raise FoxEdgeError(f"{spec}: {subject.runtime} has no choices to tune yet; artifacts have")
    if not isinstance(subject.source, Artifact):
        raise FoxEdgeError(f"{spec}: only fox-edge's own artifacts can be tuned, not another tool's export")
    probe = Probe(subject, prefer, budget_s)
    with Progress("tuning") as progress:
        steps = len(list(plan(subject.format, prefer))) + 1
        probe.measure_all(lambda done: progress.update(done, steps))
    best = choose(probe.rows, prefer)
    rows = [_row(row, row is best) for row in probe.rows]
    kept = store(subject.source, best.choices, prefer, rows)
    return {
        "artifact": str(spec),
        "runtime": subject.runtime,
        "machine": machine(),
        "prefer": prefer,
        "budget_s": budget_s,
        "seconds": probe.seconds,
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "chosen": best.choices,
        "results": rows,
        "not_tried": [words(choices) for choices in probe.skipped],
        "file": str(kept),
    }


def _row(figures: Figures, chosen: bool) -> dict[str, Any]:
    return {
        "setting": words(figures.choices),
        "choices": figures.choices,
        "prompt_tokens_per_s": figures.prompt_tokens_per_s,
        "decode_tokens_per_s": figures.decode_tokens_per_s,
        "peak_rss_bytes": figures.peak_rss_bytes,
        "chosen": chosen,
    }


_RULES = {
    "balance": f"least time for a question of {_QUESTION} tokens and an answer of {_ANSWER}",
    "prompt": "fastest prompts",
    "decode": "fastest answers",
    "memory": "least memory",
}
COLUMNS = (
    Column("setting", "setting"),
    Column("prompt tok/s", "prompt_tokens_per_s", "{:,.0f}"),
    Column("decode tok/s", "decode_tokens_per_s", "{:,.1f}"),
    Column("peak MB", "peak_rss_bytes", "{:,.0f}", 1e-6),
    Column("", "mark"),
)


def tune_text(result: dict[str, Any]) -> str:
    """The table, the rule, and what is not to be overlooked."""
    rows = [row | {"mark": "chosen" if row["chosen"] else ""} for row in result["results"]]
    other = "the faster" if result["prefer"] == "memory" else "the smaller"
    lines = [
        render(COLUMNS, rows),
        f"prefer {result['prefer']}: {_RULES[result['prefer']]}; within {100 * SLACK:.0f} %, {other} one",
    ]
    kv = result["chosen"].get("kv")
    if kv:
        lines.append(
            f"a KV cache of {kv} changes answers a little: --kv, or tuning for anything else, undoes it"
        )
    if result["not_tried"]:
        lines.append(f"no time was left for: {'; '.join(result['not_tried'])}")
    lines.append(f"{result['seconds']:.1f} s; kept for this machine in {result['file']}")
    return "\n".join(lines)
