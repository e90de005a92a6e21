"""The whole study in small on the CPU, peers and all, on a machine that has nothing but what a GPU's has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.study import PARTS

ROOT = Path(__file__).parents[3]
# What a borrowed machine need not have; importing one of them fails as if it were not there.
ABSENT = (
    *("llama_cpp", "gguf", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "optimum", "onnxruntime_genai"),
    *("fastapi", "uvicorn", "llguidance", "ray", "lm_eval", "datasets", "pyarrow", "evaluate"),
)
# All of it in one process: starting twenty takes a minute.
PROGRAM = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import __main__ as command, study
from benchmarks.processes.launch import WorkerError
from fox_edge.errors import FoxEdgeError

torch.set_num_threads(1)

def here(job, timeout_s):
    try:
        return study.run_job(job, lambda done, total: None)
    except FoxEdgeError as error:
        raise WorkerError(str(error)) from None

measure = study.measure
command.measure = lambda *given: measure(*given, work=here)
parts = [word for part in study.PARTS for word in ("--part", part)]
rehearse = ["--shape", "nano", "--device", "cpu", "--seed", "0", "--results", sys.argv[2]]
raise SystemExit(command.main([sys.argv[1], *rehearse, *parts]))
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The results, and what was printed."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} on this machine')\n")
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder / "work", folder / "gpu.json"],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = folder / "gpu.log"
    assert not log.exists(), log.read_text()
    return json.loads((folder / "gpu.json").read_text()), done.stdout


def test_every_part_is_measured(rehearsed: tuple[dict[str, Any], str]) -> None:
    parts = rehearsed[0]["parts"]
    assert set(parts) == {"checkpoint", *PARTS}
    cases = [case for part in parts.values() for case in part.items()]
    errors = {name: found["error"] for name, found in cases if "error" in found}
    assert errors == {}


def test_it_is_exact_here_too(rehearsed: tuple[dict[str, Any], str]) -> None:
    parts = rehearsed[0]["parts"]
    for name in ("logits, nano", "logits, random"):
        found = parts["exact"][name]
        assert found["passed"] and 0 < found["relative_error"] < 1e-2
        assert found["seed"] == 0
        for row in found["ways"]:  # as near to float32 as the reference model in BF16 is
            assert row["relative_error"] < 1.5 * row["bf16_on_cpu_relative_error"], row
        assert [row["way"] for row in found["ways"]] == [
            "all tokens of a prompt",
            "a prompt, then token by token",
            "3 conversations at once",
        ]
    assert parts["exact"]["greedy, nano"]["equal"] == parts["exact"]["greedy, nano"]["prompts"] == 2
    assert all(found["passed"] for found in parts["kernels"].values())


def test_rows_have_rates_with_intervals_and_what_a_token_needs(rehearsed: tuple[dict[str, Any], str]) -> None:
    parts = rehearsed[0]["parts"]
    rows = {**parts["decode"], **parts["prompt"], **parts["users"]}
    for name, row in rows.items():
        assert row["decode_tokens_per_s"] > 0 and row["prompt_tokens_per_s"] > 0, name
        assert len(row["samples"]["decode_tokens_per_s"]) == row["passes"]
        assert row["peak_device_bytes"] is None  # no card
    decode = parts["decode"]
    assert decode["bf16"]["weight_bytes"] > 1.8 * decode["int8"]["weight_bytes"]
    assert decode["int8"]["weight_bytes"] > 1.7 * decode["int4"]["weight_bytes"]
    # Two users share the weights of a pass, not the KV cache.
    alone, together = decode["bf16"]["bytes_per_token"], parts["users"]["bf16, 2 users"]["bytes_per_token"]
    assert together == alone - decode["bf16"]["weight_bytes"] // 2


def test_the_peer_and_the_questions(rehearsed: tuple[dict[str, Any], str]) -> None:
    parts = rehearsed[0]["parts"]
    assert parts["peer"]["generate"]["runtime"].startswith("transformers ")
    assert parts["peer"]["generate"]["decode_tokens_per_s"] > 0
    assert parts["compiled"]["generate"]["cache"] == "static"
    at_once, one_by_one = parts["questions"]["at once"], parts["questions"]["one by one"]
    assert (at_once["at_once"], at_once["questions"], one_by_one["questions"]) == (4, 4, 2)
    assert at_once["answer_tokens"] <= 4 * 6 and at_once["questions_per_s"] > 0
    # The worked examples were read before the clock ran.
    assert 0 < at_once["reused_prompt_tokens"] < at_once["prompt_tokens"]


def test_the_file_says_what_it_is_and_the_table_that_it_is_no_card(
    rehearsed: tuple[dict[str, Any], str],
) -> None:
    results, printed = rehearsed
    assert (results["shape"], results["device"], results["card"]) == ("nano", "cpu", None)
    assert results["command"].startswith("python -m benchmarks.gpu work --shape nano")
    assert results["machine"]["versions"]["torch"]
    floors = results["parts"]["floors"]["card"]
    assert floors["decode_limit_tokens_per_s"] > 0 and floors["prompt_limit_tokens_per_s"] > 0
    assert "a rehearsal without a card" in printed and "not measured" in printed


# --- words -------------------------------------------------------------------------------------------------


def test_the_floors_in_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "work"), "--results", str(tmp_path / "gpu.json"), "--part", "floors"]
    assert command.main([*words, "--shape", "nano", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert set(results["parts"]) == {"checkpoint", "floors"}
    assert results["parts"]["floors"]["card"]["bandwidth"][0]["bytes_per_s"] > 0
    assert {goal["verdict"] for goal in results["goals"]} == {"not measured"}
    capsys.readouterr()
    assert command.main(words) == 2
    assert "--shape nano --device cpu rehearses" in said_once(capsys)  # there is none here
    assert command.main([*words, "--device", "cpu"]) == 2
    assert "holds results of nano on cpu, not of fox-1-1.6b on cpu; name another file" in said_once(capsys)


def said_once(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_without_a_card_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_gpu", lambda: "the NVIDIA driver is too old")
    assert command.main([str(tmp_path / "work"), "--results", str(tmp_path / "x.json")]) == 2
    assert said_once(capsys) == (
        "benchmarks.gpu: the NVIDIA driver is too old; --shape nano --device cpu rehearses without a card\n"
    )
    assert not (tmp_path / "x.json").exists() and not (tmp_path / "work").exists()


@pytest.mark.parametrize("text", ["not json", "[]", '{"rows": []}'])
def test_a_file_of_something_else_is_not_overwritten(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    words = [str(tmp_path / "work"), "--results", str(file), "--shape", "nano", "--device", "cpu"]
    assert command.main(words) == 2
    assert "name another file" in said_once(capsys)
    assert file.read_text() == text
