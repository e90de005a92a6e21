"""The benchmark of guessing ahead: real answers, counted right."""

from __future__ import annotations

import pytest

from benchmarks.processes.launch import run_worker
from benchmarks.readme_runs import speculation_table
from benchmarks.speculation import WAYS, prompts, rows
from tests.benchmarks.test_memory import MACHINE


def test_texts_to_be_written_again() -> None:
    (first, second) = prompts("again", 2, 0, None, None)
    text = first.splitlines()[0].removeprefix("Text: ")
    assert first.count(text) == 2 and first.endswith("The same text again:") and first != second


def test_answers_of_every_way() -> None:
    job = {"task": "speculation", "subject": "torch:nano", "threads": 1, "prompts": ["1 2 3 4 1 2 3 4 1 2"]}
    found = run_worker(job)
    assert set(found["answers"][0]) == set(WAYS)
    made = rows("torch:nano", "again", found)
    assert [row["way"] for row in made] == list(WAYS)
    assert all(row["identical"] == row["answers"] == 1 for row in made)
    assert made[2]["batches"] > 0 and "batches" not in made[0]


def test_what_is_counted() -> None:
    def answer(tokens: list[int], seconds: float) -> dict[str, object]:
        return {"tokens": tokens, "seconds": seconds}

    plain, auto, fixed = WAYS
    found = {
        "answers": [
            {plain: answer([1, 2, 3], 2.0), auto: answer([1, 2, 3], 1.0), fixed: answer([1, 2, 4], 1.0)},
            {plain: answer([5, 6, 7], 2.0), auto: answer([5, 6, 7], 1.0), fixed: answer([5, 6, 7], 3.0)},
        ],
        "counts": {auto: {"guessed": 4, "right": 3}, fixed: {"guessed": 0, "right": 0}},
    }
    first, second, third = rows("folder/model", "gsm8k", found)
    # Four tokens after the first of each answer.
    assert (first["decode_tokens_per_s"], first["speedup"], first["artifact"]) == (1.0, 1.0, "model")
    assert (second["decode_tokens_per_s"], second["speedup"], second["identical"]) == (2.0, 2.0, 2)
    assert second["right_percent"] == pytest.approx(75)
    assert (third["identical"], third["right_percent"]) == (1, None)
    assert "1 of 2" in speculation_table({"results": [first, second, third], "machine": MACHINE})
