"""The tasks that accuracy is measured on: prompts, the numbers they must end in, and when to stop.

A task is data; how it is answered and graded is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gsm8k
from benchmarks.answer import Prompt
from fox_edge.errors import FoxEdgeError

WORD_PROBLEMS_MAX_TOKENS = 200


@dataclass(frozen=True)
class Task:
    """Prompts with the final numbers expected, as strings."""

    name: str
    description: str
    prompts: list[Prompt]
    expected: list[str]
    max_tokens: int
    stop_texts: tuple[str, ...]


@dataclass(frozen=True)
class TaskOptions:
    """What a user may choose: how many problems, worked examples, and files instead of the hub."""

    limit: int = 50
    shots: int = 5
    data: Path | None = None
    train: Path | None = None


def gsm8k_task(options: TaskOptions) -> Task:
    """The first `limit` questions of GSM8K's test split, after the first `shots` of its train split."""
    if options.shots < 0:
        raise FoxEdgeError(f"{options.shots} worked examples were asked for; from 0 are possible")
    examples = gsm8k.read_split("train", options.train, "--train", options.shots) if options.shots else []
    if len(examples) < options.shots:
        raise FoxEdgeError(
            f"{options.train}: {options.shots} worked examples are needed, {len(examples)} are there"
        )
    questions = gsm8k.read_split("test", options.data, "--data", options.limit)
    return Task(
        name="gsm8k",
        description=f"GSM8K, {options.shots}-shot, plain text, official extraction",
        prompts=[gsm8k.prompt(examples, q.question) for q in questions],
        expected=[str(gsm8k.final_number(q.answer)) for q in questions],
        max_tokens=gsm8k.MAX_TOKENS,
        stop_texts=gsm8k.STOP_TEXTS,
    )


def word_problems_task(options: TaskOptions) -> Task:
    """`limit` held-out arithmetic problems of the embedded generator, 0-shot through the chat template."""
    from fox_edge.nano.problems import HELD_OUT_COUNT, held_out

    if options.limit > HELD_OUT_COUNT:
        raise FoxEdgeError(f"{options.limit} word problems were asked for; there are {HELD_OUT_COUNT}")
    problems = held_out(options.limit)
    return Task(
        name="word-problems",
        description="held-out arithmetic word problems, 0-shot, through the chat template",
        prompts=[[{"role": "user", "content": problem.question}] for problem in problems],
        expected=[str(problem.result) for problem in problems],
        max_tokens=WORD_PROBLEMS_MAX_TOKENS,
        stop_texts=(),
    )


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "gsm8k": gsm8k_task,
    "word-problems": word_problems_task,
}


def make_task(name: str, options: TaskOptions) -> Task:
    """The task of this name; raises FoxEdgeError listing those known."""
    if name not in TASKS:
        raise FoxEdgeError(f"unknown task '{name}'; known: {', '.join(TASKS)}")
    return TASKS[name](options)
