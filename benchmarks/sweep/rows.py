"""What the steps of a sweep add up to: a row per artifact, the files beside it, the table and the page.

Answers that were given in parts, perhaps on several machines, are put together in the questions' order and
graded as `eval` grades them. Knows records and rows; not how or where a step is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.accuracy.evaluate import grade, pair
from benchmarks.accuracy.lm_eval_tasks import HarnessTask
from benchmarks.accuracy.tasks import Task
from benchmarks.common.machine import machine, versions
from benchmarks.common.results import command_text
from benchmarks.common.table import Column, render
from benchmarks.report.document import make_report, write_report
from benchmarks.sweep.file import Sweep
from benchmarks.sweep.plan import BENCH, FIDELITY, Plan, Step, Subject
from benchmarks.sweep.store import write_json
from fox_edge.artifact import sha256_file
from runtimes.base import TORCH_RUNTIME, runtime_name

SCHEMA = 1
SWEEP, REPORT = "sweep.json", "report"
Records = Mapping[str, dict[str, Any]]
# What a row says of its export, and of one task.
_EXPORT = (
    *("bytes", "bits_per_weight", "seconds", "peak_rss_bytes", "peak_anonymous_bytes", "verify_seconds"),
    *("mean_kl_nats", "p99_kl_nats", "top1_agreement_percent", "flipped_percent", "notes", "other_types"),
)


def bench_step(plan: Plan, asked: Sweep, records: Records) -> Step | None:
    """The step that times everything that is there; None when that was not asked for, or nothing is there."""
    present = [s for s in plan.subjects if s.export is None or _result(s.export, records) is not None]
    if BENCH not in asked.tasks or not present:
        return None
    settings = dict(asked.tasks[BENCH])
    if "profile" not in settings:  # which has threads of its own
        settings["threads"] = asked.run.threads
    baseline = settings.get("baseline")
    host = machine()
    return Step(
        kind=BENCH,
        label=f"bench of {len(present)}",
        job={
            "artifacts": [subject.spec for subject in present],
            "command": command_text("sweep", asked.path),
            **settings,
        },
        key={
            "subjects": [subject.digest for subject in present],
            "settings": settings | {"baseline": baseline and sha256_file(baseline)},
            "machine": [host["cpu"], host["cores"], host["memory_bytes"]],
            "versions": versions(),
        },
    )


def finish(
    plan: Plan, asked: Sweep, records: Records, folder: Path, bench: Step | None, taken: int
) -> dict[str, Any]:
    """Join everything, write sweep.json and what else there is into the folder, and return the result."""
    evaluations = {name: evaluation(plan, name, records) for name in plan.tasks}
    fidelity = _fidelity(plan, records) if FIDELITY in asked.tasks else None
    timed = None
    if bench is not None and (found := _result(bench, records)) is not None:
        before = records[bench.identity]["artifacts"]  # the folder may have been called otherwise then
        timed = _renamed(found, dict(zip(before, bench.job["artifacts"], strict=True)))
    failed = [r for r in records.values() if "error" in r]
    failures = [{"step": r["label"], "error": r["error"]} for r in failed]
    # An artifact that dies while it is timed is an error of its row, not of the step.
    died = [row for row in (timed or {}).get("results", ()) if row.get("error")]
    failures += [{"step": f"bench of {row['artifact']}", "error": row["error"]} for row in died]
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sweep": str(asked.path),
        "out": str(folder),
        "machine": machine(),
        "hosts": sorted({r["host"] for r in records.values() if r.get("host")}),
        "steps": {"total": len(records), "taken": taken, "failed": len(failed)},
        "rows": [_row(subject, plan, records, evaluations, fidelity, timed) for subject in plan.subjects],
        "failures": failures,
    }
    files = {f"eval-{name}.json": found for name, found in evaluations.items()}
    files |= {name: found for name, found in (("fidelity.json", fidelity), ("bench.json", timed)) if found}
    for name, found in files.items():
        write_json(folder / name, found)
    if timed is not None:
        names = {subject.spec: subject.name for subject in plan.subjects}
        report = make_report(
            timed,
            checkpoint=", ".join(asked.checkpoints),
            names=names,
            fidelity=fidelity or _verified(plan, records),
            evaluations=list(evaluations.values()),
            commands=[command_text("sweep", asked.path)],
        )
        write_report(report, folder / REPORT)
        files[REPORT] = report
    result["files"] = [str(folder / name) for name in (SWEEP, *files)]
    write_json(folder / SWEEP, result)
    return result


def _result(step: Step, records: Records) -> dict[str, Any] | None:
    """What a step gave; None when it was not done or failed."""
    found: dict[str, Any] | None = records.get(step.identity, {}).get("result")
    return found


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A JSON value with some of its texts replaced."""
    if isinstance(value, dict):
        return {key: _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _error(steps: Sequence[Step], records: Records) -> str | None:
    """How the first of these steps failed."""
    return next((r["error"] for s in steps if (r := records.get(s.identity)) and "error" in r), None)


def evaluation(plan: Plan, name: str, records: Records) -> dict[str, Any]:
    """One task's result over all rows, as `eval` gives it: graded, and paired with the reference."""
    task = plan.tasks[name]
    rows = [_graded(subject, name, task, records) for subject in plan.subjects]
    for checkpoint in dict.fromkeys(subject.checkpoint for subject in plan.subjects):
        together = zip(rows, plan.subjects, strict=True)
        pair([row for row, subject in together if subject.checkpoint == checkpoint])
    whole: dict[str, Any] = next((row for row in rows if "error" not in row), {"answers": []})
    ids = [answer["question"] for answer in whole["answers"]]
    return {
        "task": name,
        "description": task.description,
        "n": len(ids),
        "shots": task.shots,
        "question_ids": ids,
        "machine": machine(),
        "results": rows,
    }


def _about(subject: Subject) -> dict[str, Any]:
    """What the rows of `eval` begin with."""
    runtime = runtime_name(subject.format) if subject.export else TORCH_RUNTIME.name
    return {
        "artifact": subject.spec,
        "runtime": runtime,
        "format": subject.format,
        "quant": subject.quant,
    }


def _graded(subject: Subject, name: str, task: Task | HarnessTask, records: Records) -> dict[str, Any]:
    steps = subject.answers[name]
    row = _about(subject)
    results = [result for step in steps if (result := _result(step, records)) is not None]
    if len(results) < len(steps):
        return {**row, "error": _error(subject.steps, records) or "was not asked"}
    if not isinstance(task, Task):
        return {**row, **task.graded(results[0])}
    answers = [answer for result in results for answer in result["answers"]]
    seconds = sum(result["seconds"] for result in results)
    return {**row, **grade(answers, task.expected, task.ids), "seconds": seconds}


def _fidelity(plan: Plan, records: Records) -> dict[str, Any]:
    """The comparisons with the checkpoints, as `eval --task fidelity` gives them."""
    rows = []
    for subject in plan.subjects:
        assert subject.fidelity is not None
        row = _about(subject)
        found = _result(subject.fidelity, records)
        needed = [step for step in plan.shared if step.identity in subject.fidelity.needs]
        error = _error([*subject.steps, *needed], records)
        rows.append(row | (found if found is not None else {"error": error or "was not compared"}))
    return {
        "schema": 2,
        "task": FIDELITY,
        "checkpoint": ", ".join(plan.windows),
        "text": next(iter(plan.windows.values())).to_json(),
        "machine": machine(),
        "results": rows,
    }


def _verified(plan: Plan, records: Records) -> dict[str, dict[str, Any]]:
    """What verification found, by artifact."""
    found = {s.spec: _result(s.export, records) for s in plan.subjects if s.export}
    return {spec: result for spec, result in found.items() if result is not None}


def _row(
    subject: Subject,
    plan: Plan,
    records: Records,
    evaluations: Mapping[str, Mapping[str, Any]],
    fidelity: Mapping[str, Any] | None,
    timed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that was found of one artifact."""
    exported = _result(subject.export, records) if subject.export else None
    row: dict[str, Any] = {
        "name": subject.name,
        "artifact": subject.spec,
        "checkpoint": subject.checkpoint,
        "format": subject.format,
        "quant": subject.quant,
        "rounding": subject.rounding,
        "export": None if exported is None else {key: exported.get(key) for key in _EXPORT},
        # One per number of users.
        "bench": [dict(row) for row in (timed or {}).get("results", ()) if row["artifact"] == subject.spec],
        "fidelity": _of(subject, fidelity),
        "tasks": {
            name: {key: value for key, value in (_of(subject, found) or {}).items() if key != "answers"}
            for name, found in evaluations.items()
        },
    }
    error = _error(subject.steps, records)
    return row if error is None else {**row, "error": error}


def _of(subject: Subject, found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The row of a result that is about this artifact."""
    rows = (found or {}).get("results", ())
    return next((dict(row) for row in rows if row["artifact"] == subject.spec), None)


def sweep_text(result: Mapping[str, Any]) -> str:
    """The result as a table for a person."""
    tasks = dict.fromkeys(name for row in result["rows"] for name in row["tasks"])
    columns = [
        Column("model", "name"),
        Column("MB", "bytes", "{:,.1f}", 1e-6),
        Column("bits/w", "bits_per_weight", "{:.2f}"),
        Column("export s", "seconds", "{:,.1f}"),
        Column("mean KL", "mean_kl_nats", "{:.2g}"),
        Column("top-1 %", "top1_agreement_percent", "{:.1f}"),
        Column("prompt/s", "prompt_tokens_per_s", "{:,.0f}"),
        Column("decode/s", "decode_tokens_per_s", "{:,.1f}"),
        Column("peak MB", "peak_rss_bytes", "{:,.0f}", 1e-6),
        *(Column(f"{name} %", name, "{:.1f}") for name in tasks),
    ]
    rows = [_shown(row) for row in result["rows"]]
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    lines = [render(shown, rows)]
    lines += [f"{failure['step']}: {failure['error']}" for failure in result["failures"]]
    if result["failures"]:
        lines.append(f"failed: {len(result['failures'])}; --retry tries again")
    lines.append(
        f"{result['steps']['total']} steps, {result['steps']['taken']} done before; in {result['out']}"
    )
    return "\n".join(lines)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's figures under the columns' keys; fidelity's own comparison counts before verification's."""
    cells: dict[str, Any] = {"name": row["name"], **(row["export"] or {})}
    cells["peak_rss_bytes"] = None  # the export's; the column is of running
    for found in (row["fidelity"] or {}, *row["bench"][:1]):
        cells |= {key: value for key, value in found.items() if key not in ("name", "seconds")}
    return cells | {name: grades.get("accuracy_percent") for name, grades in row["tasks"].items()}
