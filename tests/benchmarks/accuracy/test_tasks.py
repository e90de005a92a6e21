"""What a task asks: the first questions, or a subset that a seed draws; what cannot be asked."""

import pytest

from benchmarks.accuracy.tasks import TaskOptions, make_task, subset
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.harness_data import gsm8k_row, rows, write_jsonl


def test_the_task_asks_the_first_questions_after_the_first_examples(tmp_path):
    data = write_jsonl(tmp_path / "test.jsonl", rows(gsm8k_row, 10, 10))
    train = write_jsonl(tmp_path / "train.jsonl", rows(gsm8k_row, 0, 7))
    task = make_task("gsm8k", TaskOptions(limit=3, shots=5, data=data, train=train))
    assert task.expected == ["20", "22", "24"]
    assert all(prompt.count("Question:") == 6 for prompt in task.prompts)
    assert "Tom has 4 pens" in task.prompts[0] and "Tom has 5 pens" not in task.prompts[0]
    assert task.prompts[2].endswith(f"Question: {gsm8k_row(12)['question']}\nAnswer:")
    everything = make_task("gsm8k", TaskOptions(limit=1000, shots=0, data=data))
    assert len(everything.prompts) == 10


def test_a_seed_draws_a_subset_that_is_told_and_grows(tmp_path):
    data = write_jsonl(tmp_path / "test.jsonl", rows(gsm8k_row, 0, 40))

    def drawn(limit, seed):
        task = make_task("gsm8k", TaskOptions(limit, 0, data, None, seed))
        assert task.expected == [str(2 * int(id)) for id in task.ids]  # row n asks for n and n more
        assert all(f"Tom has {id} pens" in prompt for id, prompt in zip(task.ids, task.prompts, strict=True))
        return task.ids

    assert drawn(5, None) == ["0", "1", "2", "3", "4"]
    assert drawn(5, 7) == drawn(5, 7) != drawn(5, 8)
    assert set(drawn(5, 7)) < set(drawn(12, 7)) and drawn(12, 7) == sorted(drawn(12, 7), key=int)
    assert len(drawn(99, 7)) == 40
    problems = make_task("word-problems", TaskOptions(limit=6, seed=3))
    everything = make_task("word-problems", TaskOptions(limit=200))
    assert problems.prompts == [everything.prompts[int(id)] for id in problems.ids]
    # Whatever the versions of libraries: SHA-256 decides.
    assert subset([str(n) for n in range(1319)], 4, 0) == [61, 793, 798, 988]


def test_unknown_tasks_and_impossible_numbers_are_refused():
    with pytest.raises(FoxEdgeError, match="unknown task 'mmlu'; known: gsm8k, word-problems"):
        make_task("mmlu", TaskOptions())
    with pytest.raises(FoxEdgeError, match="201 word problems were asked for; there are 200"):
        make_task("word-problems", TaskOptions(limit=201))
    for task in ("gsm8k", "word-problems"):
        with pytest.raises(FoxEdgeError, match="-1 worked examples"):
            make_task(task, TaskOptions(shots=-1))
    with pytest.raises(FoxEdgeError, match="word problems have no worked examples; 5 were asked for"):
        make_task("word-problems", TaskOptions(shots=5))
