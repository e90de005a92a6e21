"""Every client opens the same two exports of `nano`, and must give the text that our own runtime gives."""

from __future__ import annotations

import contextlib

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


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """An export of each preset, a question, and the greedy answer of our own runtime."""
    folder = tmp_path_factory.mktemp("clients")
    nano = Checkpoint.open("nano")
    return {
        quant: ask_our_own(export_onnx(nano, folder / f"nano-{quant}", find_recipe(ONNX, quant)))
        for quant in ("int8", "int4")
    }


@pytest.fixture(params=["int8", "int4"])
def asked(request: pytest.FixtureRequest, answers: dict[str, Asked]) -> Asked:
    """One of them after the other."""
    return answers[request.param]


@pytest.fixture
def exported(answers: dict[str, Asked]) -> Artifact:
    """One of them, where it does not matter which."""
    return Artifact.open(answers["int4"].folder)


def ask_our_own(artifact: Artifact) -> Asked:
    """The question, put to the runtime that opens an artifact here."""
    tokenizer = Tokenizer.from_folder(artifact.path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    with contextlib.closing(open_session(artifact, SessionOptions(threads=1))) as session:
        answer = list(generate(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=200))
    assert "####" in tokenizer.decode(answer) and len(answer) > 30
    return Asked(artifact.path, QUESTION, prompt, answer, tokenizer.decode(answer))
