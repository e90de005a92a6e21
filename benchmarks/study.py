"""Everything that a report holds, from one command: speed and memory, fidelity, accuracy, the advice.

Drives bench, fidelity and evaluation one after the other and joins what they found. What could go wrong is
looked at first, so that no minutes are spent on a report that cannot be; the files are written at the end,
all or none. Exports of several models get a report each: which to ship, and what is closest or smallest, are
questions about one model. Knows the order of things, no figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy.evaluate import evaluate, make_any_task
from benchmarks.accuracy.tasks import TaskOptions
from benchmarks.common.records import is_number
from benchmarks.common.subject import Subject, open_subject
from benchmarks.devices.profiles import PROFILES
from benchmarks.fidelity.task import evaluate_fidelity
from benchmarks.latency.rows import rank_rows
from benchmarks.report.document import make_report, need_folder, report_text, write_reports
from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import TORCH_PREFIX


class Written(NamedTuple):
    """A report, and the folder that it is in."""

    folder: Path
    report: dict[str, Any]


def study(
    artifacts: Sequence[str | Path],
    folder: Path,
    measure: Callable[[], Mapping[str, Any]],
    *,
    checkpoint: str | None = None,
    task: str | None = None,
    limit: int = 50,
    data: Path | None = None,
    train: Path | None = None,
    threads: int | None = None,
    session: dict[str, Any] | None = None,
) -> list[Written]:
    """Measure artifacts, compare them, question them, and write the report into a folder.

    `measure` is `bench` with its words; with `checkpoint` fidelity is measured against it, else what was
    found when an artifact was exported is taken; with `task` the artifacts answer `limit` of its questions.
    Exports of several models are measured together, and each model's report is in a folder of its name.
    Raises FoxEdgeError for what is not there, before anything is measured, and when nothing can be written.
    """
    need_folder(folder)
    subjects = [open_subject(spec) for spec in artifacts]
    models = _by_model(subjects)
    if checkpoint is not None:
        if len(models) > 1:
            raise FoxEdgeError(
                f"--checkpoint is compared with exports of one model, but these are of {len(models)}: "
                f"{', '.join(models)}"
            )
        open_subject(_reference(checkpoint))
    if task is not None:
        make_any_task(task, TaskOptions(limit, None, data, train, None))
    shared: dict[str, Any] = {"threads": threads, "session": session}
    say(f"measuring {len(subjects)}, each in fresh processes")
    bench = measure()
    fidelity = _verified(subjects)
    if checkpoint is not None:
        say(f"comparing each with {checkpoint}")
        fidelity = evaluate_fidelity(artifacts, checkpoint=checkpoint, **shared)
    evaluations = []
    if task is not None:
        say(f"asking each {limit} questions of {task}")
        evaluations = [evaluate(artifacts, task=task, limit=limit, data=data, train=train, **shared)]
    found = []
    for name, specs in models.items():
        report = make_report(
            _of(bench, specs) if len(models) > 1 else bench,
            checkpoint=name if len(models) > 1 else checkpoint,
            fidelity=fidelity,
            evaluations=evaluations,
            profiles=[profile.to_json() for profile in PROFILES.values()],
        )
        found.append(Written(folder / _folder_name(name) if len(models) > 1 else folder, report))
    for written in found:
        need_folder(written.folder)
    write_reports({written.folder: written.report for written in found})
    return found


def study_json(found: Sequence[Written]) -> dict[str, Any]:
    """The report; where there are several, all of them and their folders."""
    if len(found) == 1:
        return found[0].report
    return {"reports": [{"folder": str(w.folder), **w.report} for w in found]}


def study_text(found: Sequence[Written]) -> str:
    """What a terminal shows: the table, the advice, and where the page is, of each report."""
    return "\n\n".join(
        f"{report_text(w.report)}\n\n{w.folder / 'report.html'}, report.md and report.json beside it"
        for w in found
    )


def _by_model(subjects: Sequence[Subject]) -> dict[str, list[str]]:
    """What was named of each model, by the checkpoint's name; what tells of none goes with the first.

    Another tool's export does not say what it was made of, and is measured to be compared with ours.
    """
    named = {subject.spec: _model(subject) for subject in subjects}
    first = next((model for model in named.values() if model), "model")
    models: dict[str, list[str]] = {}
    for spec, model in named.items():
        models.setdefault(model or first, []).append(spec)
    return models


def _model(subject: Subject) -> str:
    """The name of the checkpoint that it is, or was made of; '' unknown."""
    source = subject.source
    if isinstance(source, Artifact):
        return source.manifest.checkpoint
    return source.name if isinstance(source, Checkpoint) else ""


def _of(bench: Mapping[str, Any], specs: Sequence[str]) -> dict[str, Any]:
    """The same measurement with these rows alone, ranked among themselves."""
    rows = [dict(row) for row in bench["results"] if row["artifact"] in specs]
    rank_rows(rows)
    return {**bench, "results": rows}


def _folder_name(model: str) -> str:
    """A model's name as that of a folder: what a manifest says of it may be anything."""
    return re.sub(r"[^\w.-]+", "-", model).strip(".-")[:80] or "model"


def _reference(checkpoint: str) -> str:
    """How a reference is named as a subject: an artifact by its folder, a checkpoint by the prefix."""
    is_artifact = (Path(checkpoint) / MANIFEST).is_file()
    return checkpoint if is_artifact or checkpoint.startswith(TORCH_PREFIX) else TORCH_PREFIX + checkpoint


def _verified(subjects: Sequence[Subject]) -> dict[str, Any]:
    """What verification found of each artifact when it was exported: little text, but better than nothing."""
    found: dict[str, Any] = {}
    for subject in subjects:
        if isinstance(subject.source, Artifact) and (report := subject.source.manifest.verification):
            # Of a stranger's manifest too: what is no number is no figure.
            figures = {key: value for key, value in report.items() if is_number(value)}
            found[subject.spec] = {**figures, "fidelity_from": "as verified when each was exported"}
    return found
