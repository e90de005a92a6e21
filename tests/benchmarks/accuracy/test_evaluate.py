"""Answers graded, in pairs with the reference's, told in a table; and the whole in real worker processes."""

import json
from pathlib import Path

from benchmarks.accuracy import gsm8k
from benchmarks.accuracy.evaluate import evaluate, evaluate_text, grade, pair
from benchmarks.common.table import WIDTH
from fox_edge.cli import main
from tests.benchmarks.harness_data import gsm8k_row, write_jsonl


def test_grading_compares_strings():
    texts = ["#### 18", "#### 18.", "18", "#### 1,800"]
    answers = [{"text": t, "cut": False, "prompt_tokens": 9, "reused_tokens": 4} for t in texts]
    graded = grade(answers, ["18", "18", "18", "1800"])
    assert [a["right"] for a in graded["answers"]] == [True, False, False, True]
    assert (graded["correct"], graded["n"], graded["accuracy_percent"]) == (2, 4, 50.0)
    assert (graded["strict_correct"], graded["flexible_correct"], graded["flexible_percent"]) == (2, 4, 100.0)
    assert (graded["prompt_tokens"], graded["reused_prompt_tokens"]) == (36, 16)


def table(won: int, lost: int, both: int, neither: int):
    """Two rows as `evaluate` makes them: the reference first, the other right alone `won` times."""
    pairs = [(0, 1)] * won + [(1, 0)] * lost + [(1, 1)] * both + [(0, 0)] * neither

    def answered(name, format, right):
        texts = ["#### 18" if ok else "#### 19" for ok in right]
        said = [{"text": t, "cut": False, "prompt_tokens": 9, "reused_tokens": 4} for t in texts]
        fields = {"artifact": name, "format": format, "runtime": "x", "quant": "y", "seconds": 1.0}
        return {**fields, **grade(said, ["18"] * len(said))}

    first, second = zip(*pairs, strict=True)
    rows = [answered("other", "gguf", second), answered("reference", "torch", first)]
    pair(rows)
    return {"n": len(pairs), "seed": 3, "description": "made up", "results": rows}


def test_a_table_says_better_only_where_the_answers_do():
    clear = table(won=14, lost=2, both=20, neither=14)
    assert clear["results"][0]["paired"]["verdict"] == "better"
    text = evaluate_text(clear)
    assert " better" in text and "more questions" not in text and "+24.0 (+" in text
    assert text.startswith("50 questions, drawn by seed 3: made up")
    close = table(won=6, lost=3, both=21, neither=20)
    text = evaluate_text(close)
    more = close["results"][0]["paired"]["questions_to_settle"]
    assert " better" not in text and "not told apart" in text
    assert f"other: about {more:,} more questions would settle a difference of +6.0 points" in text


def test_evaluation_in_fresh_processes(checkpoint, tmp_path, monkeypatch):
    from tests.benchmarks.latency.test_bench import write_artifact

    broken = write_artifact(tmp_path / "broken", checkpoint)
    spec = f"torch:{checkpoint.path}"
    data = write_jsonl(tmp_path / "test.jsonl", [gsm8k_row(3), gsm8k_row(4), gsm8k_row(5)])
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 8)  # random weights never stop by themselves
    result = evaluate(
        [broken.path, spec, spec], task="gsm8k", limit=2, shots=1, data=data, train=data, threads=1
    )
    result = json.loads(json.dumps(result))
    failed, reference, same = result["results"]
    assert "model.gguf" in failed["error"]
    assert (result["task"], result["n"], reference["n"]) == ("gsm8k", 2, 2)
    assert (
        0
        <= reference["ci95_percent"][0]
        <= reference["accuracy_percent"]
        <= reference["ci95_percent"][1]
        <= 100
    )
    assert reference["paired_p"] is None and reference["paired"] is None
    assert (same["paired_with"], same["paired_p"]) == (spec, 1.0)
    assert same["paired"]["with"] == spec and same["paired"]["verdict"] == "not told apart"
    assert same["paired"]["questions_to_settle"] is None
    assert (result["question_ids"], result["seed"], result["shots"]) == (["0", "1"], None, 1)
    assert [a["text"] for a in same["answers"]] == [a["text"] for a in reference["answers"]]
    assert reference["reused_prompt_tokens"] > 10
    text = evaluate_text(result)
    assert failed["error"] in text
    assert "strict" in text and "flexible" in text and "not told apart" in text
    assert "as many right as" in text
    assert max(map(len, text.splitlines()[1:5])) <= WIDTH


def test_the_verb_takes_seed_shots_and_answers(tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(
        "benchmarks.accuracy.evaluate.evaluate",
        lambda artifacts, **options: asked.update(options) or {"results": []},
    )
    assert main(["eval", "torch:nano", "--seed", "3", "--answers", "a.jsonl", "--json"]) == 0
    assert (asked["seed"], asked["shots"], asked["answers"]) == (3, None, Path("a.jsonl"))
    monkeypatch.undo()
    data = write_jsonl(tmp_path / "test.jsonl", [gsm8k_row(1), "broken"])
    assert main(["eval", "torch:nano", "--data", str(data), "--train", str(data), "--seed", "0"]) == 2
    said = capsys.readouterr().err
    assert f"{data}, line 2: not JSON" in said and "Traceback" not in said
