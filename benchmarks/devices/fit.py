"""Whether a model fits a device: the sum, made before anything is loaded.

What each runtime says that it will take (runtimes/footprint.py) at a device's context, against the device's
memory. The sum is made in a fresh process, as the measurement will be, because what a process holds with the
runtime's library alone is part of it. Knows sums and limits; processes/caps.py enforces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from benchmarks.common.subject import Subject, open_subject
from benchmarks.devices.profiles import Profile
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.inspection import megabytes
from runtimes.base import SessionOptions
from runtimes.footprint import footprint

# Of one artifact: context -> footprint's record; empty where its runtime could not tell.
Needs: TypeAlias = dict[int, dict[str, Any]]
_PARTS = (
    ("weights", "weights_bytes"),
    ("KV cache", "kv_bytes"),
    ("buffers", "buffers_bytes"),
    ("tokenizer", "tokenizer_bytes"),
    ("process", "process_bytes"),
)


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'footprint': {subject, contexts, session} -> {'footprints': one per context}."""
    subject = open_subject(job["subject"])
    options = dict(job["session"])
    found = [
        footprint(subject.spec, SessionOptions(context=context, **options)) for context in job["contexts"]
    ]
    # Reading the first model's description is no part of what the library holds.
    process = found[0]["process_bytes"] if found else 0
    for record in found:
        record["total_bytes"] += process - record["process_bytes"]
        record["process_bytes"] = process
    return {"footprints": found}


def needs_of(subject: Subject, contexts: Iterable[int], session: Mapping[str, Any]) -> Needs:
    """What a subject will take at each context, cut to those that it has; empty where nobody can tell.

    A subject that cannot be reckoned is not refused: its own run will tell what is wrong with it.
    """
    wanted = sorted({min(context, subject.context) for context in contexts})
    job = {
        "task": "footprint",
        "subject": subject.spec,
        "contexts": wanted,
        "session": {key: value for key, value in session.items() if key not in ("context", "threads")},
    }
    try:
        found = run_worker(job)["footprints"]
    except WorkerError:
        return {}
    return dict(zip(wanted, found, strict=True))


def need_at(needs: Needs, context: int) -> dict[str, Any] | None:
    """The record for a context, or for the most that the model has where that is less."""
    return needs.get(context) or needs.get(max((c for c in needs if c < context), default=0))


def misfit(need: Mapping[str, Any], profile: Profile) -> str | None:
    """Why a model cannot run on a device, with the sum; None when it fits."""
    if need["total_bytes"] <= profile.memory_bytes:
        return None
    terms = " + ".join(f"{megabytes(need[key])} of {name}" for name, key in _PARTS if need[key])
    return (
        f"does not fit {profile.name}: at {need['context']:,} tokens {terms} = "
        f"{megabytes(need['total_bytes'])}, but {megabytes(profile.memory_bytes)} can be had there"
    )
