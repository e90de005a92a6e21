"""Latency and memory of several subjects side by side, against the ceiling of this machine.

Each measurement is a fresh process; rounds go through all subjects in turn, every other one backwards, so
that a machine that drifts drifts for all. Knows the order of things; what is timed is measure.py's, what
makes a row of it rows.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.subject import Subject, open_subject
from benchmarks.devices.card import CardState, card_state, describe_card, find_card
from benchmarks.devices.fit import Needs
from benchmarks.latency.bench_text import bench_text as bench_text
from benchmarks.latency.bounds import Bounds
from benchmarks.latency.ceilings import Ceilings, device_of
from benchmarks.latency.conditions import Noise, describe, snapshot
from benchmarks.latency.page_cache import STATES, WARM
from benchmarks.latency.rows import rank_rows, row
from benchmarks.latency.workloads import Workload, find_workload, waves
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress, say
from runtimes.base import CUDA, SessionOptions
from runtimes.tuning import with_tuning

SCHEMA = 2
REPEATS = 5
# Far more than share a laptop; their prompts are made before anything runs.
MOST_USERS = 256
_CONTEXT_STEP = 256


@dataclass
class Case:
    """One row to be: a subject with so many users, the job that its workers get, and what they found."""

    subject: Subject
    users: int
    job: dict[str, Any]
    chosen: dict[str, Any]  # threads and session, as they are opened
    runs: list[dict[str, Any]] = field(default_factory=list)
    needs: Needs = field(default_factory=dict)

    @property
    def device(self) -> str:
        """What it computes on."""
        return device_of(self.subject, self.chosen["session"])

    @property
    def failed(self) -> bool:
        """Whether its last run gave no figures."""
        return bool(self.runs) and "error" in self.runs[-1]


def bench(
    artifacts: Sequence[str | Path],
    *,
    runtimes: Sequence[str] = (),
    workload: str = "custom",
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    users: Sequence[int] = (1,),
    page_cache: str = WARM,
    repeats: int = REPEATS,
    threads: int | None = None,
    context: int | None = None,
    session: dict[str, Any] | None = None,
    profile: str | None = None,
    baseline: str | Path | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure artifacts (or 'torch:CHECKPOINT'): the report, with a row per artifact and number of users.

    `runtimes` names others (`runtimes.base.PREFIXES`) that open every artifact once more, as further rows.
    `threads` None leaves the number to each runtime; `context` None opens just enough for the run; `session`
    are more fields of SessionOptions; `profile` names a device whose threads, context and memory are kept to
    (devices/profiles.py), `baseline` a file whose row stands in for the paper's; `command` is what a reader
    types to repeat it. A subject that does not fit, or whose process dies, gets a row with 'error'; the
    others go on. Raises FoxEdgeError for a workload or profile that is unknown, a file that is no baseline, a
    subject that is not there or whose context is too short.
    """
    work = find_workload(workload, prompt_tokens, decode_tokens)
    _check(users, page_cache, session or {})
    specs = [*artifacts, *(f"{runtime}:{spec}" for runtime in runtimes for spec in artifacts)]
    subjects = [open_subject(spec, (session or {}).get("kv")) for spec in specs]
    _check_remote(subjects, users, profile)
    needed = -(-work.positions // _CONTEXT_STEP) * _CONTEXT_STEP
    bounds = Bounds.choose(profile, baseline, threads, context, needed)
    threads, context = bounds.threads, bounds.context
    cases = _cases(subjects, work, users, page_cache, threads, context, session or {})
    _admit(cases, bounds)
    ceilings = Ceilings([(case.subject, case.device) for case in cases], work.middle, threads)
    ceilings.measure()
    bounds.measure(ceilings.compute)
    before, noise = snapshot(), Noise(threads) if threads else Noise()
    card = _card_before(cases)
    _rounds(cases, repeats, noise, bounds.cap_bytes)
    after = snapshot()
    ceilings.measure()
    bounds.measure(ceilings.compute)
    drift = noise.drift_percent or 0.0
    results = [_row(case, work, ceilings, page_cache, bounds, drift) for case in cases]
    rank_rows(results)
    notes = [f"{c.subject.spec}: {note}" for c in cases for run in c.runs for note in run.get("notes", ())]
    return {
        "schema": SCHEMA,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "conditions": describe(before, after, noise.percent, noise.drift_percent, notes)
        | _card_after(cases, card),
        "settings": {
            "workload": work.name,
            "prompt_tokens": work.prompt_tokens,
            "conversations": [list(turns) for turns in work.conversations],
            "decode_tokens": work.decode_tokens,
            "repeats": repeats,
            "users": list(users),
            "threads": threads,
            "context": context,
            "page_cache": page_cache,
            **bounds.settings(),
            "session": session or {},
        },
        "bandwidth": ceilings.to_json(),
        **bounds.to_json(),
        "results": results,
    }


def _check(users: Sequence[int], page_cache: str, session: dict[str, Any]) -> None:
    """Raises FoxEdgeError for choices that there are not, or that do not go together."""
    if page_cache not in STATES:
        raise FoxEdgeError(f"the page cache can be {' or '.join(STATES)}, not '{page_cache}'")
    if not users or not 1 <= min(users) <= max(users) <= MOST_USERS:
        raise FoxEdgeError(f"--users {','.join(map(str, users))}: from 1 to {MOST_USERS} at once")
    if max(users) > 1 and session.get("speculate") is not None:
        raise FoxEdgeError(f"--users {max(users)} with --speculate: guessing ahead is for one user")


def _check_remote(subjects: Sequence[Subject], users: Sequence[int], profile: str | None) -> None:
    """Raises FoxEdgeError for what cannot be asked of a runtime in a program of its own."""
    remote = next((subject for subject in subjects if subject.opened_by.remote), None)
    if remote is None:
        return
    if profile is not None:
        raise FoxEdgeError(
            f"{remote.spec} with --profile {profile}: no cap is kept on the memory of a {remote.runtime}"
        )
    if max(users) > 1:
        raise FoxEdgeError(f"{remote.spec} with --users {max(users)}: a {remote.runtime} has one user")


def _cases(
    subjects: Sequence[Subject],
    work: Workload,
    users: Sequence[int],
    page_cache: str,
    threads: int | None,
    context: int,
    session: dict[str, Any],
) -> list[Case]:
    """Everything that is to run; raises FoxEdgeError before anything does."""
    for subject in subjects:
        work.check(subject.spec, min(context, subject.context))
    chosen = [_choices(subject, threads, session) for subject in subjects]
    return [
        Case(subject, count, _job(subject, work, count, page_cache, context) | choices, choices)
        for subject, choices in zip(subjects, chosen, strict=True)
        for count in users
    ]


def _choices(subject: Subject, threads: int | None, session: dict[str, Any]) -> dict[str, Any]:
    """What a session is opened with: what was said, and what was tuned for this machine."""
    options = SessionOptions(threads=threads, **session)
    tuned = device_of(subject, session) != CUDA and not subject.opened_by.remote
    if tuned and isinstance(subject.source, Artifact):
        options, remark = with_tuning(subject.source, options)
        if remark:
            say(f"{subject.spec}: {remark}")
    own = ("context", "threads", "conversations")
    fields = {name: value for name, value in asdict(options).items() if name not in own}
    return {"threads": options.threads, "session": fields}


def _job(subject: Subject, work: Workload, users: int, page_cache: str, context: int) -> dict[str, Any]:
    """What the worker is told; prompts are real text in the subject's own tokens."""
    return {
        "task": "measure",
        "subject": subject.spec,
        "context": min(context, subject.context),
        "waves": waves(work, subject.tokenizer(), users),
        "decode_tokens": work.decode_tokens,
        "page_cache": page_cache,
    }


def _card_before(cases: Sequence[Case]) -> CardState | None:
    """The card before anything of ours is on it; None where nothing is measured there."""
    return card_state() if any(case.device == CUDA for case in cases) else None


def _card_after(cases: Sequence[Case], before: CardState | None) -> dict[str, Any]:
    """What conditions say of the card: as it was before, and as the last worker left it."""
    card = find_card() if before is not None else None
    if card is None:
        return {}
    left = [run["card"] for case in cases for run in case.runs if run.get("card")]
    return {"card": describe_card(card, before, CardState.from_json(left[-1]) if left else None)}


def _admit(cases: Sequence[Case], bounds: Bounds) -> None:
    """Reckon what every case will take; one that does not fit the device has that sum as its only run."""
    with Progress("reckoning memory") as progress:
        for n, case in enumerate(cases):
            if case.device != CUDA:  # what a card holds is reckoned, and refused, when a session opens
                case.needs = bounds.needs(case.subject, case.chosen["session"], case.users)
            if refusal := bounds.refusal(case.needs):
                case.runs.append({"error": refusal})
            progress.update(n + 1, len(cases))


def _rounds(cases: Sequence[Case], repeats: int, noise: Noise, cap_bytes: int | None) -> None:
    """Run every case `repeats` times: A B, B A, A B; one that failed is not tried again.

    A machine that slows down steadily would favour whoever goes first in every round, and what B finds may
    depend on A having run before it: backwards every other time, both cancel.
    """
    with Progress("measuring") as progress:
        for round_ in range(repeats):
            noise.probe()
            for n, case in enumerate(cases if round_ % 2 == 0 else reversed(cases)):
                if not case.failed:
                    case.runs.append(_run(case, cap_bytes))
                progress.update(round_ * len(cases) + n + 1, repeats * len(cases))
        noise.probe()


def _run(case: Case, cap_bytes: int | None) -> dict[str, Any]:
    """One fresh process: its figures, or {'error': how it died}."""
    try:
        return run_worker(case.job, cap_bytes=cap_bytes)
    except WorkerError as error:
        return {"error": str(error)}


def _row(
    case: Case, work: Workload, ceilings: Ceilings, page_cache: str, bounds: Bounds, drift: float
) -> dict[str, Any]:
    """One result, with what it was asked to do."""
    device = case.device
    drift = 0.0 if device == CUDA else drift  # the processors' says nothing of a card's
    asked = {"workload": work.name, "users": case.users, "page_cache": page_cache, "device": device}
    found = row(case.subject, case.runs, ceilings.of(case.subject, device), work.middle, drift)
    return found | bounds.beside(found, case.subject, work, case.needs, device) | asked | case.chosen
