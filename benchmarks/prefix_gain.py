"""What running the worked examples once is worth: GSM8K with and without reuse, the same questions.

    python -m benchmarks.prefix_gain ARTIFACT... --data test.jsonl --train train.jsonl --results FILE

Every artifact answers the questions twice in processes of their own, in turn, as often as `--repeats` says:
once with the keys and values of the worked examples kept, once with every prompt run whole. Knows jobs and
clocks; how an answer is made is accuracy/answer.py's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.gsm8k import judge
from benchmarks.accuracy.tasks import Task, TaskOptions, make_task
from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import open_subject
from benchmarks.common.table import Column, render
from benchmarks.processes.launch import run_worker
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress, say
from runtimes.base import usual_batch

TARGET = 3.0  # times faster, GSM8K 5-shot, 100 questions
WAYS = ("reused", "whole", "together")


def prefix_gain(
    artifacts: Sequence[str],
    options: TaskOptions,
    *,
    max_tokens: int | None,
    repeats: int,
    threads: int | None,
    batch: int | None = None,
) -> dict[str, Any]:
    """The report: per artifact medians of each way, and how many times faster the reuse is.

    Raises FoxEdgeError for files, artifacts and numbers that cannot be.
    """
    task = make_task("gsm8k", options)
    if not task.shots:
        raise FoxEdgeError("without worked examples there is nothing to reuse")
    # A word that names nothing is told before anything is run.
    turns = [(spec, way) for spec in artifacts for way in repeats * _ways(spec, batch)]
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {spec: {} for spec in artifacts}
    with Progress("asking with and without reuse") as progress:
        for n, (spec, way) in enumerate(turns, 1):
            found = _run(spec, task, way, max_tokens, threads, batch)
            rounds[spec].setdefault(way, []).append(found)
            progress.update(n, len(turns))
    rows = [_row(spec, task, found) for spec, found in rounds.items()]
    return {
        "command": study_command("prefix_gain"),
        "machine": machine(),
        "task": task.description,
        "n": len(task.ids),
        "question_ids": task.ids,
        "repeats": repeats,
        "max_tokens": max_tokens or task.max_tokens,
        "batch": batch,
        "target": TARGET,
        "results": rows,
    }


def _ways(spec: str, batch: int | None) -> tuple[str, ...]:
    """The ways that an artifact's questions can be asked."""
    several = usual_batch(open_subject(spec).runtime) and batch is not None
    return WAYS if several else WAYS[:2]


def _run(
    spec: str, task: Task, way: str, max_tokens: int | None, threads: int | None, batch: int | None
) -> dict[str, Any]:
    """All answers of one way, from a fresh process."""
    job: dict[str, Any] = {
        "task": "answer",
        "subject": spec,
        "threads": threads,
        "prompts": task.prompts,
        "shared": "" if way == "whole" else task.shared,
        "max_tokens": max_tokens or task.max_tokens,
        "stop_texts": task.stop_texts,
    }
    if way == "together":
        job["at_once"] = batch
    return run_worker(job)


def _row(spec: str, task: Task, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"artifact": spec}
    for way, results in rounds.items():
        answers = results[0]["answers"]
        row[way] = {
            "seconds": statistics.median(result["seconds"] for result in results),
            "prompt_s": statistics.median(sum(a["first_token_s"] for a in r["answers"]) for r in results),
            "prompt_tokens_run": sum(a["prompt_tokens"] - a["reused_tokens"] for a in answers),
            "answer_tokens": sum(a["answer_tokens"] for a in answers),
            "correct": sum(
                judge(a["text"], want)["right"] for a, want in zip(answers, task.expected, strict=True)
            ),
        }
    reused, whole = row["reused"], row["whole"]
    row["times_faster"] = whole["seconds"] / reused["seconds"]
    row["prompt_times_faster"] = whole["prompt_s"] / reused["prompt_s"]
    if "together" in row:
        row["together_times_faster"] = whole["seconds"] / row["together"]["seconds"]
    row["reached"] = max(row["times_faster"], row.get("together_times_faster", 0.0)) >= TARGET
    return row


COLUMNS = (
    Column("artifact", "artifact"),
    Column("whole, s", "whole_s", "{:,.1f}"),
    Column("reused, s", "reused_s", "{:,.1f}"),
    Column("times faster", "times_faster", "{:.2f}"),
    Column("and together", "together_times_faster", "{:.2f}"),
    Column("prompts alone", "prompt_times_faster", "{:.2f}"),
    Column("prompt tokens run", "tokens", "{:s}"),
    Column("answer tokens", "answers", "{:,d}"),
)


def prefix_gain_text(result: dict[str, Any]) -> str:
    """The report as a table for a person."""
    rows = [
        {
            **row,
            "whole_s": row["whole"]["seconds"],
            "reused_s": row["reused"]["seconds"],
            "tokens": f"{row['whole']['prompt_tokens_run']:,} / {row['reused']['prompt_tokens_run']:,}",
            "answers": row["reused"]["answer_tokens"],
        }
        for row in result["results"]
    ]
    return f"{result['n']} questions: {result['task']}\n{render(COLUMNS, rows)}"


def main() -> int:
    """Measure and write the results file; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="GSM8K with and without reuse of the worked examples.")
    parser.add_argument("artifact", nargs="+", help="artifacts, or torch:CHECKPOINT")
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's test.jsonl")
    parser.add_argument("--train", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: GSM8K's 320)")
    parser.add_argument("--batch", type=int, help="questions answered in one pass, as a third way")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, help="write the report there, as JSON")
    args = parser.parse_args()
    try:
        if min(args.questions, args.repeats, args.max_tokens or 1, args.batch or 1) < 1:
            raise FoxEdgeError("questions, repeats, tokens and batches are numbers from 1")
        options = TaskOptions(args.questions, args.shots, args.data, args.train)
        result = prefix_gain(
            args.artifact,
            options,
            max_tokens=args.max_tokens,
            repeats=args.repeats,
            threads=args.threads,
            batch=args.batch,
        )
        if args.results:
            write_results(args.results, result)
    except FoxEdgeError as error:
        say(f"prefix_gain: {error}")
        return 2
    print(prefix_gain_text(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
