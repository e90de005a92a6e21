"""Speed and memory of one model with so many users: load, passes through a workload, what the card holds.

One call is one process (study.py). Passes are repeated on the same open session, after one that warms up, so
that each figure is a median with an interval; what is asked and how it is timed is `fox-edge bench`'s own.
Knows sessions and workloads; not ceilings or other cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.common.machine import memory
from benchmarks.common.subject import Subject, open_subject
from benchmarks.devices.card import card_state, own_peak_bytes
from benchmarks.devices.card_energy import CardEnergy
from benchmarks.devices.compute import operations_per_token
from benchmarks.latency.measure import time_wave, timing, token_percentiles
from benchmarks.latency.rows import figures
from benchmarks.latency.users import open_users, steps_together
from benchmarks.latency.workloads import Workload, find_workload, waves
from runtimes.base import SessionOptions

_CONTEXT_STEP = 256  # as `fox-edge bench` opens contexts
# A pass through a workload is short on a GPU; the interval of a median takes five.
LEAST_PASSES, MOST_PASSES = 5, 15
_WARM_UP_TOKENS = 16


def speed_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{subject, device, users, workload, prompt_tokens?, decode_tokens?, seconds, passes?} -> a row.

    Medians, intervals and samples over the passes, as rows of `fox-edge bench` have them.
    """
    work = find_workload(job["workload"], job.get("prompt_tokens"), job.get("decode_tokens"))
    subject, users = open_subject(job["subject"]), job["users"]
    context = min(subject.context, -(-work.positions // _CONTEXT_STEP) * _CONTEXT_STEP)
    work.check(subject.spec, context)
    asked = waves(work, subject.tokenizer(), users)
    subject.prepare()
    before, start = card_state(), time.perf_counter()
    options = SessionOptions(context=context, conversations=users, device=job["device"])
    session = subject.open_session(options)
    load_s = time.perf_counter() - start
    sessions = open_users(session, users, subject.runtime)
    cold = time_wave(sessions, asked[0], min(_WARM_UP_TOKENS, work.decode_tokens))
    meter, runs = CardEnergy(), list[dict[str, Any]]()
    least, most = job.get("passes", (LEAST_PASSES, MOST_PASSES))
    deadline = time.perf_counter() + job["seconds"]
    while len(runs) < least or (time.perf_counter() < deadline and len(runs) < most):
        runs.append(_pass(sessions, asked, work, meter))
        progress(len(runs), most)
    meter.close()
    after = card_state()
    held = None
    if before and after and before.used_bytes is not None and after.used_bytes is not None:
        held = after.used_bytes - before.used_bytes
    row = {
        **figures(runs),
        "load_s": load_s,
        "cold_time_to_first_token_s": cold[0].stamps_s[0] - cold[0].asked_s,
        "passes": len(runs),
        "peak_device_bytes": own_peak_bytes(),
        "card_held_bytes": held,
        "peak_rss_bytes": memory().peak_rss,
        "card": {"before": before and before.to_json(), "after": after and after.to_json()},
    }
    for each in reversed(sessions):
        each.close()
    together = users if steps_together(sessions) else 1
    shared = {
        "users": users,
        "together": together,
        "bytes_per_token": subject.bytes_per_token(work.middle, together),
    }
    return {**_about(subject, work, context), **shared, **row}


def _pass(sessions: Any, asked: Any, work: Workload, meter: CardEnergy) -> dict[str, Any]:
    """All waves once: one sample of each figure."""
    before = meter.read()
    turns = [time_wave(sessions, wave, work.decode_tokens) for wave in asked]
    joules = meter.joules(before, meter.read())
    said = [turn for wave in turns for turn in wave]
    tokens = sum(len(turn.stamps_s) for turn in said)
    return {
        **asdict(timing(turns)),
        **token_percentiles(said),
        "device_energy_joules_per_token": None if joules is None else joules / tokens,
    }


def _about(subject: Subject, work: Workload, context: int) -> dict[str, Any]:
    """What was measured, and the operations that a token of its prompts takes."""
    config = subject.config
    assert config is not None
    return {
        "artifact": subject.spec.partition(":")[0],
        "runtime": subject.runtime,
        "quant": subject.quant,
        "workload": work.name,
        "prompt_tokens": work.prompt_tokens,
        "decode_tokens": work.decode_tokens,
        "context": context,
        "weight_bytes": subject.weight_bytes,
        "prompt_operations_per_token": operations_per_token(config, work.conversations, work.decode_tokens),
    }
