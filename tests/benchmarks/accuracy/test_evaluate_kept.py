"""Runs that keep their answers: killed and gone on with, asked other things, and without room for them."""

import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks.accuracy import gsm8k
from benchmarks.accuracy.answers_log import AnswersLog
from benchmarks.accuracy.evaluate import evaluate
from benchmarks.processes import launch
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.harness_data import gsm8k_row, rows, write_jsonl


def keeping(tmp_path, count=4):
    """Options of an evaluation of nano on made-up questions that keeps its answers."""
    tmp_path.mkdir(exist_ok=True)
    data = write_jsonl(tmp_path / "test.jsonl", rows(gsm8k_row, 3, count))
    path = tmp_path / "answers.jsonl"
    return {"limit": count, "shots": 1, "data": data, "train": data, "threads": 1, "answers": path}


def killed_after(answers: int):
    """`run_worker`, whose first worker is killed once it has told of so many answers."""
    done = []

    def run(job, progress):
        def told(count, total):
            progress(count, total)
            if count == answers and not done:
                done.append(True)
                os.kill(process.pid, signal.SIGKILL)

        made = []
        real = launch.subprocess.Popen

        def start(*args, **kwargs):
            made.append(real(*args, **kwargs))
            return made[-1]

        class Held:
            @property
            def pid(self):
                return made[-1].pid

        process = Held()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch.subprocess, "Popen", start)
            return launch.run_worker(job, told)

    return run


def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not(tmp_path, monkeypatch, nano):
    """The worker is killed after its second answer; its row says so, and the next run asks the rest."""
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 8)
    options = keeping(tmp_path)
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", killed_after(2))
    killed, straight = evaluate(["torch:nano", f"torch:{nano.path}"], **options)["results"]
    assert "killed by SIGKILL" in killed["error"] and "(after 2 of 4 questions)" in killed["error"]
    assert (straight["n"], straight["taken_over"]) == (4, 0)  # the others go on
    monkeypatch.undo()
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 8)
    kept = options["answers"].read_bytes()
    options["answers"].write_bytes(kept + b'{"artifact": "torch:nano", "ques')  # a kill in mid-line
    [resumed] = evaluate(["torch:nano"], **options)["results"]
    assert 2 <= resumed["taken_over"] < 4 and resumed["n"] == 4
    assert options["answers"].read_bytes().startswith(kept)
    assert resumed["answers"] == straight["answers"]  # the same model under another name
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", None)  # nothing is left to ask
    [read] = evaluate(["torch:nano"], **options)["results"]
    assert (read["answers"], read["taken_over"]) == (straight["answers"], 4)
    lines = [json.loads(line) for line in options["answers"].read_text().splitlines()]
    answers = [line for line in lines if line["artifact"] == "torch:nano" and "question" in line]
    assert sorted(line["question"] for line in answers) == ["0", "1", "2", "3"]
    wanted = {"prompt_sha256", "text", "extracted", "right", "flexible", "answer_tokens", "seconds"}
    assert all(wanted <= set(line) for line in answers)


def fake_answers(job):
    said = {"text": "#### 1", "cut": False, "prompt_tokens": 1, "reused_tokens": 0, "seconds": 0.0}
    return {"answers": [said] * (len(job["prompts"]) - len(job["skip"])), "seconds": 0.0}


def test_other_questions_in_the_file_are_told_before_anything_is_run(tmp_path, monkeypatch):
    options = keeping(tmp_path)
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", lambda job, told: fake_answers(job))
    evaluate(["torch:nano"], **options)
    with pytest.raises(
        FoxEdgeError, match="given under seed null, but this run has seed 1; name another file"
    ):
        evaluate(["torch:nano"], **options, seed=1)
    with pytest.raises(FoxEdgeError, match=r"shots 1.*shots 0"):
        evaluate(["torch:nano"], **{**options, "shots": 0})
    with pytest.raises(FoxEdgeError, match="options"):
        evaluate(["torch:nano"], **options, session={"kv": "float32"})
    assert evaluate(["torch:nano"], **{**options, "limit": 2})["n"] == 2  # fewer or more are the same run


def test_no_room_for_the_answers_and_two_runs_at_once_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", lambda job, told: fake_answers(job))
    options = keeping(tmp_path)
    with pytest.raises(FoxEdgeError, match=r"^/dev/full: cannot be written \(No space left on device\)$"):
        evaluate(["torch:nano"], **{**options, "answers": Path("/dev/full")})
    with (
        AnswersLog(options["answers"]),
        pytest.raises(FoxEdgeError, match="another run is writing its answers there"),
    ):
        evaluate(["torch:nano"], **options)
