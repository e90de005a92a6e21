"""A sweep as a graph: what is measured, the steps that this takes, and what each of them depends on.

A step's identity is the SHA-256 of everything that its result depends on: the checkpoint's digest, the recipe
as resolved, the versions of the libraries that do the work, the questions themselves. Threads, memory and
where it runs are no part of it. Knows steps and subjects; runs nothing and keeps nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.accuracy.evaluate import make_any_task
from benchmarks.accuracy.lm_eval_tasks import HarnessTask
from benchmarks.accuracy.tasks import Task, TaskOptions
from benchmarks.common.machine import versions
from benchmarks.fidelity.texts import TOKENS, Windows, read_windows
from benchmarks.sweep.file import Export, Sweep
from fox_edge.artifact import sha256_file
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress, say
from fox_edge.quant import find_recipe
from runtimes.base import TORCH_PREFIX

ARTIFACTS, HIDDEN = "artifacts", "hidden"
BENCH, FIDELITY = "bench", "fidelity"
_SPARE_BYTES = 1 << 30  # a process beside its weights: libraries, KV cache, logits
_LIBRARIES = {
    "gguf": ("fox-edge", "llama-cpp-python", "gguf"),
    "onnx": ("fox-edge", "onnxruntime", "onnx"),
    "pte": ("fox-edge", "executorch", "torchao"),
    "torch": ("fox-edge", "torch"),
}
_NAME_CHARACTERS = 60
_LONGEST = 16  # prompts, by characters: the one of most tokens is among them


@dataclass(frozen=True, eq=False)
class Step:
    """Work that is done in one process and gives one result.

    `job` is what the worker is told, `key` what the result depends on, `needs` the identities of the steps
    that must have succeeded before, `memory_bytes` what it is reckoned to take.
    """

    kind: str
    label: str
    job: dict[str, Any] = field(repr=False)
    key: dict[str, Any] = field(repr=False)
    needs: tuple[str, ...] = ()
    memory_bytes: int = _SPARE_BYTES

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the kind and the key, hexadecimal."""
        return digest({"kind": self.kind, **self.key})


@dataclass(frozen=True)
class Subject:
    """One row of the result: an export, or a checkpoint in PyTorch. `spec` is what verbs call it by.

    `export` is the step that makes it, `answers` the steps of each task in the questions' order, `fidelity`
    the step that compares it with its checkpoint.
    """

    name: str
    spec: str
    checkpoint: str
    format: str
    quant: str
    rounding: str | None
    digest: str
    weight_bytes: int
    export: Step | None = None
    answers: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    fidelity: Step | None = None

    @property
    def job_spec(self) -> str:
        """`spec` for a process in another folder."""
        return str(Path(self.spec).absolute()) if self.export else self.spec

    @property
    def steps(self) -> list[Step]:
        """All steps of this row."""
        return [
            *([self.export] if self.export else []),
            *(step for steps in self.answers.values() for step in steps),
            *([self.fidelity] if self.fidelity else []),
        ]


@dataclass(frozen=True)
class Plan:
    """What a sweep does. `shared` are steps that several rows build on."""

    subjects: tuple[Subject, ...]
    tasks: dict[str, Task | HarnessTask]
    shared: tuple[Step, ...]
    windows: dict[str, Windows]  # by checkpoint, where fidelity is asked for

    @property
    def steps(self) -> list[Step]:
        """All steps but timing, each after those that it needs: all exports first."""
        exports = [subject.export for subject in self.subjects if subject.export]
        rest = [step for subject in self.subjects for step in subject.steps if step is not subject.export]
        return [*exports, *self.shared, *rest]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(sweep: Sweep, out: Path) -> Plan:
    """Open every checkpoint, resolve every recipe, read every task; raises FoxEdgeError.

    Nothing has been run or written when this fails.
    """
    tasks = {name: _task(name, sweep) for name in sweep.tasks if name not in (BENCH, FIDELITY)}
    sources = [_Source.open(word, sweep) for word in sweep.checkpoints]
    hidden = {s.word: _hidden(s, s.windows, sweep, out) for s in sources if s.windows is not None}
    wanted = [_Wanted.of(source, export, sweep) for source in sources for export in sweep.exports]
    names = _apart([w.name for w in wanted], [w.digest for w in wanted])
    subjects = []
    for source in sources:
        found = [_reference(source)] if sweep.reference else []
        found += [
            w.subject(name, sweep, out) for w, name in zip(wanted, names, strict=True) if w.source is source
        ]
        subjects += [_with_tasks(subject, source, tasks, hidden.get(source.word), sweep) for subject in found]
    return Plan(
        tuple(subjects), tasks, tuple(hidden.values()), {s.word: s.windows for s in sources if s.windows}
    )


def _task(name: str, sweep: Sweep) -> Task | HarnessTask:
    try:
        return make_any_task(name, TaskOptions(**sweep.tasks[name]))
    except FoxEdgeError as error:
        raise FoxEdgeError(f"{sweep.path}: [tasks.{name}] {error}") from None


@dataclass(frozen=True)
class _Source:
    """A checkpoint of the sweep, opened."""

    word: str
    name: str
    checkpoint: Checkpoint
    digest: str
    bytes: int
    windows: Windows | None

    @classmethod
    def open(cls, word: str, sweep: Sweep) -> _Source:
        try:
            checkpoint = Checkpoint.open(word)
        except FoxEdgeError as error:
            raise FoxEdgeError(f"{sweep.path}: checkpoint '{word}': {error}") from None
        for note in checkpoint.notes:
            say(f"note: {note}")
        windows = None
        if FIDELITY in sweep.tasks:
            asked = dict(sweep.tasks[FIDELITY])
            tokenizer, context = checkpoint.tokenizer(), checkpoint.config.max_positions
            windows = read_windows(tokenizer, context, file=asked.pop("text", None), **asked)
        with Progress(f"reading {word}"):
            found = checkpoint.digest()
        stored = sum(checkpoint.tensor(name).nbytes for name in checkpoint.shapes())
        return cls(word, plain_name(checkpoint.name), checkpoint, found, stored, windows)


def plain_name(text: str) -> str:
    """A text as a part of a file's name: nothing that could lead out of a folder or hide in it."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-_")
    return kept[:_NAME_CHARACTERS] or "unnamed"


def _apart(names: Sequence[str], digests: Sequence[str]) -> list[str]:
    """The names; those that several share (two recipes of one name) with a part of their digest."""
    return [
        f"{name}-{digest[:6]}" if names.count(name) > 1 else name
        for name, digest in zip(names, digests, strict=True)
    ]


def _reference(source: _Source) -> Subject:
    return Subject(
        name=f"{source.name} PyTorch BF16",
        spec=TORCH_PREFIX + source.word,
        checkpoint=source.word,
        format="torch",
        quant="bf16",
        rounding=None,
        digest=digest({"checkpoint": source.digest, "versions": _versions("torch")}),
        weight_bytes=2 * source.checkpoint.config.num_parameters(),
    )


@dataclass(frozen=True)
class _Wanted:
    """An export of a checkpoint, not yet named for good."""

    source: _Source
    export: Export
    name: str
    key: dict[str, Any]
    weight_bytes: int

    @classmethod
    def of(cls, source: _Source, export: Export, sweep: Sweep) -> _Wanted:
        recipe, shapes = find_recipe(export.format, export.quant), source.checkpoint.shapes()
        try:
            given = recipe.resolve(shapes)
        except FoxEdgeError as error:
            raise FoxEdgeError(f"{sweep.path}: checkpoint '{source.word}': {error}") from None
        limits = asdict(recipe.limits)
        if export.max_mean_kl is not None:
            limits["mean_kl_nats"] = export.max_mean_kl
        files = {name: path for name in ("calibrate", "imatrix") if (path := getattr(export, name))}
        key = {
            "checkpoint": source.digest,
            "format": export.format,
            "recipe": recipe.name,
            "types": {tensor: assignment.type.name for tensor, assignment in given.items()},
            "rounding": recipe.rounding_of(given, export.rounding),
            "limits": limits,
            "files": {name: sha256_file(path) for name, path in files.items()},
            "versions": _versions(export.format) | _versions("torch"),
        }
        name = "-".join(filter(None, (source.name, export.format, plain_name(recipe.name), export.rounding)))
        weights = sum(
            shape[0] * given[tensor].type.row_bytes(tensor, shape[1]) if len(shape) == 2 else 4 * shape[0]
            for tensor, shape in shapes.items()
        )
        return cls(source, export, name, key, weights)

    @property
    def digest(self) -> str:
        """What tells this export from others."""
        return digest(self.key)

    def subject(self, name: str, sweep: Sweep, out: Path) -> Subject:
        """The row under its final name, with the step that makes its artifact."""
        target = out / ARTIFACTS / name
        words = ["export", self.source.word, str(target.absolute()), "--format", self.export.format]
        words += ["--quant", self.export.quant, "--replace", "--json"]
        for option in ("rounding", "calibrate", "imatrix", "max_mean_kl"):
            if (value := getattr(self.export, option)) is not None:
                words += [f"--{option.replace('_', '-')}", str(value)]
        step = Step(
            kind="export",
            label=f"export {name}",
            job={"task": "sweep-export", "words": words},
            key=self.key,
            memory_bytes=sweep.run.memory_bytes or self.source.bytes + _SPARE_BYTES,
        )
        return Subject(
            name=name,
            spec=str(target),
            checkpoint=self.source.word,
            format=self.export.format,
            quant=str(self.key["recipe"]),
            rounding=str(self.key["rounding"]),
            digest=step.identity,
            weight_bytes=self.weight_bytes,
            export=step,
        )


def _with_tasks(
    subject: Subject,
    source: _Source,
    tasks: Mapping[str, Task | HarnessTask],
    hidden: Step | None,
    sweep: Sweep,
) -> Subject:
    """The row with the steps that question and compare it."""
    needs = (subject.export.identity,) if subject.export else ()
    # Runtimes may copy weights into the layout that their kernels like.
    memory = sweep.run.memory_bytes or 2 * subject.weight_bytes + _SPARE_BYTES
    answers = {name: tuple(_questions(subject, task, needs, memory, sweep)) for name, task in tasks.items()}
    if hidden is None or source.windows is None:
        return replace(subject, answers=answers)
    text = source.windows
    job = {
        "task": "fidelity",
        "checkpoint": subject.checkpoint,
        "text": {"source": text.source, "windows": text.windows, "first": text.first},
        "hidden": hidden.job["hidden"],
        "session": {},
    }
    fidelity = Step(
        kind=FIDELITY,
        label=f"fidelity of {subject.name}",
        job={**job, "subject": subject.job_spec},
        key={"subject": subject.digest, "hidden": hidden.identity},
        needs=(*needs, hidden.identity),
        memory_bytes=sweep.run.memory_bytes or memory + source.bytes,
    )
    return replace(subject, answers=answers, fidelity=fidelity)


def _questions(
    subject: Subject, task: Task | HarnessTask, needs: tuple[str, ...], memory_bytes: int, sweep: Sweep
) -> Iterator[Step]:
    """A task's steps for one row: parts of our own tasks, the harness's as a whole."""
    if isinstance(task, Task):
        yield from _shards(subject, task, needs, memory_bytes, sweep)
        return
    job = task.job({"subject": subject.job_spec, "session": {}}, {})
    data = [] if task.data is None else sorted(path for path in task.data.rglob("*") if path.is_file())
    key = {
        "subject": subject.digest,
        **{name: job[name] for name in ("name", "limit", "shots", "seed")},
        "data": {str(path.relative_to(task.data or "")): sha256_file(path) for path in data},
        "versions": {name: metadata.version(name) for name in ("lm_eval", "datasets")},
    }
    yield Step("answer", f"{task.name}, {subject.name}", job, key, needs, memory_bytes)


def _shards(
    subject: Subject, task: Task, needs: tuple[str, ...], memory_bytes: int, sweep: Sweep
) -> Iterator[Step]:
    """The task's questions cut into steps."""
    count = len(task.prompts)
    # So that every step opens the context that the whole task needs.
    longest = sorted(task.prompts, key=lambda prompt: len(str(prompt)))[-_LONGEST:]
    for start in range(0, count, sweep.run.questions):
        stop = min(start + sweep.run.questions, count)
        asked = {
            "prompts": task.prompts[start:stop],
            "shared": task.shared,
            "max_tokens": task.max_tokens,
            "stop_texts": list(task.stop_texts),
        }
        yield Step(
            kind="answer",
            label=f"{task.name} {start + 1} to {stop} of {count}, {subject.name}",
            job={
                "task": "answer",
                "subject": subject.job_spec,
                "session": {},
                "context_for": longest,
                **asked,
            },
            key={"subject": subject.digest, **asked},
            needs=needs,
            memory_bytes=memory_bytes,
        )


def _hidden(source: _Source, windows: Windows, sweep: Sweep, out: Path) -> Step:
    """The checkpoint's own hidden states on the text, which every comparison with it reads."""
    key = {
        "checkpoint": source.digest,
        "windows": windows.windows,
        "first": windows.first,
        "versions": _versions("torch"),
    }
    place = out.absolute() / HIDDEN / f"{source.name}-{digest(key)[:16]}"
    asked = {"tokens": TOKENS, "window": None, "score_from": None, **sweep.tasks[FIDELITY]}
    job = {
        **asked,
        "task": "fidelity-reference",
        "checkpoint": source.word,
        "text": str(asked["text"]) if "text" in asked else None,
        "hidden": str(place),
    }
    memory = sweep.run.memory_bytes or source.bytes + _SPARE_BYTES
    return Step("hidden", f"reference of {source.name} for fidelity", job, key, memory_bytes=memory)


def _versions(format: str) -> dict[str, str]:
    """Versions of the libraries that a step on this format runs on, of those installed."""
    found = versions()
    return {name: found[name] for name in _LIBRARIES[format] if name in found}
