"""The benchmark of the shared prefix: what it counts, on made-up questions and a worker that is not there."""

import json
import sys

import pytest

from benchmarks import prefix_gain
from benchmarks.accuracy.tasks import TaskOptions
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.harness_data import gsm8k_row, rows, write_jsonl


@pytest.fixture
def files(tmp_path):
    data = write_jsonl(tmp_path / "test.jsonl", rows(gsm8k_row, 3, 4))
    return data, write_jsonl(tmp_path / "train.jsonl", rows(gsm8k_row, 20, 5))


def worker(told):
    """Answers in 1 s with reuse and 4 s without, later rounds a little longer; every other one is right."""

    def run(job):
        told.append(job)
        reuse = bool(job["shared"])
        late = 0.1 * (len(told) > 2)
        answers = [
            {
                "text": f"#### {6 + 2 * n if n % 2 == 0 else 0}",
                "prompt_tokens": 100,
                "reused_tokens": 80 if reuse and n else 0,
                "answer_tokens": 10,
                "first_token_s": 0.05 if reuse else 0.5,
            }
            for n in range(len(job["prompts"]))
        ]
        return {"answers": answers, "seconds": (1.0 if reuse else 4.0) + late}

    return run


def test_both_ways_are_run_in_turn_on_the_same_questions(files, monkeypatch):
    told = []
    monkeypatch.setattr(prefix_gain, "run_worker", worker(told))
    options = TaskOptions(4, 5, *files)
    result = prefix_gain.prefix_gain(["torch:nano"], options, max_tokens=9, repeats=3, threads=1)
    result = json.loads(json.dumps(result))
    assert [bool(job["shared"]) for job in told] == [True, False] * 3
    assert all(job["prompts"] == told[0]["prompts"] and job["max_tokens"] == 9 for job in told)
    assert told[0]["prompts"][0].startswith(told[0]["shared"]) and told[0]["shared"].count("Question:") == 5
    [row] = result["results"]
    assert (row["reused"]["seconds"], row["whole"]["seconds"]) == (1.1, 4.1)  # medians
    assert row["times_faster"] == pytest.approx(4.1 / 1.1) and row["reached"]
    assert row["prompt_times_faster"] == pytest.approx(10)
    assert (row["reused"]["prompt_tokens_run"], row["whole"]["prompt_tokens_run"]) == (160, 400)
    assert row["reused"]["correct"] == 2 and row["reused"]["answer_tokens"] == 40
    text = prefix_gain.prefix_gain_text(result)
    assert "400 / 160" in text and "3.73" in text


def test_questions_are_also_answered_together_where_the_runtime_can(files, monkeypatch, tmp_path, checkpoint):
    from export.gguf import export_gguf
    from fox_edge.quant import GGUF, find_recipe

    artifact = export_gguf(checkpoint, tmp_path / "out", find_recipe(GGUF, "int8"))
    told = []
    monkeypatch.setattr(prefix_gain, "run_worker", worker(told))
    specs = [str(artifact.path), "torch:nano"]
    options = TaskOptions(4, 5, *files)
    result = prefix_gain.prefix_gain(specs, options, max_tokens=9, repeats=2, threads=1, batch=3)
    ways = [(job["subject"] == "torch:nano", bool(job["shared"]), job.get("at_once", 1)) for job in told]
    whole, reused, together = (False, False, 1), (False, True, 1), (False, True, 3)
    assert ways == [reused, whole, together] * 2 + [(True, True, 1), (True, False, 1)] * 2
    ours, torch = result["results"]
    seconds = ours["together"]["seconds"]
    assert ours["together_times_faster"] == ours["whole"]["seconds"] / seconds
    assert "together" not in torch and result["batch"] == 3
    assert "and together" in prefix_gain.prefix_gain_text(result)


def test_what_cannot_be_measured(files, monkeypatch, capsys):
    with pytest.raises(FoxEdgeError, match="nothing to reuse"):
        prefix_gain.prefix_gain(
            ["torch:nano"], TaskOptions(4, 0, *files), max_tokens=None, repeats=1, threads=1
        )
    data, train = map(str, files)
    for words in (["torch:none"], ["torch:nano", "--questions", "0"]):
        monkeypatch.setattr(sys, "argv", ["prefix_gain", *words, "--data", data, "--train", train])
        assert prefix_gain.main() == 2
    assert "Traceback" not in capsys.readouterr().err
