"""What measuring costs: the harness against the barest loop that decodes, in turn, on the same open session.

    python -m benchmarks.overhead ARTIFACT... --results FILE.json [--pairs N] [--decode-tokens N]

Two answers, which must agree. The difference between the two loops on a real model, pair by pair, as an
interval: honest, and as blurred as the machine is noisy. And the time that the clockwork itself takes for a
token, on a session that computes nothing, as a share of a real token's time: sharp, but blind to whatever the
clockwork might do to a model's caches.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import open_subject
from benchmarks.common.table import Column, render
from benchmarks.latency.conditions import Noise, describe, snapshot
from benchmarks.latency.intervals import bootstrap_median
from benchmarks.latency.users import Clock, time_turn
from benchmarks.latency.workloads import find_workload, waves
from fox_edge.progress import Progress
from runtimes.base import Logits, Session, SessionOptions

LIMIT_PERCENT = 1.0
PROMPT_TOKENS, DECODE_TOKENS, PAIRS = 32, 128, 40


class Idle:
    """A session that computes nothing: what is left is the loop around it."""

    def __init__(self, vocab_size: int) -> None:
        self.context, self.vocab_size, self.length = sys.maxsize, vocab_size, 0
        self._logits = np.zeros(vocab_size, np.float32)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Nothing but an answer."""
        return self._logits

    def step(self, token: int) -> Logits:
        """Nothing but an answer."""
        return self._logits

    def reset(self) -> None:
        """There is no cache."""


def bare_s(session: Any, prompt: Sequence[int], decode_tokens: int, clock: Clock) -> float:
    """Seconds to decode so many tokens with nothing but the model and an argmax."""
    session.reset()
    token = int(session.prefill(prompt).argmax())
    start = clock()
    for _ in range(decode_tokens):
        token = int(session.step(token).argmax())
    return clock() - start


def harness_s(session: Any, prompt: Sequence[int], decode_tokens: int, clock: Clock) -> float:
    """Seconds that the harness takes for the same, by a clock around it: its own stamps are part of it."""
    session.reset()
    before = clock()
    turn, _ = time_turn(session, prompt, decode_tokens, clock)
    # What lies before the first token is the prompt's.
    return clock() - before - (turn.stamps_s[0] - turn.asked_s)


def compare(
    session: Any,
    prompt: Sequence[int],
    decode_tokens: int,
    pairs: int,
    clock: Clock = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Bare and measured seconds of each pair; every other pair has them the other way round."""
    loops = (bare_s, harness_s)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(-1, pairs):
        for n in (0, 1) if pair % 2 else (1, 0):
            seconds = loops[n](session, prompt, decode_tokens, clock)
            if pair >= 0:  # the one before is a warm-up
                times[n].append(seconds)
    return times


def overhead(spec: str, decode_tokens: int, pairs: int, threads: int | None) -> dict[str, Any]:
    """One subject's row."""
    subject = open_subject(spec)
    work = find_workload("custom", PROMPT_TOKENS, decode_tokens)
    prompt = waves(work, subject.tokenizer())[0][0][0]
    session: Session = subject.open_session(SessionOptions(context=work.positions, threads=threads))
    with contextlib.closing(session):
        bare, measured = compare(session, prompt, decode_tokens, pairs)
    idle_bare, idle_measured = compare(Idle(session.vocab_size), prompt, decode_tokens, pairs)
    clockwork_s = max(0.0, min(idle_measured) - min(idle_bare)) / decode_tokens
    token_s = statistics.median(bare) / decode_tokens
    ratios = np.divide(measured, bare)
    interval = bootstrap_median(list(ratios))
    return {
        "artifact": spec,
        "runtime": subject.runtime,
        "quant": subject.quant,
        "pairs": pairs,
        "decode_tokens": decode_tokens,
        "token_s": token_s,
        "overhead_percent": 100 * (float(np.median(ratios)) - 1),
        "interval_percent": interval and [100 * (end - 1) for end in interval],
        "clockwork_s": clockwork_s,
        "clockwork_percent": 100 * clockwork_s / token_s,
        "samples": {"bare_s": bare, "harness_s": measured},
    }


COLUMNS = (
    Column("artifact", "artifact"),
    Column("runtime", "runtime"),
    Column("ms/token", "token_s", "{:.3f}", 1e3),
    Column("harness over bare", "overhead_percent", "{:+.2f} %"),
    Column("95 %", "interval"),
    Column("clockwork, µs", "clockwork_s", "{:.2f}", 1e6),
    Column("of a token", "clockwork_percent", "{:.3f} %"),
)


def overhead_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    shown = []
    for row in rows:
        ends = row["interval_percent"]
        shown.append(row | {"interval": ends and f"{ends[0]:+.2f} to {ends[1]:+.2f} %"})
    return render(COLUMNS, shown)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("artifact", nargs="+")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--decode-tokens", type=int, default=DECODE_TOKENS)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    before, noise = snapshot(), Noise()
    rows = []
    with Progress("measuring") as progress:
        for n, spec in enumerate(args.artifact):
            noise.probe()
            rows.append(overhead(spec, args.decode_tokens, args.pairs, args.threads))
            progress.update(n + 1, len(args.artifact))
    noise.probe()
    result = {
        "command": study_command("overhead"),
        "machine": machine(),
        "conditions": describe(before, snapshot(), noise.percent, noise.drift_percent),
        "limit_percent": LIMIT_PERCENT,
        "results": rows,
    }
    write_results(args.results, result)
    print(overhead_text(rows))


if __name__ == "__main__":
    main()
