"""The paper's tasks on made-up local files: what is asked, what counts, and what is wrong with a folder."""

import json

import pytest

from benchmarks.accuracy import lm_eval_data
from benchmarks.accuracy.evaluate import evaluate, evaluate_text, pair
from benchmarks.accuracy.lm_eval_tasks import (
    HARNESS_TASKS,
    choose,
    load_tasks,
    local_data,
    make_harness_task,
    run_job,
)
from benchmarks.accuracy.tasks import TaskOptions
from benchmarks.common.table import WIDTH
from fox_edge.errors import FoxEdgeError, MissingPackageError
from tests.benchmarks.harness_data import arc_row, gsm8k_row, mmlu_row, write_jsonl, write_parquet, write_task


def job(task, folder, **fields):
    shots = 0 if task == "truthfulqa" else 2
    plain = {"subject": "torch:nano", "threads": 1, "session": {}, "done": {}, "log": None}
    asked = {"name": task, "limit": 50, "seed": None, "shots": shots, "data": str(folder)}
    return {**plain, **asked, **fields}


def refused(task, folder, **options) -> str:
    with pytest.raises(FoxEdgeError) as error:
        make_harness_task(task, TaskOptions(data=folder, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the tasks ------------------------------------------------------------------------------------


def test_the_paper_s_shots_and_the_leaderboard_s_metrics():
    assert {name: (spec.shots, spec.metric) for name, spec in HARNESS_TASKS.items()} == {
        "arc-challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "truthfulqa": (0, "acc"),
        "mmlu": (5, "acc"),
        "winogrande": (5, "acc"),
        "gsm8k-harness": (5, "exact_match"),
    }


@pytest.fixture(scope="module")
def second_opinion(nano):
    """The harness's own model class on transformers, float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(nano.path), dtype="float32", device="cpu", batch_size=1)


@pytest.mark.parametrize("task", [name for name in HARNESS_TASKS if name != "gsm8k-harness"])
def test_each_task_comes_to_what_the_harness_finds_with_transformers(task, tmp_path, second_opinion):
    from lm_eval.evaluator import evaluate as ask

    spec, shots = HARNESS_TASKS[task], 0 if task == "truthfulqa" else 2
    folder = write_task(tmp_path, task, count=5)
    found = run_job(job(task, folder), lambda done, total: None)
    tasks = load_tasks(spec, folder, shots)
    theirs = ask(lm=second_opinion, task_dict={"tasks": tasks}, bootstrap_iters=0)["samples"]
    wanted = {f"{name}/{s['doc_id']}": s[spec.metric] for name, logged in theirs.items() for s in logged}
    ours = {a["question"]: a.get("score", a.get("right")) for a in found["answers"]}
    if task == "truthfulqa":  # a share of probability: bfloat16 beside float32
        assert ours == {question: pytest.approx(value, rel=0.3) for question, value in wanted.items()}
    else:
        assert ours == {question: value == 1 for question, value in wanted.items()}
    assert len(ours) == (10 if task == "mmlu" else 5)
    assert found["counts"]["computed_tokens"] > 0 and found["counts"]["cut_requests"] == 0


def test_the_harness_s_gsm8k_has_both_extractions(tmp_path):
    folder = write_task(tmp_path, "gsm8k-harness", count=2)
    task = make_harness_task("gsm8k-harness", TaskOptions(data=folder, shots=2))
    row = task.graded(run_job(job("gsm8k-harness", folder), lambda done, total: None))
    assert row["n"] == 2 and row["strict_correct"] == row["correct"] <= row["flexible_correct"] <= 2
    assert all(answer["text"] for answer in row["answers"])


def test_worked_examples_come_before_each_question(tmp_path):
    folder = write_task(tmp_path, "arc-challenge", count=2, examples=30)
    [task] = load_tasks(HARNESS_TASKS["arc-challenge"], folder, 25).values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    context, continuation = task.instances[0].args
    assert context.count("Question:") == 26 and context.endswith("\nAnswer:")
    assert continuation == " a owl den"


# --- subsets --------------------------------------------------------------------------------------


def test_a_few_questions_of_many_subjects_see_all_of_them():
    counts = {"a": 9, "b": 2, "c": 9}
    assert choose(counts, 5, None) == {"a": [0, 1], "b": [0, 1], "c": [0]}
    assert choose(counts, 99, None) == {"a": [*range(9)], "b": [0, 1], "c": [*range(9)]}
    drawn = choose(counts, 8, 3)
    assert sum(map(len, drawn.values())) == 8 and drawn == choose(counts, 8, 3) != choose(counts, 8, 4)
    larger = choose(counts, 12, 3)
    assert all(set(places) <= set(larger[name]) for name, places in drawn.items())


def test_a_subset_is_told_by_its_questions(tmp_path):
    folder = write_task(tmp_path, "mmlu", count=4)
    found = run_job(job("mmlu", folder, limit=3, seed=1), lambda done, total: None)
    wanted = choose({"mmlu_anatomy": 4, "mmlu_virology": 4}, 3, 1)
    assert [a["question"] for a in found["answers"]] == [
        f"{name}/{n}" for name, places in wanted.items() for n in places
    ]


# --- the whole ------------------------------------------------------------------------------------


def test_evaluation_through_the_harness_goes_on_where_it_was_cut_off(tmp_path, nano_gguf):
    folder = write_task(tmp_path / "data", "winogrande", count=4)
    kept = tmp_path / "answers.jsonl"
    options = {"task": "winogrande", "shots": 1, "data": folder, "answers": kept, "threads": 1}
    spec = str(nano_gguf.path)
    result = json.loads(json.dumps(evaluate([spec], limit=3, **options)))
    [row] = result["results"]
    assert (result["n"], row["n"], result["shots"], row["paired"]) == (3, 3, 1, None)
    assert result["question_ids"] == ["winogrande/0", "winogrande/1", "winogrande/2"]
    text = evaluate_text(result)
    assert "accuracy" in text and "strict" not in text
    assert max(map(len, text.splitlines()[1:5])) <= WIDTH
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 3  # what answers depend on; two options for each of three questions
    kept.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # a kill in mid-line
    [again] = evaluate([spec], limit=3, **options)["results"]
    assert again["answers"] == row["answers"]
    assert 0 < again["computed_tokens"] < row["computed_tokens"]
    with pytest.raises(FoxEdgeError, match="shots 1, but this run has shots 2"):
        evaluate([spec], limit=3, **{**options, "shots": 2})


# --- what is wrong --------------------------------------------------------------------------------


def test_folders_that_are_not_the_task_s(tmp_path):
    assert "not a folder" in refused("arc-challenge", tmp_path / "none")
    assert "has no file of the split 'test' (test.jsonl or test*.parquet" in refused(
        "arc-challenge", tmp_path
    )
    assert "has no folder of a subject with a file of the split 'test'" in refused("mmlu", tmp_path)
    write_task(tmp_path, "winogrande")
    (tmp_path / "winogrande_xl" / "train.jsonl").unlink()
    assert "no file of the split 'train'" in refused("winogrande", tmp_path)
    assert local_data(HARNESS_TASKS["winogrande"], tmp_path, 0)  # nobody needs them without examples
    write_jsonl(tmp_path / "winogrande_xl" / "validation-2.jsonl", [])
    assert "2 files of the split 'validation'" in refused("winogrande", tmp_path)


def test_too_few_worked_examples(tmp_path):
    folder = write_task(tmp_path, "hellaswag", examples=4)
    assert "train.jsonl: 10 worked examples are needed, 4 are there" in refused("hellaswag", folder)


def test_a_subject_that_the_harness_does_not_know(tmp_path):
    for split in ("test", "dev"):
        write_jsonl(tmp_path / "foxes" / f"{split}.jsonl", [mmlu_row(n) for n in range(5)])
    with pytest.raises(FoxEdgeError, match="the harness has no task 'mmlu_foxes'"):
        load_tasks(HARNESS_TASKS["mmlu"], tmp_path, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": 3}, "'question' is not a text"),
        ({"choices": {"text": ["a"], "label": ["A", "B"]}}, "'choices' is not an object with as many"),
        ({"choices": "ABCD"}, "'choices' is not"),
        ({"answerKey": "E"}, "'answerKey' is not one of the labels"),
    ],
)
def test_rows_are_checked_before_a_model_is_run(tmp_path, change, told):
    rows = [arc_row(1), {**arc_row(2), **change}]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", [arc_row(n) for n in range(30)])
    assert f"{path}, line 2: {told}" in refused("arc-challenge", tmp_path)


@pytest.mark.parametrize(
    ("checks", "row", "told"),
    [
        (lm_eval_data.MMLU, {**mmlu_row(1), "answer": 4}, "'answer' is not a number from 0 to 3"),
        (lm_eval_data.MMLU, {**mmlu_row(1), "answer": True}, "'answer' is not"),
        (lm_eval_data.MMLU, {**mmlu_row(1), "choices": ["a"]}, "'choices' is not a list of four texts"),
        (lm_eval_data.WINOGRANDE, {"sentence": "no gap"}, "'sentence' is not a text with a '_' in it"),
        (lm_eval_data.HELLASWAG, {"activity_label": "x"}, "'ctx_a' is not a text"),
        (lm_eval_data.TRUTHFULQA, {"question": "x", "mc1_targets": {"choices": ["a"], "labels": [2]}}, "mc1"),
        (lm_eval_data.GSM8K, [], "not an object"),
    ],
    ids=range(7),
)
def test_columns_of_each_task_are_checked(tmp_path, checks, row, told):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(FoxEdgeError) as error:
        lm_eval_data.read_rows(path, checks)
    assert f"{path}, line 1: " in str(error.value) and told in str(error.value)


def test_parquet_files_from_strangers(tmp_path):
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1 no such thing")
    with pytest.raises(FoxEdgeError, match=r"test\.parquet: not a readable parquet file"):
        lm_eval_data.read_rows(path, lm_eval_data.GSM8K)
    write_parquet(path, [{"question": "x"}])
    with pytest.raises(FoxEdgeError, match=r"'answer' is not a text|not a readable parquet file"):
        lm_eval_data.read_rows(path, lm_eval_data.GSM8K)
    write_parquet(path, [gsm8k_row(1), gsm8k_row(2)])
    assert lm_eval_data.read_rows(path, lm_eval_data.GSM8K) == [gsm8k_row(1), gsm8k_row(2)]


def test_numbers_and_words_that_cannot_be(tmp_path):
    folder = write_task(tmp_path, "truthfulqa")
    assert "-1 worked examples were asked for" in refused("truthfulqa", folder, shots=-1)
    assert "truthfulqa is 0-shot: its prompt has examples of its own, and 3" in refused(
        "truthfulqa", folder, shots=3
    )
    assert "--train goes with gsm8k" in refused("truthfulqa", folder, train=folder)
    with pytest.raises(FoxEdgeError, match="unknown task 'arc'; known: gsm8k, word-problems, arc-challenge"):
        evaluate(["torch:nano"], task="arc")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"fox-edge\[lm-eval\]"):
        make_harness_task("mmlu", TaskOptions(data=tmp_path))


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        FoxEdgeError, match=r"data of hellaswag cannot be had from the hub \(Couldn't reach the hub\)"
    ):
        load_tasks(HARNESS_TASKS["hellaswag"], None, 10)


def test_the_hub_is_asked_for_every_subject(monkeypatch):
    """What the harness downloads, answered with made-up rows."""
    import datasets

    asked = []

    def download(path, name=None, **kwargs):
        asked.append((path, name))
        made = [mmlu_row(n) for n in range(6)]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(made) for split in ("test", "dev")})

    monkeypatch.setattr("datasets.load_dataset", download)
    tasks = load_tasks(HARNESS_TASKS["mmlu"], None, 3)
    assert len(tasks) == 57 and {path for path, _ in asked} == {"cais/mmlu"}
    assert {name for _, name in asked} == {name.removeprefix("mmlu_") for name in tasks}
    assert all(task.config.num_fewshot == 3 for task in tasks.values())
    counts = {name: len(task.eval_docs) for name, task in tasks.items()}
    assert [*choose(counts, 57, None).values()] == [[0]] * 57


def test_figures_of_a_score_between_right_and_wrong(tmp_path):
    task = make_harness_task("truthfulqa", TaskOptions(data=write_task(tmp_path, "truthfulqa")))
    answers = [{"question": f"truthfulqa_mc2/{n}", "score": score} for n, score in enumerate((0.2, 0.5, 0.8))]
    row = task.graded(
        {"answers": answers, "seconds": 1.0, "counts": {"computed_tokens": 9, "cut_requests": 0}}
    )
    assert (row["n"], row["correct"], row["accuracy_percent"]) == (3, None, pytest.approx(50))
    assert row["ci95_percent"] == [pytest.approx(20), pytest.approx(80)]  # all drawn alike, 1 of 27 each
    rows = [{"artifact": name, "format": "gguf", "runtime": "x", **row} for name in ("a", "b")]
    pair(rows)
    assert rows[1]["paired"]["verdict"] == "not told apart"
    text = evaluate_text({"n": 3, "description": "made up", "results": rows})
    assert "accuracy" in text and "sign-flip" in text
