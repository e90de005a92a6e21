"""The clockwork of one measurement: load, first token, prompt speed, decode speed, latencies, memory, energy.

Runs inside a process of its own (processes/worker.py) on one subject. Knows sessions; not other artifacts,
rounds or ceilings. Token choice is greedy and counted in, as it is for a user. The clock is read once per
token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common.machine import memory
from benchmarks.common.subject import open_subject
from benchmarks.devices.card import card_state, own_peak_bytes
from benchmarks.devices.card_energy import CardEnergy
from benchmarks.latency import page_cache
from benchmarks.latency.conditions import EnergyMeter
from benchmarks.latency.users import (
    Clock,
    Turn,
    open_users,
    time_conversation,
    time_users,
    users_in_a_pass,
)
from runtimes.base import Occupied, RemoteSession, Session, SessionOptions

if TYPE_CHECKING:
    # Not at run time: what this imports counts in every figure of memory.
    from benchmarks.latency.workloads import Waves

# A small model is through in milliseconds: passes are repeated until this much time was measured.
MEASURE_S = 0.5
MAX_PASSES = 20
_WARM_UP_STEPS = 4
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Timing:
    """One pass through a workload.

    `decode_tokens_per_s` is what one user sees, from a first token to the last; `total_tokens_per_s` what all
    get together while anybody is being answered.
    """

    time_to_first_token_s: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    total_tokens_per_s: float


def measure(session: Session, prompt: Sequence[int], decode_tokens: int) -> dict[str, Any]:
    """One user with one prompt: `measure_waves` of that."""
    return measure_waves([session], [[[list(prompt)]]], decode_tokens)


def measure_waves(
    sessions: Sequence[Session],
    waves: Waves,
    decode_tokens: int,
    clock: Clock = time.perf_counter,
    card: CardEnergy | None = None,
) -> dict[str, Any]:
    """Warm up, then as many passes through all waves as fit MEASURE_S (at least one).

    Rates and the time to the first token are medians over passes, the percentiles are of the times between
    any two tokens of an answer, all passes together. `cold_time_to_first_token_s` is the warm-up's: what the
    very first question costs. `card` is the meter of the card that the sessions compute on.
    """
    cold = _warm_up(sessions, waves[0], decode_tokens, clock)
    passes: list[list[list[Turn]]] = []
    meter = EnergyMeter()
    card_before = None if card is None else card.read()
    before, deadline = meter.read(), clock() + MEASURE_S
    while not passes or (clock() < deadline and len(passes) < MAX_PASSES):
        passes.append([time_wave(sessions, wave, decode_tokens, clock) for wave in waves])
    joules = meter.joules(before, meter.read())
    card_joules = None if card is None else card.joules(card_before, card.read())
    timings = [timing(turns) for turns in passes]
    tokens = sum(len(t.stamps_s) for turns in passes for wave in turns for t in wave)
    return {
        **{key: statistics.median(getattr(t, key) for t in timings) for key in asdict(timings[0])},
        **token_percentiles([t for turns in passes for wave in turns for t in wave]),
        "cold_time_to_first_token_s": cold,
        "energy_joules_per_token": None if joules is None else joules / tokens,
        "device_energy_joules_per_token": None if card_joules is None else card_joules / tokens,
        "passes": len(passes),
        "computed_prompt_tokens": sum(t.prompt_tokens for wave in passes[0] for t in wave),
        "output_tokens": tokens // len(passes),
    }


def time_wave(
    sessions: Sequence[Session],
    wave: Sequence[Sequence[Sequence[int]]],
    decode_tokens: int,
    clock: Clock = time.perf_counter,
) -> list[Turn]:
    """One conversation in every session; the turns of all."""
    if len(sessions) == 1:
        return time_conversation(sessions[0], wave[0], decode_tokens, clock)
    return time_users(sessions, wave, decode_tokens, clock)


def timing(waves: Sequence[Sequence[Turn]]) -> Timing:
    """The figures of one pass, from what the clock said in each wave."""
    turns = [turn for wave in waves for turn in wave]
    decoded = [len(turn.stamps_s) - 1 for turn in turns]
    decode_s = sum(turn.stamps_s[-1] - turn.stamps_s[0] for turn in turns)
    return Timing(
        time_to_first_token_s=statistics.median(turn.stamps_s[0] - turn.asked_s for turn in turns),
        prompt_tokens_per_s=sum(t.prompt_tokens for t in turns) / sum(t.prompt_s for t in turns),
        decode_tokens_per_s=sum(decoded) / decode_s,
        total_tokens_per_s=sum(decoded) / sum(_answering_s(wave) for wave in waves),
    )


def token_percentiles(turns: Sequence[Turn]) -> dict[str, float]:
    """p50, p95 and p99 of the seconds from one token to the next, over all answers."""
    gaps = np.concatenate([np.diff(turn.stamps_s) for turn in turns])
    return {
        f"token_p{q}_s": float(v) for q, v in zip(PERCENTILES, np.percentile(gaps, PERCENTILES), strict=True)
    }


def _answering_s(turns: Sequence[Turn]) -> float:
    """Seconds in which at least one answer was under way: the length of the union of all answers' times."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((turn.stamps_s[0], turn.stamps_s[-1]) for turn in turns):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _warm_up(
    sessions: Sequence[Session], wave: Sequence[Sequence[Sequence[int]]], decode_tokens: int, clock: Clock
) -> float:
    """A first question in every session; what the very first one waited for its first token."""
    steps = min(_WARM_UP_STEPS, decode_tokens)
    first = []
    for session, turns in zip(sessions, wave, strict=True):
        (turn,) = time_conversation(session, turns[:1], steps, clock)
        first.append(turn.stamps_s[0] - turn.asked_s)
    return first[0]


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'measure': {subject, threads, context, session, waves, decode_tokens, page_cache}.

    Waves hold one conversation per user. Returns the figures, and `notes` on what was not as asked for.
    """
    subject = open_subject(job["subject"])
    subject.prepare()
    users = len(job["waves"][0])
    notes = page_cache.prepare(job["page_cache"], page_cache.model_files(subject.folder))
    notes += EnergyMeter().notes()
    empty = memory().rss
    start = time.perf_counter()
    options = SessionOptions(
        context=job["context"], threads=job["threads"], conversations=users, **job.get("session", {})
    )
    session = subject.open_session(options)
    load_s = session.load_s if isinstance(session, RemoteSession) else time.perf_counter() - start
    sessions = open_users(session, users, subject.runtime)
    card = None if own_peak_bytes() is None else CardEnergy()
    figures = measure_waves(sessions, job["waves"], job["decode_tokens"], card=card)
    taken, state = _occupied(session, empty), None if card is None else card_state()
    if card is not None:
        card.close()
    for each in reversed(sessions):
        each.close()
    return {
        "load_s": load_s,
        **figures,
        "together": users_in_a_pass(sessions),
        "peak_rss_bytes": taken.peak,
        "anonymous_rss_bytes": taken.anonymous,
        "file_rss_bytes": taken.file,
        "empty_rss_bytes": taken.empty,
        "peak_device_bytes": own_peak_bytes(),
        "card": state and state.to_json(),
        "notes": notes,
    }


def _occupied(session: Session, empty: int | None) -> Occupied:
    """Memory of the program that the model is in: this process, where `empty` was held before, or another."""
    if isinstance(session, RemoteSession):
        return session.occupied()
    own = memory()
    return Occupied(own.peak_rss, own.anonymous, own.file, empty)
