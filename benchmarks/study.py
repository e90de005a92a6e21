"""Everything that a report holds, from one command: speed and memory, fidelity, accuracy, the advice.

Drives bench, fidelity and evaluation one after the other and joins what they found. What could go wrong is
looked at first, so that no minutes are spent on a report that cannot be; the files are written at the end,
all or none. Knows the order of things, no figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.evaluate import evaluate, make_any_task
from benchmarks.accuracy.tasks import TaskOptions
from benchmarks.common.subject import Subject, open_subject
from benchmarks.devices.profiles import PROFILES
from benchmarks.fidelity.task import evaluate_fidelity
from benchmarks.report.document import make_report, need_folder, report_text, write_report
from benchmarks.report.records import is_number
from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.progress import say
from runtimes.base import TORCH_PREFIX


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
) -> dict[str, Any]:
    """Measure artifacts, compare them, question them, and write the report into a folder; returns it.

    `measure` is `bench` with its words; with `checkpoint` fidelity is measured against it, else what was
    found when an artifact was exported is taken; with `task` the artifacts answer `limit` of its questions.
    Raises FoxEdgeError for what is not there, before anything is measured, and when nothing can be written.
    """
    need_folder(folder)
    subjects = [open_subject(spec) for spec in artifacts]
    if checkpoint is not None:
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
    report = make_report(
        bench,
        checkpoint=checkpoint,
        fidelity=fidelity,
        evaluations=evaluations,
        profiles=[profile.to_json() for profile in PROFILES.values()],
    )
    write_report(report, folder)
    return report


def study_text(report: Mapping[str, Any], folder: Path) -> str:
    """What a terminal shows: the table, the advice, and where the page is."""
    return f"{report_text(report)}\n\n{folder / 'report.html'}, report.md and report.json beside it"


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
