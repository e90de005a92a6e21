"""Latency and memory of several subjects side by side, against the ceiling of this machine.

Each measurement is a fresh process; rounds go through all subjects in turn, so that a machine that drifts
drifts for all. Knows medians, spreads and shares; what is timed is measure.py's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.baseline import baseline
from benchmarks.machine import machine
from benchmarks.processes import WorkerError, run_worker
from benchmarks.roofline import Bandwidth, buffer_bytes, read_bandwidth
from benchmarks.subject import Subject, open_subject
from benchmarks.table import Column, render
from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress, say
from runtimes.base import SessionOptions
from runtimes.tuning import with_tuning

_CONTEXT_STEP = 256
# Figures whose median over the rounds is the result, and whose extremes are the spread.
FIGURES = (
    "load_s",
    "time_to_first_token_s",
    "cold_time_to_first_token_s",
    "prompt_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
    "anonymous_rss_bytes",
    "file_rss_bytes",
    "empty_rss_bytes",
)


def bench(
    artifacts: Sequence[str | Path],
    *,
    prompt_tokens: int = 234,
    decode_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    context: int | None = None,
    session: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure artifacts (or 'torch:CHECKPOINT') and return the report.

    `threads` None leaves the number to each runtime; `context` None opens just enough for the run; `session`
    are more fields of SessionOptions. A
    subject whose process dies gets a row with 'error', and the others go on. Raises FoxEdgeError for a
    subject that is not there or whose context is too short.
    """
    subjects = [open_subject(spec, (session or {}).get("kv")) for spec in artifacts]
    needed = prompt_tokens + 1 + decode_tokens
    context = context or -(-needed // _CONTEXT_STEP) * _CONTEXT_STEP
    chosen = [_choices(s, threads, session or {}) for s in subjects]
    jobs = [
        _job(s, prompt_tokens, decode_tokens, context) | choices
        for s, choices in zip(subjects, chosen, strict=True)
    ]
    middle = prompt_tokens + decode_tokens // 2
    ceilings = _ceilings(subjects, threads, middle, {})
    rounds = _rounds(jobs, repeats)
    ceilings = _ceilings(subjects, threads, middle, ceilings)
    return {
        "machine": machine(),
        "settings": {
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
            "repeats": repeats,
            "threads": threads,
            "context": context,
            "session": session or {},
        },
        "bandwidth": [
            {"buffer_bytes": size, "bytes_per_s": c.bytes_per_s, "method": c.method, "methods": c.methods}
            for size, c in ceilings.items()
        ],
        "baseline": baseline(),
        "results": [
            _row(s, runs, ceilings[buffer_bytes(s.bytes_per_token(middle))], middle) | choices
            for s, runs, choices in zip(subjects, rounds, chosen, strict=True)
        ],
    }


def _choices(subject: Subject, threads: int | None, session: dict[str, Any]) -> dict[str, Any]:
    """What a session is opened with: what was said, and what was tuned for this machine."""
    options = SessionOptions(threads=threads, **session)
    if isinstance(subject.source, Artifact):
        options, remark = with_tuning(subject.source, options)
        if remark:
            say(f"{subject.spec}: {remark}")
    fields = {name: value for name, value in asdict(options).items() if name not in ("context", "threads")}
    return {"threads": options.threads, "session": fields}


def _job(subject: Subject, prompt_tokens: int, decode_tokens: int, context: int) -> dict[str, Any]:
    """What the worker is told; the prompt is real text in the subject's own tokens."""
    from benchmarks.fidelity import reference_text

    limit = subject.context
    if prompt_tokens + 1 + decode_tokens > min(context, limit):
        raise FoxEdgeError(
            f"{subject.spec}: a prompt of {prompt_tokens} tokens and {decode_tokens + 1} more do not fit a "
            f"context of {min(context, limit)}"
        )
    tokens = subject.tokenizer().encode(reference_text(), bos=True)
    prompt = (tokens * -(-prompt_tokens // len(tokens)))[:prompt_tokens]
    return {
        "task": "measure",
        "subject": subject.spec,
        "context": min(context, limit),
        "prompt": prompt,
        "decode_tokens": decode_tokens,
    }


def _ceilings(
    subjects: Sequence[Subject], threads: int | None, positions: int, known: dict[int, Bandwidth]
) -> dict[int, Bandwidth]:
    """Bandwidth per size of working set; of two measurements (before and after the rounds) the better."""
    found = dict(known)
    for size in sorted({buffer_bytes(s.bytes_per_token(positions)) for s in subjects}):
        new = read_bandwidth(size, threads, seconds=0.5)
        if size not in found or new.bytes_per_s > found[size].bytes_per_s:
            found[size] = new
    return found


def _rounds(jobs: Sequence[dict[str, Any]], repeats: int) -> list[list[dict[str, Any]]]:
    """All runs of each job; one that failed is not tried again and ends in {'error': ...}."""
    runs: list[list[dict[str, Any]]] = [[] for _ in jobs]
    with Progress("measuring") as progress:
        for round_ in range(repeats):
            for n, (job, done) in enumerate(zip(jobs, runs, strict=True)):
                if not done or "error" not in done[-1]:
                    try:
                        done.append(run_worker(job))
                    except WorkerError as error:
                        done.append({"error": str(error)})
                progress.update(round_ * len(jobs) + n + 1, repeats * len(jobs))
    return runs


def _row(
    subject: Subject, runs: Sequence[dict[str, Any]], ceiling: Bandwidth, positions: int
) -> dict[str, Any]:
    """One result: medians, spread, and the share of the ceiling."""
    row: dict[str, Any] = {
        "artifact": subject.spec,
        "runtime": subject.runtime,
        "format": subject.format,
        "quant": subject.quant,
        "bytes": subject.bytes,
        "bits_per_weight": subject.bits_per_weight,
        "bytes_per_token": subject.bytes_per_token(positions),
    }
    if "error" in runs[-1]:
        return {**row, "error": runs[-1]["error"]}
    values = {key: [run[key] for run in runs if run[key] is not None] for key in FIGURES}
    row |= {key: _median(key, v) if v else None for key, v in values.items()}
    row["spread"] = {key: [min(v), max(v)] for key, v in values.items() if v}
    row["runs"] = len(runs)
    row["ceiling_tokens_per_s"] = ceiling.bytes_per_s / row["bytes_per_token"]
    row["roofline_percent"] = 100 * row["decode_tokens_per_s"] / row["ceiling_tokens_per_s"]
    return row


def _median(key: str, values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return round(middle) if key.endswith("_bytes") else middle


COLUMNS = (
    Column("artifact", "artifact"),
    Column("runtime", "runtime"),
    Column("MB", "bytes", "{:,.1f}", 1e-6),
    Column("load s", "load_s", "{:.2f}"),
    Column("first token ms", "time_to_first_token_s", "{:,.0f}", 1e3),
    Column("prompt tok/s", "prompt_tokens_per_s", "{:,.0f}"),
    Column("decode tok/s", "decode_tokens_per_s", "{:,.1f}"),
    Column("of ceiling", "roofline_percent", "{:.1f} %"),
    Column("peak MB", "peak_rss_bytes", "{:,.0f}", 1e-6),
)


def bench_text(result: dict[str, Any]) -> str:
    """The report as a table for a person, with spreads and what the figures mean."""
    settings, described, published = result["settings"], result["machine"], result["baseline"]
    rows = [row for row in result["results"] if "error" not in row]
    lines = [render(COLUMNS, rows)] if rows else []
    lines += [f"{row['artifact']}: {row['error']}" for row in result["results"] if "error" in row]
    for row in rows:
        low, high = row["spread"]["decode_tokens_per_s"]
        lines.append(
            f"{row['artifact']}: {row['bytes_per_token'] / 1e6:,.1f} MB per token, so at most "
            f"{row['ceiling_tokens_per_s']:,.0f} tok/s; {low:,.1f} to {high:,.1f} in {row['runs']} runs"
        )
    lines.append(
        f"{described['cpu']}, {described['cores']} cores, {described['os']}; prompts of "
        f"{settings['prompt_tokens']} tokens, {settings['decode_tokens']} out; medians"
    )
    lines.append(
        f"not ours: {published['name']}: over {published['decode_tokens_per_s']} tok/s per user, "
        f"{published['peak_rss_bytes'] / 1e6:,.0f} MB of GPU memory ({published['source']})"
    )
    return "\n".join(lines)
