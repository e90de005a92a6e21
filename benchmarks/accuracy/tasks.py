"""The tasks that accuracy is measured on by answering: prompts, the numbers they must end in, when to stop.

A task is data; how it is answered and graded is the same for all. What lm-evaluation-harness asks is in
lm_eval_tasks.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy import gsm8k
from benchmarks.accuracy.answer import Prompt
from fox_edge.errors import FoxEdgeError

GSM8K_SHOTS = 5  # the paper's, Table 6
WORD_PROBLEMS_MAX_TOKENS = 200


@dataclass(frozen=True)
class Task:
    """Prompts with the final numbers expected, as strings.

    `ids` say which questions of the whole set these are; `shared` is the text that all prompts begin with.
    """

    name: str
    description: str
    ids: list[str]
    prompts: list[Prompt]
    expected: list[str]
    max_tokens: int
    stop_texts: tuple[str, ...]
    shots: int = 0
    seed: int | None = None
    shared: str = ""


@dataclass(frozen=True)
class TaskOptions:
    """What a user may choose: how many problems, worked examples, files instead of the hub, which subset.

    `shots` None is the task's own; `seed` None asks the first `limit` questions.
    """

    limit: int = 50
    shots: int | None = None
    data: Path | None = None
    train: Path | None = None
    seed: int | None = None


def subset(ids: Sequence[str], limit: int, seed: int | None) -> list[int]:
    """Places of the questions to ask, ascending: the first ones, or those that a seed draws.

    Questions are ranked by SHA-256 of seed and id, so that a draw is the same with every version of every
    library, and a larger one holds every smaller one of the same seed.
    """
    if seed is None:
        return list(range(min(limit, len(ids))))

    def rank(place: int) -> bytes:
        return hashlib.sha256(f"{seed} {ids[place]}".encode()).digest()

    return sorted(sorted(range(len(ids)), key=rank)[:limit])


def check_shots(shots: int) -> None:
    """Raises FoxEdgeError for a number of worked examples below 0."""
    if shots < 0:
        raise FoxEdgeError(f"{shots} worked examples were asked for; from 0 are possible")


def gsm8k_task(options: TaskOptions) -> Task:
    """Questions of GSM8K's test split, after the first `shots` of its train split."""
    shots = GSM8K_SHOTS if options.shots is None else options.shots
    check_shots(shots)
    examples = gsm8k.read_split("train", options.train, "--train", shots) if shots else []
    if len(examples) < shots:
        raise FoxEdgeError(f"{options.train}: {shots} worked examples are needed, {len(examples)} are there")
    # Whoever asks the first ones need not read the others; a draw must know how many there are.
    count = options.limit if options.seed is None else None
    questions = gsm8k.read_split("test", options.data, "--data", count)
    ids = [str(n) for n in range(len(questions))]
    places = subset(ids, options.limit, options.seed)
    return Task(
        name="gsm8k",
        description=f"GSM8K, {shots}-shot, plain text, official extraction",
        ids=[ids[n] for n in places],
        prompts=[gsm8k.prompt(examples, questions[n].question) for n in places],
        expected=[str(gsm8k.final_number(questions[n].answer)) for n in places],
        max_tokens=gsm8k.MAX_TOKENS,
        stop_texts=gsm8k.STOP_TEXTS,
        shots=shots,
        seed=options.seed,
        shared=gsm8k.worked(examples),
    )


def word_problems_task(options: TaskOptions) -> Task:
    """`limit` held-out arithmetic problems of the embedded generator, 0-shot through the chat template."""
    from fox_edge.nano.problems import HELD_OUT_COUNT, held_out

    if options.shots is not None:
        check_shots(options.shots)
    if options.shots:
        raise FoxEdgeError(f"word problems have no worked examples; {options.shots} were asked for")
    if options.limit > HELD_OUT_COUNT:
        raise FoxEdgeError(f"{options.limit} word problems were asked for; there are {HELD_OUT_COUNT}")
    ids = [str(n) for n in range(HELD_OUT_COUNT)]
    places = subset(ids, options.limit, options.seed)
    everything = held_out()
    problems = [everything[n] for n in places]
    return Task(
        name="word-problems",
        description="held-out arithmetic word problems, 0-shot, through the chat template",
        ids=[ids[n] for n in places],
        prompts=[[{"role": "user", "content": problem.question}] for problem in problems],
        expected=[str(problem.result) for problem in problems],
        max_tokens=WORD_PROBLEMS_MAX_TOKENS,
        stop_texts=(),
        seed=options.seed,
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
