"""Made-up questions in each task's own columns, in folders laid out as on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ANIMALS = ("fox", "owl", "hare", "newt", "crow", "mole")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    """A line per row; a text is a line as it is, for files that are broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def arc_row(n: int) -> dict[str, Any]:
    name = ANIMALS[n % 6]
    texts = [f"a {name} den", f"{n} nests", "the sea", "a red barn near the hill"]
    return {
        "id": f"Q{n}",
        "question": f"Where does {name} number {n} sleep at night?",
        "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[n % 4],
    }


def hellaswag_row(n: int) -> dict[str, Any]:
    name = ANIMALS[n % 6]
    return {
        "ind": n,
        "activity_label": "Feeding animals",
        "ctx_a": f"A boy opens {n} bags near the {name}.",
        "ctx_b": "the boy then",
        "ctx": "unused",
        "endings": [f"gives {n} nuts.", "sings [title] a song.", "sells the bags to a girl.", "eats."],
        "label": str(n % 4),
    }


def truthfulqa_row(n: int) -> dict[str, Any]:
    true = [f"A {ANIMALS[n % 6]} has {n + 2} legs.", "Nobody knows."]
    false = ["It has nine wings.", f"A {ANIMALS[n % 6]} can buy apples.", "It costs 5 dollars."]
    one = {"choices": [true[0], *false], "labels": [1, 0, 0, 0]}
    many = {"choices": true + false, "labels": [1, 1, 0, 0, 0]}
    return {
        "question": f"How many legs has a {ANIMALS[n % 6]}?",
        "mc1_targets": one,
        "mc2_targets": many,
    }


def mmlu_row(n: int) -> dict[str, Any]:
    return {
        "question": f"What is {n} and {n}?",
        "subject": "unused",
        "choices": [str(2 * n), str(2 * n + 1), str(n), "a fox"],
        "answer": n % 4,
    }


def winogrande_row(n: int) -> dict[str, Any]:
    return {
        "sentence": f"The {ANIMALS[n % 6]} sold {n} apples to the boy because _ was hungry.",
        "option1": f"the {ANIMALS[n % 6]}",
        "option2": "the boy",
        "answer": str(1 + n % 2),
    }


def gsm8k_row(n: int) -> dict[str, Any]:
    return {
        "question": f"Tom has {n} pens and buys {n} more. How many pens has Tom?",
        "answer": f"Tom has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} pens.\n#### {2 * n}",
    }


def rows(make: Any, start: int, count: int) -> list[dict[str, Any]]:
    return [make(n) for n in range(start, start + count)]


def write_task(folder: Path, task: str, count: int = 3, examples: int = 4) -> Path:
    """A task's folder: `count` questions, and `examples` worked ones where it has any."""
    if task == "arc-challenge":
        write_parquet(folder / "ARC-Challenge/test-00000-of-00001.parquet", rows(arc_row, 1, count))
        write_parquet(folder / "ARC-Challenge/train-00000-of-00001.parquet", rows(arc_row, 50, examples))
    elif task == "hellaswag":
        write_jsonl(folder / "data/validation.jsonl", rows(hellaswag_row, 1, count))
        write_jsonl(folder / "data/train.jsonl", rows(hellaswag_row, 50, examples))
    elif task == "truthfulqa":
        write_parquet(
            folder / "multiple_choice/validation-00000-of-00001.parquet", rows(truthfulqa_row, 1, count)
        )
    elif task == "mmlu":
        for place, subject in enumerate(("anatomy", "virology")):
            write_jsonl(folder / subject / "test.jsonl", rows(mmlu_row, 1 + 9 * place, count))
            write_jsonl(folder / subject / "dev.jsonl", rows(mmlu_row, 70 + 9 * place, examples))
    elif task == "winogrande":
        write_jsonl(folder / "winogrande_xl/validation.jsonl", rows(winogrande_row, 1, count))
        write_jsonl(folder / "winogrande_xl/train.jsonl", rows(winogrande_row, 50, examples))
    elif task == "gsm8k-harness":
        write_jsonl(folder / "test.jsonl", rows(gsm8k_row, 2, count))
        write_jsonl(folder / "train.jsonl", rows(gsm8k_row, 5, examples))
    else:
        raise ValueError(task)
    return folder
