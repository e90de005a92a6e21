"""From the runs of one subject to a row: medians, intervals, spread, the share of the ceiling; and ranks.

Knows figures and what they are called; not how they were measured, nor how they are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.subject import Subject
from benchmarks.devices.roofline import Bandwidth
from benchmarks.latency.intervals import bootstrap_median, ranks, widened

# Figures whose median over the rounds is the result; their extremes are the spread.
FIGURES = (
    "load_s",
    "time_to_first_token_s",
    "cold_time_to_first_token_s",
    "prompt_tokens_per_s",
    "decode_tokens_per_s",
    "total_tokens_per_s",
    "token_p50_s",
    "token_p95_s",
    "token_p99_s",
    "peak_rss_bytes",
    "anonymous_rss_bytes",
    "file_rss_bytes",
    "empty_rss_bytes",
    "peak_device_bytes",
    "energy_joules_per_token",
    "device_energy_joules_per_token",
)
# What one pass through the workload came to; the same in every round.
COUNTS = ("computed_prompt_tokens", "output_tokens")
RANKED_BY = "decode_tokens_per_s"


def row(
    subject: Subject,
    runs: Sequence[dict[str, Any]],
    ceiling: Bandwidth | None,
    positions: int,
    drift_percent: float,
) -> dict[str, Any]:
    """One result. A subject that died in one of its runs has 'error', and no figures."""
    # Users whose tokens came of one pass over the weights.
    together = runs[-1].get("together", 1)
    known: dict[str, Any] = {
        "artifact": subject.spec,
        "runtime": subject.runtime,
        "format": subject.format,
        "quant": subject.quant,
        "bytes": subject.bytes,
        "bits_per_weight": subject.bits_per_weight,
        "together": together,
        "bytes_per_token": subject.bytes_per_token(positions, together),
    }
    if "error" in runs[-1]:
        return {**known, "error": runs[-1]["error"]}
    known |= figures(runs, drift_percent) | {key: runs[-1].get(key) for key in COUNTS}
    known["runs"] = len(runs)
    most = None if ceiling is None else ceiling.bytes_per_s / known["bytes_per_token"]
    known["ceiling_tokens_per_s"] = most
    # Of all users together: where they do not step together, each of their tokens reads the weights anew.
    known["roofline_percent"] = None if most is None else 100 * known["total_tokens_per_s"] / most
    return known


def figures(runs: Sequence[dict[str, Any]], drift_percent: float = 0.0) -> dict[str, Any]:
    """Medians of all figures, None where no run has any; samples, spread and interval of those that do.

    `drift_percent`: what the machine's own speed varied by, which widens the intervals of all but memory.
    """
    samples = {key: [run[key] for run in runs if run.get(key) is not None] for key in FIGURES}
    samples = {key: values for key, values in samples.items() if values}
    intervals = {key: _interval(key, values, drift_percent) for key, values in samples.items()}
    return {
        **{key: _median(key, samples[key]) if key in samples else None for key in FIGURES},
        "samples": samples,
        "spread": {key: [min(values), max(values)] for key, values in samples.items()},
        "interval": {key: list(found) for key, found in intervals.items() if found is not None},
    }


def rank_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Add `rank` and `rank_shared_with` to rows in place, apart for every number of users.

    None and nobody where one round tells nothing, and for rows without figures.
    """
    for row in rows:
        row |= {"rank": None, "rank_shared_with": []}
    for users in {row["users"] for row in rows}:
        ranked = [row for row in rows if row["users"] == users and "error" not in row]
        if not ranked:
            continue
        found = ranks([row["samples"][RANKED_BY] for row in ranked])
        for row, rank in zip(ranked, found, strict=True):
            row["rank"] = rank
            if rank is not None:
                same = [o for o, r in zip(ranked, found, strict=True) if r == rank and o is not row]
                row["rank_shared_with"] = [other["artifact"] for other in same]


def _interval(key: str, values: Sequence[float], drift_percent: float) -> tuple[float, float] | None:
    found = bootstrap_median(values)
    if found is None or key.endswith("_bytes"):
        return found
    return widened(found, statistics.median(values), drift_percent)


def _median(key: str, values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return round(middle) if key.endswith("_bytes") else middle
