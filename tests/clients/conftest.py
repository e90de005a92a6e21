"""Every client opens the same two exports of `nano`, and must give the text that our own runtime gives."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from benchmarks.demo import QUESTION
from export.onnx import export_onnx
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import ONNX, find_recipe
from fox_edge.tokenizer import Tokenizer
from runtimes.base import SessionOptions, open_session
from runtimes.generate import generate
from tests.clients.helpers import Asked


@pytest.fixture(scope="session", params=["int8", "int4"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """An export, a question, and the greedy answer of our own runtime."""
    return ask_our_own(request.param, tmp_path_factory.mktemp("clients"))


def ask_our_own(quant: str, folder: Path) -> Asked:
    artifact = export_onnx(Checkpoint.open("nano"), folder / f"nano-{quant}", find_recipe(ONNX, quant))
    tokenizer = Tokenizer.from_folder(artifact.path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    with contextlib.closing(open_session(artifact, SessionOptions(threads=1))) as session:
        answer = list(generate(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=200))
    assert Artifact.open(artifact.path).manifest.quant == quant
    assert "####" in tokenizer.decode(answer) and len(answer) > 30
    return Asked(artifact.path, QUESTION, prompt, answer, tokenizer.decode(answer))
