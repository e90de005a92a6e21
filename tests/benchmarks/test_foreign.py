"""Another tool's export through our own commands: bench, eval and verify take its folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy.evaluate import evaluate
from benchmarks.common.subject import open_subject
from benchmarks.fidelity.verify import FOREIGN_LIMITS, verify_foreign, verify_text
from benchmarks.latency.bench import bench, bench_text
from fox_edge import cli
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import Limits
from runtimes.base import open_model, open_session
from runtimes.onnx.foreign import ForeignOnnx
from tests.helpers import TINY_256, make_checkpoint

MATRIX = 8192 * 256


def verified(folder: Path, checkpoint: Checkpoint, limits: Limits = FOREIGN_LIMITS, **more: Any) -> dict:
    return verify_foreign(ForeignOnnx.open(folder), checkpoint, limits, threads=1, **more)


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"]}


def test_optimums_export_is_the_model_with_two_matrices(optimum_folder: Path, nano: Checkpoint) -> None:
    report = verified(optimum_folder, nano, Limits(mean_kl_nats=1e-6, greedy_tokens=16))
    found = rows(report)
    assert report["passed"] and list(found) == [
        "manifest",
        "tokenizer",
        "special tokens",
        "chat template",
        "tie",
        "logits",
        "greedy text",
    ]
    assert report["top1_agreement_percent"] == 100 and (report["tied_copies"]) == 2
    assert report["second_copy_bytes"] == 4 * MATRIX
    assert [name for name, check in found.items() if check["finding"]] == ["manifest", "tie"]
    assert f"takes {4 * MATRIX:,} bytes besides the {4 * MATRIX:,}" in found["tie"]["detail"]
    text = verify_text(report)
    assert "note  tie " in text and "not checked are the files' sha256" in text and "FAIL" not in text


def test_optimums_int8_is_measured(optimum_int8_folder: Path, nano: Checkpoint) -> None:
    report = verified(optimum_int8_folder, nano, Limits(mean_kl_nats=1e-4, greedy_tokens=0))
    assert not report["passed"] and "the limit is 0.0001" in rows(report)["logits"]["detail"]
    assert report["mean_kl_nats"] > 1e-3 and report["second_copy_bytes"] == MATRIX
    # Which of its figures that is has to be said: fed one by one, the same tokens give other logits.
    assert rows(report)["activations"]["finding"] and "here 64" in rows(report)["activations"]["detail"]
    scored = []
    for tokens in ([*range(100, 130)], [*range(100, 120)]):
        with contextlib.closing(open_session(open_model(optimum_int8_folder))) as session:
            scored.append(next(iter(session.score(tokens)))[:20])
    assert np.abs(scored[0] - scored[1]).max() > 1e-3


def test_another_checkpoint_is_told_apart(optimum_folder: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", TINY_256))
    failed = {name for name, check in rows(verified(optimum_folder, other)).items() if not check["passed"]}
    assert {"tokenizer", "chat template", "logits"} <= failed


def test_token_ids_as_fox_publishes_them_are_found(
    optimum_folder: Path, nano: Checkpoint, tmp_path: Path
) -> None:
    """Fox's published config.json has <bos> and <eos> exchanged; an exporter that copies it is found out."""
    copy = shutil.copytree(optimum_folder, tmp_path / "copy")
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(fields | {"bos_token_id": 1, "eos_token_id": 2}))
    report = verified(copy, nano)
    assert not report["passed"]
    assert rows(report)["special tokens"]["detail"] == "bos is 1 instead of 2; eos is 2 instead of 1"


def test_a_folder_that_lost_its_tokenizer(optimum_folder: Path, nano: Checkpoint, tmp_path: Path) -> None:
    copy = shutil.copytree(optimum_folder, tmp_path / "copy")
    for path in copy.glob("tokenizer.*"):
        path.unlink()
    report = verified(copy, nano)
    assert not report["passed"] and "has no tokenizer.model" in rows(report)["opens"]["detail"]


def test_an_untied_checkpoint_has_no_tie_to_lose(optimum_folder: Path, tmp_path: Path) -> None:
    untied = Checkpoint.open(make_checkpoint(tmp_path / "untied", TINY_256, tied=False))
    tie = rows(verified(optimum_folder, untied))["tie"]
    assert tie["passed"] and not tie["finding"] and tie["detail"] == "the checkpoint is not tied"


def test_verify_from_the_command_line(optimum_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(optimum_folder), "--checkpoint", "nano", "--threads", "1"]
    assert cli.main([*command, "--max-mean-kl", "0.001", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["limits"] == {"mean_kl_nats": 0.001, "greedy_tokens": 0} and report["passed"]
    assert cli.main([*command, "--max-mean-kl", "1e-30"]) == 2
    assert "NOT the model any more" in capsys.readouterr().out


def test_inspect_from_the_command_line(optimum_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(optimum_folder), "--context", "100", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["quant"], result["tied"]) == ("onnx", "float32", False)
    # Keys and values that are made anew lie beside the old ones.
    assert result["memory"]["kv_bytes"] == 2 * 100 * 2 * 8 * 64 * 4
    assert result["memory"]["weights_bytes"] == sum(t["bytes"] for t in result["tensors"])
    assert cli.main(["inspect", str(optimum_folder)]) == 0
    text = capsys.readouterr().out
    assert "two matrices" in text and "NOT verified" in text and f"takes {4 * MATRIX:,} bytes besides" in text
    assert cli.main(["inspect", str(optimum_folder), "--context", "5000"]) == 2
    assert "a context of 5000 was asked for, but it goes up to 1024" in capsys.readouterr().err


def test_chat_from_the_command_line(optimum_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Ann has 3 apples and buys 4 more. How many apples does she have?"
    assert cli.main(["chat", str(optimum_folder), question, "--threads", "1"]) == 0
    assert "#### 7" in capsys.readouterr().out


def test_a_foreign_subject_knows_its_sizes(optimum_folder: Path, nano: Checkpoint) -> None:
    subject = open_subject(optimum_folder)
    assert (subject.runtime, subject.format, subject.quant) == ("onnxruntime", "onnx", "float32")
    assert subject.bits_per_weight == pytest.approx(
        32 * (1 + MATRIX / nano.config.num_parameters()), rel=0.01
    )
    assert subject.context == 1024 and subject.bytes == sum(
        p.stat().st_size for p in optimum_folder.iterdir()
    )
    # One matrix of the two is read whole for a token, and one row of the other.
    keys_and_values = 10 * 2 * 8 * 64 * 4
    assert subject.bytes_per_token(10) == pytest.approx(
        4 * nano.config.num_parameters() + keys_and_values, rel=0.001
    )


def test_bench_and_eval_take_the_folder(optimum_folder: Path) -> None:
    result = bench([optimum_folder], prompt_tokens=40, decode_tokens=4, repeats=1, threads=1)
    [row] = result["results"]
    assert "error" not in row and row["decode_tokens_per_s"] > 0 and row["quant"] == "float32"
    assert str(optimum_folder) in bench_text(result)
    [row] = evaluate([optimum_folder], task="word-problems", limit=2, threads=1)["results"]
    assert row["n"] == 2 and "error" not in row
