"""The task `fidelity`: how far artifacts are from one checkpoint on a text, each in a fresh process.

The checkpoint's layers, most of its work, are run once for all artifacts, in a process that ends before the
first artifact is opened; only its head is run again beside each of them. So one artifact is in memory at a
time, one that dies takes nothing with it, and no file holds logits. Knows jobs and tables; what is compared
is job.py's, where the windows lie texts.py's. This process itself stays small: it opens no tokenizer and no
tensor library.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine, peak_rss_bytes
from benchmarks.common.subject import Subject, open_subject
from benchmarks.common.table import Column, render
from benchmarks.fidelity.texts import TOKENS, Windows
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.progress import Progress, say
from runtimes.base import TORCH_PREFIX

SCHEMA = 2


def evaluate_fidelity(
    artifacts: Sequence[str | Path],
    *,
    checkpoint: str | Path,
    text: Path | None = None,
    tokens: int = TOKENS,
    window: int | None = None,
    score_from: int | None = None,
    threads: int | None = None,
    session: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare artifacts (or 'torch:CHECKPOINT') with a checkpoint in float32; returns the report.

    `checkpoint` may be an artifact too, such as a GGUF of type f32: then the runtime of that artifact gives
    the reference. `text` is a UTF-8 file (None: built-in word problems), of which `tokens` are read in
    windows of `window`. An artifact that gives no figures gets a row with 'error'. `session` are more fields
    of SessionOptions. Raises FoxEdgeError for a text, checkpoint or artifact that is not there.
    """
    subjects = [open_subject(spec) for spec in artifacts]
    shared: dict[str, Any] = {"checkpoint": _spec(checkpoint), "threads": threads}
    with tempfile.TemporaryDirectory() as folder, Progress(f"comparing {len(subjects)}") as progress:
        tell = _stages(progress, 1 + len(subjects))
        shared["hidden"] = str(Path(folder) / "hidden")
        asked = {"tokens": tokens, "window": window, "score_from": score_from}
        source = None if text is None else str(text)
        found = run_worker({"task": "fidelity-reference", **shared, **asked, "text": source}, tell(0))
        for note in found["notes"]:
            say(f"note: {note}")
        job = {"task": "fidelity", **shared, "text": found["text"], "session": session or {}}
        rows = [_row(subject, job, tell(1 + n)) for n, subject in enumerate(subjects)]
    return {
        "schema": SCHEMA,
        "task": "fidelity",
        "checkpoint": str(checkpoint),
        "text": Windows(**found["text"]).to_json(),
        "machine": machine(),
        "reference_seconds": found["seconds"],
        "reference_peak_rss_bytes": found["peak_rss_bytes"],
        "command_rss_bytes": peak_rss_bytes(),
        "results": rows,
    }


def _spec(checkpoint: str | Path) -> str:
    """A checkpoint's name without the prefix by which it would be an artifact."""
    return str(checkpoint).removeprefix(TORCH_PREFIX)


def _stages(progress: Progress, stages: int) -> Callable[[int], Callable[[int, int], None]]:
    """Progress of one of so many jobs as a share of all."""
    return lambda n: lambda done, total: progress.update(n * total + done, stages * total)


def _row(subject: Subject, job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "artifact": subject.spec,
        "runtime": subject.runtime,
        "format": subject.format,
        "quant": subject.quant,
        "bytes": subject.bytes,
    }
    try:
        return row | run_worker({**job, "subject": subject.spec}, progress)
    except WorkerError as error:
        return row | {"error": str(error)}


COLUMNS = (
    Column("artifact", "artifact"),
    Column("MB", "bytes", "{:,.1f}", 1e-6),
    Column("mean KL, nats", "mean_kl", "{:s}"),
    Column("median", "median_kl_nats", "{:.2g}"),
    Column("p99", "p99_kl_nats", "{:.2g}"),
    Column("max", "max_kl_nats", "{:.2g}"),
    Column("top-1, %", "top1", "{:s}"),
    Column("top-5, %", "top5", "{:s}"),
    Column("perplexity", "perplexity", "{:.4g}"),
    Column("over the reference's", "ratio", "{:s}"),
)


def fidelity_text(result: dict[str, Any]) -> str:
    """The report as a table for a person."""
    text, whole = result["text"], [row for row in result["results"] if "error" not in row]
    lines = [
        f"{result['checkpoint']} on {text['tokens']:,} tokens ({text['source']}), {text['windows']} windows "
        f"of {text['window']}, {text['scored_per_window']} predictions of each, from position "
        f"{text['scored_from']} on"
    ]
    if whole:
        lines.append(render(COLUMNS, [row | _cells(row) for row in whole]))
        lines.append(f"the reference's perplexity: {whole[0]['reference_perplexity']:.4g}; ± standard errors")
        lines += [f"mean KL over the context, {row['artifact']}: {_curve_text(row)}" for row in whole]
    lines += [f"{row['artifact']}: {row['error']}" for row in result["results"] if "error" in row]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Figures with their standard errors."""
    return {
        "mean_kl": f"{row['mean_kl_nats']:.5f} ± {row['mean_kl_se_nats']:.5f}",
        "top1": f"{row['top1_agreement_percent']:.1f} ± {row['top1_se_percent']:.1f}",
        "top5": f"{row['top5_agreement_percent']:.1f} ± {row['top5_se_percent']:.1f}",
        "ratio": f"{row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_se']:.4f}",
    }


def _curve_text(row: dict[str, Any]) -> str:
    return ", ".join(f"{b['from']} to {b['to'] - 1}: {b['mean_kl_nats']:.2g}" for b in row["curve"])
