"""Accuracy of several subjects on the same questions, each compared with the reference among them.

Each subject answers in a fresh process. Knows grading and pairing; what is asked is tasks.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gsm8k import final_number
from benchmarks.machine import machine
from benchmarks.processes import WorkerError, run_worker
from benchmarks.proportions import mcnemar_p, wilson_percent
from benchmarks.subject import Subject, open_subject
from benchmarks.table import Column, render
from benchmarks.tasks import Task, TaskOptions, make_task
from fox_edge.progress import Progress


def evaluate(
    artifacts: Sequence[str | Path],
    *,
    task: str = "gsm8k",
    limit: int = 50,
    shots: int = 5,
    data: Path | None = None,
    train: Path | None = None,
    threads: int | None = None,
    session: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Let artifacts (or 'torch:CHECKPOINT') answer, grade them, and return the report.

    Pairs are made with the first PyTorch model, else with the first artifact. A subject that gives no answers
    gets a row with 'error'. `session` are more fields of SessionOptions. Raises FoxEdgeError for a task, file
    or subject that is not there.
    """
    subjects = [open_subject(spec) for spec in artifacts]
    asked = make_task(task, TaskOptions(limit, shots, data, train))
    total = len(subjects) * len(asked.prompts)
    rows = []
    with Progress(f"asking {len(asked.prompts)} questions of each") as progress:
        for n, subject in enumerate(subjects):
            before = n * len(asked.prompts)
            rows.append(
                _row(
                    subject,
                    asked,
                    {"threads": threads, "session": session or {}},
                    lambda done, _, before=before: progress.update(before + done, total),
                )
            )
    _pair(rows)
    return {
        "task": asked.name,
        "description": asked.description,
        "n": len(asked.prompts),
        "machine": machine(),
        "results": rows,
    }


def _row(subject: Subject, task: Task, settings: dict[str, Any], progress: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "artifact": subject.spec,
        "runtime": subject.runtime,
        "format": subject.format,
        "quant": subject.quant,
    }
    job = {
        "task": "answer",
        "subject": subject.spec,
        **settings,
        "prompts": task.prompts,
        "max_tokens": task.max_tokens,
        "stop_texts": task.stop_texts,
    }
    try:
        result = run_worker(job, progress)
    except WorkerError as error:
        return {**row, "error": str(error)}
    return {**row, **grade(result["answers"], task.expected), "seconds": result["seconds"]}


def grade(answers: Sequence[dict[str, Any]], expected: Sequence[str]) -> dict[str, Any]:
    """Right or wrong, question by question: the extracted number must be the expected string."""
    right = [final_number(a["text"]) == want for a, want in zip(answers, expected, strict=True)]
    return {
        "n": len(right),
        "correct": sum(right),
        "accuracy_percent": 100 * sum(right) / len(right),
        "ci95_percent": list(wilson_percent(sum(right), len(right))),
        "cut_answers": sum(a["cut"] for a in answers),
        "prompt_tokens": sum(a["prompt_tokens"] for a in answers),
        "reused_prompt_tokens": sum(a["reused_tokens"] for a in answers),
        "answers": [
            {"text": a["text"], "expected": want, "right": ok}
            for a, want, ok in zip(answers, expected, right, strict=True)
        ],
    }


def _pair(rows: Sequence[dict[str, Any]]) -> None:
    """Add `paired_with` and `paired_p` to every row but the one that the others are paired with."""
    whole = [row for row in rows if "error" not in row]
    reference = next((row for row in whole if row["format"] == "torch"), whole[0] if whole else None)
    for row in whole:
        row["paired_with"] = row["paired_p"] = None
        if reference is not None and row is not reference:
            row["paired_with"] = reference["artifact"]
            row["paired_p"] = mcnemar_p(*([a["right"] for a in r["answers"]] for r in (reference, row)))


COLUMNS = (
    Column("artifact", "artifact"),
    Column("runtime", "runtime"),
    Column("right", "correct", "{:d}"),
    Column("of", "n", "{:d}"),
    Column("accuracy", "accuracy_percent", "{:.1f} %"),
    Column("95 % interval", "interval", "{:s}"),
    Column("paired p", "paired_p", "{:.2g}"),
    Column("cut", "cut_answers", "{:d}"),
    Column("seconds", "seconds", "{:,.0f}"),
)


def evaluate_text(result: dict[str, Any]) -> str:
    """The report as a table for a person."""
    rows = [
        {**row, "interval": "{:.0f} to {:.0f} %".format(*row["ci95_percent"])}
        for row in result["results"]
        if "error" not in row
    ]
    lines = [f"{result['n']} questions: {result['description']}"]
    if rows:
        lines.append(render(COLUMNS, rows))
    lines += [f"{row['artifact']}: {row['error']}" for row in result["results"] if "error" in row]
    paired = next((row["paired_with"] for row in rows if row["paired_with"]), None)
    if paired:
        lines.append(f"paired p: exact McNemar test against {paired} on the same questions")
    return "\n".join(lines)
