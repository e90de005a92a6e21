"""Accuracy of several subjects on the same questions, each compared with the reference among them.

Each subject answers in a fresh process. Knows grading and pairing; what is asked is tasks.py's, and for the
tasks of lm-evaluation-harness lm_eval_tasks.py's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.answer import prompt_digest
from benchmarks.accuracy.answers_log import AnswersLog
from benchmarks.accuracy.gsm8k import judge
from benchmarks.accuracy.lm_eval_tasks import HARNESS_TASKS, HarnessTask, make_harness_task
from benchmarks.accuracy.proportions import compare, wilson_percent
from benchmarks.accuracy.tasks import TASKS, Task, TaskOptions, make_task
from benchmarks.common.machine import machine
from benchmarks.common.subject import Subject, open_subject
from benchmarks.common.table import Column, render
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.artifact import Artifact, sha256_file
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress
from runtimes.base import usual_batch

Told = Callable[[int, int], None]
# What `fox-edge eval` also has, and fidelity/task.py does.
FIDELITY = "fidelity"


def evaluate(
    artifacts: Sequence[str | Path],
    *,
    task: str = "gsm8k",
    limit: int = 50,
    seed: int | None = None,
    shots: int | None = None,
    data: Path | None = None,
    train: Path | None = None,
    answers: Path | None = None,
    threads: int | None = None,
    session: dict[str, Any] | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Let artifacts (or 'torch:CHECKPOINT') answer, grade them, and return the report.

    Pairs are made with the first PyTorch model, else with the first artifact. A subject that gives no answers
    gets a row with 'error'. `answers` is a file that keeps every answer, and from which a run goes on that
    was cut off. `session` are more fields of SessionOptions. `batch` questions are answered at once where the
    runtime can; None: as many as it usually does. Raises FoxEdgeError for a task, file or subject that is not
    there, or for a file of other answers.
    """
    subjects = [open_subject(spec) for spec in artifacts]
    asked = make_any_task(task, TaskOptions(limit, shots, data, train, seed))
    if batch is not None and not isinstance(asked, Task):
        raise FoxEdgeError(f"--batch {batch}: {asked.name} asks its questions one by one")
    settings = {"threads": threads, "session": session or {}}
    rows = []
    with (
        AnswersLog(answers) if answers is not None else contextlib.nullcontext() as log,
        Progress(f"asking {limit} questions of each") as progress,
    ):
        for n, subject in enumerate(subjects):

            def told(done: int, total: int, before: int = n) -> None:
                progress.update(before * total + done, len(subjects) * total)

            at_once = _at_once(subject, batch) if isinstance(asked, Task) else 1
            rows.append(_row(subject, asked, settings | {"at_once": at_once}, log, told))
    pair(rows)
    whole = next((row for row in rows if "error" not in row), None)
    ids = asked.ids if isinstance(asked, Task) else [a["question"] for a in whole["answers"]] if whole else []
    return {
        "task": asked.name,
        "description": asked.description,
        "n": len(ids),
        "shots": asked.shots,
        "seed": seed,
        "question_ids": ids,
        "machine": machine(),
        "results": rows,
    }


def make_any_task(name: str, options: TaskOptions) -> Task | HarnessTask:
    """The task of this name; raises FoxEdgeError listing those known."""
    if name in HARNESS_TASKS:
        return make_harness_task(name, options)
    if name not in TASKS:
        raise FoxEdgeError(f"unknown task '{name}'; known: {', '.join([*TASKS, *HARNESS_TASKS, 'fidelity'])}")
    return make_task(name, options)


def _row(
    subject: Subject, asked: Task | HarnessTask, settings: dict[str, Any], log: AnswersLog | None, told: Told
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "artifact": subject.spec,
        "runtime": subject.runtime,
        "format": subject.format,
        "quant": subject.quant,
        "at_once": settings["at_once"],
    }
    done: dict[str, dict[str, Any]] = {}
    if log is not None:
        done = log.begin(subject.spec, identity(subject, asked, settings["session"], settings["at_once"]))
    job = {"subject": subject.spec, **settings, "log": str(log.path) if log is not None else None}
    last = [0, 0]

    def heard(count: int, total: int) -> None:
        last[:] = count, total
        told(count, total)

    try:
        if isinstance(asked, Task):
            return {**row, **_answered(job, asked, done, heard)}
        return {**row, **asked.graded(run_worker(asked.job(job, done), heard))}
    except WorkerError as error:
        things = "questions" if isinstance(asked, Task) else "requests"
        after = f" (after {last[0]} of {last[1]} {things})" if last[0] else ""
        return {**row, "error": f"{error}{after}"}


def _answered(job: dict[str, Any], task: Task, done: dict[str, dict[str, Any]], told: Told) -> dict[str, Any]:
    """What a subject's answers are worth; those that are done are taken over, the others asked for."""
    taken = {
        place: done[id]
        for place, id in enumerate(task.ids)
        if id in done and done[id].get("prompt_sha256") == prompt_digest(task.prompts[place])
    }
    job = {
        **job,
        "task": "answer",
        "ids": task.ids,
        "prompts": task.prompts,
        "expected": task.expected,
        "shared": task.shared,
        "skip": list(taken),
        "max_tokens": task.max_tokens,
        "stop_texts": task.stop_texts,
    }
    result = run_worker(job, told) if len(taken) < len(task.ids) else {"answers": [], "seconds": 0.0}
    fresh = iter(result["answers"])
    answers = [taken[place] if place in taken else next(fresh) for place in range(len(task.ids))]
    return {
        **grade(answers, task.expected, task.ids),
        "seconds": sum(answer["seconds"] for answer in answers),
        "taken_over": len(taken),
    }


def _at_once(subject: Subject, batch: int | None) -> int:
    """How many questions a subject is asked at once; one where its conversations cannot step together."""
    usual = usual_batch(subject.runtime)
    return max(1, usual) if batch is None or not usual else batch


def identity(
    subject: Subject, asked: Task | HarnessTask, session: dict[str, Any], at_once: int = 1
) -> dict[str, Any]:
    """What answers depend on: answers in a file are taken over only where all of it is the same."""
    return {
        **({"at_once": at_once} if at_once > 1 else {}),
        "digest": subject_digest(subject),
        "task": asked.name,
        "shots": asked.shots,
        "seed": asked.seed,
        "options": {key: value for key, value in sorted(session.items()) if value is not None},
        **({} if not isinstance(asked, Task) else {"max_tokens": asked.max_tokens}),
    }


def subject_digest(subject: Subject) -> str:
    """SHA-256 of what a subject is made of: a manifest's sums, a checkpoint's tensors, or all files."""
    if isinstance(subject.source, Artifact):
        sums = subject.source.manifest.files
    elif hasattr(subject.source, "digest"):
        return str(subject.source.digest())
    else:
        sums = {path.name: sha256_file(path) for path in sorted(subject.folder.iterdir()) if path.is_file()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def grade(
    answers: Sequence[dict[str, Any]], expected: Sequence[str], ids: Sequence[str] | None = None
) -> dict[str, Any]:
    """Right or wrong, question by question: strictly as the authors do, and by the harness's looser rule."""
    judged = [judge(a["text"], want) for a, want in zip(answers, expected, strict=True)]
    names = [str(n) for n in range(len(judged))] if ids is None else ids
    right = sum(j["right"] for j in judged)
    flexible = sum(j["flexible_right"] for j in judged)
    return {
        "n": len(judged),
        "correct": right,
        "accuracy_percent": 100 * right / len(judged),
        "ci95_percent": list(wilson_percent(right, len(judged))),
        "strict_correct": right,
        "flexible_correct": flexible,
        "flexible_percent": 100 * flexible / len(judged),
        "cut_answers": sum(a["cut"] for a in answers),
        "prompt_tokens": sum(a["prompt_tokens"] for a in answers),
        "reused_prompt_tokens": sum(a["reused_tokens"] for a in answers),
        "answers": [
            {"question": id, "text": a["text"], "expected": want, **j}
            for id, a, want, j in zip(names, answers, expected, judged, strict=True)
        ],
    }


def pair(rows: Sequence[dict[str, Any]]) -> None:
    """Add `paired`, `paired_with` and `paired_p` to every row but the one that the others are paired with."""
    whole = [row for row in rows if "error" not in row]
    reference = next((row for row in whole if row["format"] == "torch"), whole[0] if whole else None)
    for row in whole:
        row["paired_with"] = row["paired_p"] = row["paired"] = None
        if reference is not None and row is not reference:
            found = compare(_scores(reference), _scores(row)).to_json()
            row["paired"] = {"with": reference["artifact"], **found}
            row["paired_with"], row["paired_p"] = reference["artifact"], found["p"]


def _scores(row: dict[str, Any]) -> list[float]:
    """One number per question: the score where a task gives one, else 1 for right and 0 for wrong."""
    return [float(answer["score"] if "score" in answer else answer["right"]) for answer in row["answers"]]


COLUMNS = (
    Column("artifact", "artifact"),
    Column("runtime", "runtime"),
    Column("right", "correct", "{:d}"),
    Column("of", "n", "{:d}"),
    Column("strict", "accuracy_percent", "{:.1f} %"),
    Column("95 %", "interval", "{:s}"),
    Column("flexible", "flexible_percent", "{:.1f} %"),
    Column("difference", "difference", "{:s}"),
    Column("p", "paired_p", "{:.2g}"),
    Column("verdict", "verdict"),
    Column("cut", "cut_answers", "{:d}"),
    Column("at once", "several", "{:d}"),
    Column("s", "seconds", "{:,.0f}"),
)


def evaluate_text(result: dict[str, Any]) -> str:
    """The report as a table for a person."""
    rows = [_shown(row) for row in result["results"] if "error" not in row]
    seed = result.get("seed")
    which = "" if seed is None else f", drawn by seed {seed}"
    lines = [f"{result['n']} questions{which}: {result['description']}"]
    if rows:
        columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
        if "flexible_percent" not in rows[0]:
            columns = [Column("accuracy", c.key, c.format) if c.heading == "strict" else c for c in columns]
        lines.append(render(columns, rows))
    lines += [f"{row['artifact']}: {row['error']}" for row in result["results"] if "error" in row]
    pairs = [row for row in rows if row["paired"]]
    if pairs:
        method, reference = pairs[0]["paired"]["method"], pairs[0]["paired_with"]
        lines.append(f"difference, p and verdict: against {reference} on the same questions ({method})")
    lines += [sentence for row in pairs if (sentence := _unsettled(row))]
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    shown = {**row, "interval": "{:.0f} to {:.0f}".format(*row["ci95_percent"])}
    if row.get("at_once", 1) > 1:
        shown["several"] = row["at_once"]
    if row["paired"]:
        low, high = row["paired"]["interval_percent"]
        shown["difference"] = f"{row['paired']['difference_percent']:+.1f} ({low:+.1f} to {high:+.1f})"
        shown["verdict"] = row["paired"]["verdict"]
    return shown


def _unsettled(row: dict[str, Any]) -> str | None:
    """What it would take to tell two apart that these questions do not."""
    paired = row["paired"]
    if paired["verdict"] != "not told apart":
        return None
    if paired["questions_to_settle"] is None:
        return (
            f"{row['artifact']}: as many right as {paired['with']}; more questions may or may not part them"
        )
    return (
        f"{row['artifact']}: about {paired['questions_to_settle']:,} more questions would settle a "
        f"difference of {paired['difference_percent']:+.1f} points (80 % power)"
    )
