"""The user's words: cuda:..., cuda-int8:... and cuda-int4:... wherever a model can be named, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.common.subject import open_subject
from benchmarks.latency import measure
from export.onnx import export_onnx
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.cli import main
from fox_edge.quant import ONNX, find_recipe
from runtimes.base import SessionOptions
from runtimes.chat.model import find_chat_model
from runtimes.cuda.session import CudaInt4Session, CudaInt8Session, CudaSession
from runtimes.server.server import ServeOptions, open_service

QUESTION = "Tom has 3 apples and buys 5 more. How many apples does he have?"
ON_CPU = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def artifact(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("commands") / "int8"
    return export_onnx(nano, folder, find_recipe(ONNX, "int8"), rounding="nearest")


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_a_chat_says_what_the_reference_says(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    want = said(["chat", "torch:nano", QUESTION, "--threads", "1"], capsys)
    assert len(want) > 20
    assert said(["chat", "cuda:nano", QUESTION, *ON_CPU], capsys) == want
    assert said(["chat", f"cuda:{artifact.path}", QUESTION, *ON_CPU], capsys) == want
    assert said(["chat", "cuda-int4:nano", QUESTION, *ON_CPU], capsys)


def test_without_a_gpu_a_chat_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["chat", "cuda:nano", QUESTION]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fox-edge chat: the checkpoint nano cannot be opened on a GPU: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "kind", "quant", "least", "most"),
    [
        ("cuda:", CudaSession, "bf16", 16, 16.1),
        ("cuda-int8:", CudaInt8Session, "int8", 8.2, 8.4),
        ("cuda-int4:", CudaInt4Session, "int4", 4.5, 4.7),
    ],
)
def test_a_subject_weighs_what_lies_on_the_device(
    word: str, kind: type, quant: str, least: float, most: float
) -> None:
    subject = open_subject(f"{word}nano")
    assert (subject.runtime, subject.quant, subject.target) == ("cuda", quant, "nano")
    assert subject.bits_per_weight is not None and least <= subject.bits_per_weight <= most
    assert subject.kv_bytes_per_position == 2 * 2 * 8 * 64  # BF16, keys and values, of one head
    with_options = subject.open_session(SessionOptions(device="cpu", context=32))
    assert type(with_options) is kind
    with_options.close()


def test_an_artifact_s_subject(artifact: Artifact, tiny_untied: Checkpoint) -> None:
    subject = open_subject(f"cuda:{artifact.path}")
    assert (subject.runtime, subject.format, subject.quant) == ("cuda", "onnx", "int8")
    assert subject.kv_bytes_per_position == 2048
    assert abs(subject.weight_bytes / artifact.manifest.weight_bytes - 1) < 0.01
    # Of an untied embedding, a token reads one row.
    untied = open_subject(f"cuda:{tiny_untied.path}")
    assert untied.unread_bytes == 2 * 511 * 64


def test_a_served_model_has_slots_and_a_card(artifact: Artifact) -> None:
    spec = f"cuda:{artifact.path}"
    model = find_chat_model(spec)
    service = open_service(model, spec, SessionOptions(device="cpu", context=128), ServeOptions(slots=3))
    try:
        assert service.name == "int8"
        assert service.card["runtime"] == "cuda" and service.card["quant"] == "int8"
        assert service.card["bytes"] == artifact.total_bytes()
        assert service.engine.slots == 3
    finally:
        service.engine.close()


def test_two_users_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURE_S", 0.0)
    waves = [[[[2, 100, 200, 300]], [[2, 100, 200]]]]
    job = {"subject": "cuda:nano", "context": 64, "threads": 1, "waves": waves, "decode_tokens": 4}
    job |= {"page_cache": "warm", "session": {"device": "cpu"}}
    found = measure.run_job(job, lambda *_: None)
    assert found["decode_tokens_per_s"] > 0 and found["output_tokens"] == 10


def test_questions_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--task", "word-problems", "--limit", "2", "--batch", "2"]
    found = json.loads(said(["eval", "cuda:nano", *asked, *ON_CPU, "--json"], capsys))
    assert found["results"][0]["n"] == 2
