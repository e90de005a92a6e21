"""The report: one record of everything found, as report.json, report.md and one HTML page, and read again.

The record (`schema` 2):

    schema, created (ISO 8601, UTC), command, checkpoint, machine, conditions, settings, bandwidth, compute,
    baseline (all as `bench` gives them), profiles [{name threads memory_bytes context
    bandwidth_bytes_per_s source}], text (what fidelity was measured on), question (str or null),
    commands [str], advice [{profile artifact name sentence}], tasks [{task description n}],
    rows [bench's row + name + fidelity's figures + memory [what was reckoned per profile]
          + tasks [one per task: its grades, and which answers were right]
          + the first task's grades again, as correct n accuracy_percent ci95_percent paired_p]

Any figure of a row may be missing or null: it shows as a dash. Knows how to join, write and read; measures
nothing, and leaves what is said of the figures to advice.py and how it looks to page.py and markdown.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import records
from benchmarks.common.table import render
from benchmarks.report.advice import advise
from benchmarks.report.figures import TERMINAL_COLUMNS, baseline_note, short_names
from benchmarks.report.markdown import report_markdown
from benchmarks.report.page import report_html
from fox_edge.errors import FoxEdgeError
from fox_edge.partial import partial_files

SCHEMA = records.SCHEMA
FILES = ("report.json", "report.md", "report.html")
_FIDELITY = (
    *("positions", "mean_kl_nats", "mean_kl_se_nats", "median_kl_nats", "p99_kl_nats", "max_kl_nats"),
    *("top1_agreement_percent", "top1_se_percent", "top5_agreement_percent", "reference_perplexity"),
    *("perplexity", "perplexity_ratio", "perplexity_ratio_se", "curve", "fidelity_from"),
)
_ANSWER = ("question", "expected", "right", "score")
_ACCURACY = ("accuracy_percent", "ci95_percent", "correct", "n", "paired_p", "paired", "flexible_percent")


def make_report(
    bench: Mapping[str, Any],
    *,
    checkpoint: str | None,
    names: Mapping[str, str] | None = None,
    fidelity: Mapping[str, Any] | None = None,
    evaluations: Iterable[Mapping[str, Any]] = (),
    profiles: Iterable[Mapping[str, Any]] = (),
    memory: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    answers: Mapping[str, str] | None = None,
    question: str | None = None,
    commands: Sequence[str] = (),
) -> dict[str, Any]:
    """Join what was found of each artifact, by the name that `bench` has it under.

    `names` are for showing (default: the path's last parts); `fidelity` is fidelity's result or a mapping of
    artifacts to verification reports; `evaluations` are `evaluate`'s results; `memory` is what was reckoned
    for each profile; `answers` is what each artifact said to `question`.
    """
    evaluations = list(evaluations)
    found = _by_artifact(fidelity or {})
    shown = short_names([r["artifact"] for r in bench["results"]]) | dict(names or {})
    rows = []
    for result in bench["results"]:
        key = result["artifact"]
        users = f", {result['users']} users" if (result.get("users") or 1) > 1 else ""
        row = {"name": shown[key] + users, **result}
        row |= {k: v for k, v in found.get(key, {}).items() if k in _FIDELITY}
        row["memory"] = list((memory or {}).get(key, ()))
        row["tasks"] = [grades for e in evaluations if (grades := _grades(e, key))]
        if row["tasks"]:
            row |= {k: row["tasks"][0][k] for k in _ACCURACY if k in row["tasks"][0]}
        rows.append({**row, "answer": (answers or {}).get(key)})
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": bench.get("command"),
        "checkpoint": checkpoint,
        "machine": bench["machine"],
        "conditions": bench.get("conditions"),
        "settings": bench["settings"],
        "bandwidth": bench["bandwidth"],
        "compute": bench.get("compute") or [],
        "baseline": bench["baseline"],
        "profiles": list(profiles),
        "text": (fidelity or {}).get("text") if "results" in (fidelity or {}) else None,
        "tasks": [{k: e.get(k) for k in ("task", "description", "n")} for e in evaluations],
        "rows": rows,
        "question": question,
        "commands": list(commands),
    }
    report["advice"] = advise(report)
    whole: dict[str, Any] = records.clean(report)
    return whole


def _by_artifact(fidelity: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    if "results" in fidelity:
        return {row["artifact"]: row for row in fidelity["results"]}
    return fidelity


def _grades(evaluation: Mapping[str, Any], artifact: str) -> dict[str, Any] | None:
    """One artifact's grades in one task; of its answers only whether they were right."""
    row = next((r for r in evaluation["results"] if r["artifact"] == artifact), None)
    if row is None:
        return None
    grades = {"task": evaluation["task"], **{k: row[k] for k in _ACCURACY if k in row}}
    if row.get("error"):
        return {**grades, "error": row["error"]}
    answers = [{k: a[k] for k in _ANSWER if k in a} for a in row.get("answers") or ()]
    return {**grades, "answers": answers} if answers else grades


# --- writing and reading -----------------------------------------------------------------------------------


def need_folder(folder: Path) -> None:
    """Raise FoxEdgeError when a report could not be written there: before minutes are spent on one."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FoxEdgeError(f"{folder}: the report cannot be written ({there} is not a folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FoxEdgeError(f"{folder}: the report cannot be written ({there} may not be changed)")


def write_report(report: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    """Write report.json, report.md and report.html into a folder: all of them, or none.

    They are written whole under other names first, so that a full disk leaves what was there. Raises
    FoxEdgeError when they cannot be written.
    """
    return write_reports({folder: report})


def write_reports(reports: Mapping[Path, Mapping[str, Any]]) -> tuple[Path, ...]:
    """The same for reports in folders of their own: all files of all folders, or none."""
    texts = {folder / name: text for folder, r in reports.items() for name, text in _texts(r).items()}
    folder = next(iter(reports))
    try:
        for folder in reports:
            folder.mkdir(parents=True, exist_ok=True)
        if blocked := next((target for target in texts if target.is_dir()), None):
            raise FoxEdgeError(f"{blocked}: the report cannot be written (a folder has its name)")
        with partial_files(*texts) as partial:
            for path, (target, text) in zip(partial, texts.items(), strict=True):
                folder = target.parent
                path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FoxEdgeError(f"{folder}: the report cannot be written ({error.strerror})") from None
    return tuple(texts)


def _texts(report: Mapping[str, Any]) -> dict[str, str]:
    """What each of FILES holds."""
    record = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return dict(zip(FILES, (record, report_markdown(report), report_html(report)), strict=True))


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, checked, in this release's shape; raises FoxEdgeError with one sentence.

    For a file that is missing, too large, no JSON, no report, of a newer schema, or with a figure that is
    no number. A report of schema 1 gets what it lacks.
    """
    record = records.read_json(path)
    if "rows" not in record:
        raise FoxEdgeError(f"{path}: no report of fox-edge (it has no 'rows')")
    records.check(record, records.REPORT, path)
    upgraded = {
        **dict.fromkeys(("command", "checkpoint", "conditions", "text", "question")),
        **{key: [] for key in ("bandwidth", "compute", "profiles", "commands", "advice")},
        **{key: value for key, value in record.items() if value is not None},
        "schema": SCHEMA,
    }
    task = record.get("task")
    if not isinstance(upgraded.get("tasks"), list):
        upgraded["tasks"] = [{"task": task, "description": None, "n": None}] if isinstance(task, str) else []
    upgraded["rows"] = [_upgraded(row, task) for row in record["rows"]]
    return upgraded


def _upgraded(row: Mapping[str, Any], task: Any) -> dict[str, Any]:
    """A row with its name, and its one task's grades where schema 2 has them."""
    row = {**row, "name": row.get("name") or row["artifact"]}
    if "tasks" not in row and row.get("accuracy_percent") is not None:
        row["tasks"] = [{"task": str(task), **{k: row[k] for k in _ACCURACY if k in row}}]
    return row


# --- the terminal ------------------------------------------------------------------------------------------


def report_text(report: Mapping[str, Any]) -> str:
    """The table for a terminal, at most 120 columns wide, the published row last and marked; then advice."""
    published = {**report["baseline"], "name": "baseline"}
    if report["baseline"].get("ours") is False:
        published["name"] = "not ours: H100, BF16"
    lines = [render(TERMINAL_COLUMNS, [*report["rows"], published])]
    lines += [f"{row['name']}: {row['error']}" for row in report["rows"] if row.get("error")]
    lines.append(baseline_note(report["baseline"]))
    advice = report.get("advice") or ()
    return "\n".join(
        [*lines, *([""] if advice else []), *(f"{a['profile']}: {a['sentence']}" for a in advice)]
    )
