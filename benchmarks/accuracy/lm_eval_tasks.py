"""The paper's six tasks (Table 6) as lm-evaluation-harness asks them: which, how, and what counts.

Knows the harness's names; its package is imported only by the process that asks. The data comes from the hub,
or from a local folder (lm_eval_data.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import lm_eval_data
from benchmarks.accuracy.answers_log import appending
from benchmarks.accuracy.lm_eval_data import Check, Row
from benchmarks.accuracy.proportions import bootstrap_percent, wilson_percent
from benchmarks.accuracy.tasks import TaskOptions, check_shots, subset
from fox_edge.errors import FoxEdgeError, MissingPackageError

Splits = dict[str, list[Row]]


@dataclass(frozen=True)
class HarnessSpec:
    """One task: the harness's folder and name, the paper's number of worked examples, the metric that counts.

    `configuration` is the hub's (None: one per subject); `asked` and `examples` name the splits of questions
    and of worked examples. `shots_fixed`: its prompt has examples of its own, the same for everybody.
    """

    folder: str
    task: str
    shots: int
    metric: str
    configuration: str | None
    asked: str
    examples: str | None
    checks: tuple[Check, ...]
    shots_fixed: bool = False


# Shots: the paper's, section 3. Metrics: the Open LLM Leaderboard's, whose set-up the paper says it follows.
HARNESS_TASKS: dict[str, HarnessSpec] = {
    "arc-challenge": HarnessSpec(
        "arc", "arc_challenge", 25, "acc_norm", "ARC-Challenge", "test", "train", lm_eval_data.ARC
    ),
    "hellaswag": HarnessSpec(
        "hellaswag", "hellaswag", 10, "acc_norm", "default", "validation", "train", lm_eval_data.HELLASWAG
    ),
    "truthfulqa": HarnessSpec(
        "truthfulqa",
        "truthfulqa_mc2",
        0,
        "acc",
        "multiple_choice",
        "validation",
        None,
        lm_eval_data.TRUTHFULQA,
        True,
    ),
    "mmlu": HarnessSpec("mmlu", "mmlu", 5, "acc", None, "test", "dev", lm_eval_data.MMLU),
    "winogrande": HarnessSpec(
        "winogrande", "winogrande", 5, "acc", "winogrande_xl", "validation", "train", lm_eval_data.WINOGRANDE
    ),
    "gsm8k-harness": HarnessSpec(
        "gsm8k", "gsm8k", 5, "exact_match", "main", "test", "train", lm_eval_data.GSM8K
    ),
}
_STRICT, _FLEXIBLE = "strict-match", "flexible-extract"


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness with what a user chose."""

    name: str
    spec: HarnessSpec
    limit: int
    shots: int
    seed: int | None
    data: Path | None

    @property
    def description(self) -> str:
        """For people."""
        return f"{self.spec.task} of lm-evaluation-harness, {self.shots}-shot, {self.spec.metric}"

    def job(self, job: Mapping[str, Any], done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What the worker is told, besides `job`; `done` are results by request."""
        return {
            **job,
            "task": "lm-eval",
            "name": self.name,
            "limit": self.limit,
            "shots": self.shots,
            "seed": self.seed,
            "data": str(self.data) if self.data else None,
            "done": {key: fields["result"] for key, fields in done.items() if "result" in fields},
        }

    def graded(self, result: dict[str, Any]) -> dict[str, Any]:
        """The row's figures from what the worker found."""
        answers, counts = result["answers"], {"seconds": result["seconds"], **result["counts"]}
        scores = np.array([a["score"] if "score" in a else a["right"] for a in answers], float)
        share = 100 * float(scores.mean())
        if "score" in answers[0]:
            interval, correct = bootstrap_percent(scores), None
        else:
            correct = int(scores.sum())
            interval = wilson_percent(correct, len(answers))
        row = {
            "n": len(answers),
            "correct": correct,
            "accuracy_percent": share,
            "ci95_percent": list(interval),
            **counts,
            "answers": answers,
        }
        if "flexible_right" in answers[0]:
            flexible = sum(a["flexible_right"] for a in answers)
            row |= {
                "strict_correct": correct,
                "flexible_correct": flexible,
                "flexible_percent": 100 * flexible / len(answers),
            }
        return row


def make_harness_task(name: str, options: TaskOptions) -> HarnessTask:
    """The task of this name; a local folder is read and checked, so that no model is run for nothing.

    Raises MissingPackageError naming the extra, FoxEdgeError for files or numbers that cannot be.
    """
    spec = HARNESS_TASKS[name]
    shots = spec.shots if options.shots is None else options.shots
    check_shots(shots)
    if spec.shots_fixed and shots != spec.shots:
        raise FoxEdgeError(
            f"{name} is {spec.shots}-shot: its prompt has examples of its own, and {shots} cannot be added"
        )
    if options.train is not None:
        raise FoxEdgeError(f"--train goes with gsm8k; {name} takes a folder with both splits: --data")
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("lm-evaluation-harness", "lm-eval")
    if options.data is not None:
        local_data(spec, options.data, shots)
    return HarnessTask(name, spec, options.limit, shots, options.seed, options.data)


def local_data(spec: HarnessSpec, folder: Path, shots: int) -> dict[str, Splits]:
    """The harness's task -> split -> rows of a local folder; raises FoxEdgeError saying what is missing."""
    if not folder.is_dir():
        raise FoxEdgeError(
            f"{folder}: not a folder (a task's files are given as a folder laid out as on the hub)"
        )
    if spec.configuration is not None:
        return {spec.task: _local_splits(spec, folder, spec.configuration, shots)}
    subjects = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and lm_eval_data.split_path(path, "", spec.asked) and path.name != "all"
    )
    if not subjects:
        raise FoxEdgeError(f"{folder}: has no folder of a subject with a file of the split '{spec.asked}'")
    return {f"{spec.task}_{name}": _local_splits(spec, folder / name, "", shots) for name in subjects}


def _local_splits(spec: HarnessSpec, folder: Path, configuration: str, shots: int) -> Splits:
    splits = {}
    for split, needed in ((spec.asked, 1), (spec.examples, shots)):
        path = lm_eval_data.split_path(folder, configuration, split) if split else None
        if path is None and split and needed:
            raise FoxEdgeError(
                f"{folder}: has no file of the split '{split}' ({split}.jsonl or {split}*.parquet, there"
                + (f", in data or in {configuration})" if configuration else ")")
            )
        if path is not None and split:
            splits[split] = lm_eval_data.read_rows(path, spec.checks)
            if len(splits[split]) < needed:
                raise FoxEdgeError(
                    f"{path}: {needed} worked examples are needed, {len(splits[split])} are there"
                )
    return splits


# --- in the worker ------------------------------------------------------------------------------------


def run_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'lm-eval': {subject, threads, session, name, limit, shots, seed, data, done, log}.

    -> {answers: one per question, counts, seconds}. Raises FoxEdgeError for data that cannot be had.
    """
    import time

    from lm_eval.evaluator import evaluate

    from benchmarks.accuracy.lm_eval_model import FoxEdgeLM

    spec = HARNESS_TASKS[job["name"]]
    tasks = load_tasks(spec, Path(job["data"]) if job["data"] else None, job["shots"])
    asked = choose({name: len(task.eval_docs) for name, task in tasks.items()}, job["limit"], job["seed"])
    path = Path(job["log"]) if job.get("log") else None
    with appending(path, job["subject"]) as write:
        model = FoxEdgeLM(
            job["subject"],
            threads=job["threads"],
            done=job["done"],
            keep=lambda key, result: write(key, {"result": result}),
            told=progress,
            **job["session"],
        )
        start = time.perf_counter()
        with contextlib.closing(model):
            # What `simple_evaluate` does besides is to look at the machine, for many seconds.
            found = evaluate(
                lm=model,
                task_dict={"tasks": {name: tasks[name] for name in asked}},
                samples=asked,
                bootstrap_iters=0,
            )
        seconds = time.perf_counter() - start
    assert found is not None  # only other ranks get nothing
    return {
        "answers": _answers(spec, found["samples"]),
        "seconds": seconds,
        "counts": {"computed_tokens": model.computed_tokens, "cut_requests": model.cut_requests},
    }


def load_tasks(spec: HarnessSpec, folder: Path | None, shots: int) -> dict[str, Any]:
    """The harness's task objects by name, on local files or on the hub's, with so many worked examples."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    tasks = _from_hub(spec) if folder is None else _on_files(spec, folder, shots)
    for task in tasks.values():
        if not spec.shots_fixed:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return tasks


def _manager(spec: HarnessSpec) -> Any:
    """The harness's index of this one task: that of all its thousands takes many seconds."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / spec.folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)


def _from_hub(spec: HarnessSpec) -> dict[str, Any]:
    try:
        return dict(_manager(spec).load(spec.task)["tasks"])
    # Network, proxy, cache and file failures come in many classes; the user needs the one line.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise FoxEdgeError(
            f"the data of {spec.task} cannot be had from the hub ({reason}); give a local folder with --data"
        ) from None


def _on_files(spec: HarnessSpec, folder: Path, shots: int) -> dict[str, Any]:
    manager = _manager(spec)
    found = local_data(spec, folder, shots)
    strangers = sorted(set(found) - set(manager.all_subtasks))
    if strangers:
        raise FoxEdgeError(f"{folder}: the harness has no task '{strangers[0]}'")
    # Only a group's members are the registered tasks with fields of their own.
    members = [{"task": name, **_on(splits)} for name, splits in found.items()]
    return dict(manager.load({"group": "local", "task": members})["tasks"])


def _on(splits: Splits) -> dict[str, Any]:
    """What of a task's configuration must change to ask these rows."""
    import datasets

    rows = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    absent = {f"{kind}_split": None for kind, split in _SPLITS.items() if split not in rows}
    # Given as a function, the rows go through no cache of files.
    return {"custom_dataset": lambda **_: datasets.DatasetDict(rows), **absent}


# The harness's kinds of split and the names that these tasks give them.
_SPLITS = {"training": "train", "validation": "validation", "test": "test"}


def choose(counts: Mapping[str, int], limit: int, seed: int | None) -> dict[str, list[int]]:
    """Which questions of which of the harness's tasks: places, ascending.

    Without a seed, the first of each subject in turn, then the second: a few questions still see all of them.
    """
    ids = sorted((n, name) for name, count in counts.items() for n in range(count))
    asked: dict[str, list[int]] = {}
    for place in subset([f"{name}/{n}" for n, name in ids], limit, seed):
        asked.setdefault(ids[place][1], []).append(ids[place][0])
    return {name: sorted(places) for name, places in sorted(asked.items())}


def _answers(spec: HarnessSpec, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One entry per question: right or wrong, or a score where the metric is one."""
    answers: dict[str, dict[str, Any]] = {}
    for name, logged in samples.items():
        for sample in logged:
            answer = answers.setdefault(f"{name}/{sample['doc_id']}", {})
            value = float(sample[spec.metric])
            if sample["filter"] == _FLEXIBLE:
                answer["flexible_right"] = value == 1
            elif spec.shots_fixed:  # TruthfulQA's share of probability on what is true
                answer["score"] = value
            else:
                answer["right"] = value == 1
            if sample["filter"] in (_STRICT, _FLEXIBLE):
                answer["text"] = sample["resps"][0][0]
    return [{"question": question, **answer} for question, answer in sorted(answers.items(), key=_place)]


def _place(item: tuple[str, Any]) -> tuple[str, int]:
    name, _, number = item[0].rpartition("/")
    return name, int(number)
