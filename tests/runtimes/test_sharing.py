"""Several conversations on the same weights, in every runtime: apart from each other, copied to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import GGUF, ONNX, find_recipe
from runtimes.base import SessionOptions, SharingSession, open_model, open_session
from runtimes.torch import TorchSession

OPTIONS = SessionOptions(context=200, threads=1)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(8, 512, 150)]
Opener = Callable[[], SharingSession]


@pytest.fixture(scope="module")
def folders(
    tiny: Checkpoint, tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A small model in every format."""
    folder = tmp_path_factory.mktemp("sharing")
    export_gguf(tiny_256, folder / "gguf", find_recipe(GGUF, "q8_0"))
    export_onnx(tiny, folder / "onnx", find_recipe(ONNX, "float32"))
    # An export that lost its manifest is another tool's, whose graph extends keys and values in place.
    export_onnx(tiny, folder / "in place", find_recipe(ONNX, "float32"))
    for name in (MANIFEST, "config.json", "model.onnx"):
        (folder / "in place" / name).unlink()
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["gguf", "onnx", "pte", "in place", "optimum", "torch"])
def session(
    request: pytest.FixtureRequest, folders: dict[str, Path], tiny: Checkpoint
) -> Iterator[SharingSession]:
    if request.param == "torch":
        opened: SharingSession = TorchSession(tiny, OPTIONS)
    else:
        path = folders.get(request.param) or _from_fixture(request)
        found = open_session(open_model(path), OPTIONS)
        assert isinstance(found, SharingSession)
        opened = found
    with contextlib.closing(opened):
        yield opened


def _from_fixture(request: pytest.FixtureRequest) -> Path:
    """What other tests export too."""
    if request.param == "pte":
        artifact: Artifact = request.getfixturevalue("tiny_pte")
        return artifact.path
    folder: Path = request.getfixturevalue("optimum_folder")
    return folder


def test_another_conversation_is_empty_and_on_its_own(session: SharingSession) -> None:
    alone = [session.prefill(TOKENS[:20]), *(session.step(t) for t in TOKENS[20:24])]
    session.reset()
    other = session.another()
    assert isinstance(other, SharingSession)
    assert (other.context, other.vocab_size, other.length) == (200, session.vocab_size, 0)
    # Token by token in turn with another text, every logit is that of the conversation alone.
    got = [session.prefill(TOKENS[:20])]
    other.prefill(TOKENS[50:90])
    for token in TOKENS[20:24]:
        got.append(session.step(token))
        other.step(token + 1)
    assert np.array_equal(np.stack(got), np.stack(alone))
    assert (session.length, other.length) == (24, 44)
    other.close()


def test_a_prefix_is_copied_to_the_bit(session: SharingSession) -> None:
    session.prefill(TOKENS[:80])
    other = session.another()
    other.prefill(TOKENS[100:130])
    other.copy_prefix(session, 64)
    assert (other.length, session.length) == (64, 80)
    got = [other.prefill(TOKENS[64:80]), *(other.step(t) for t in TOKENS[80:90])]
    # The source goes on untouched, and cut at the same place it says the same.
    session.truncate(64)
    want = [session.prefill(TOKENS[64:80]), *(session.step(t) for t in TOKENS[80:90])]
    assert np.array_equal(np.stack(got), np.stack(want))
    session.copy_prefix(other, 0)
    assert session.length == 0
    other.close()


def test_more_than_there_is_cannot_be_copied(session: SharingSession) -> None:
    session.prefill(TOKENS[:10])
    other = session.another()
    with pytest.raises(FoxEdgeError, match="11 tokens cannot be copied from a conversation of 10"):
        other.copy_prefix(session, 11)
    other.close()


def test_the_last_one_keeps_the_weights(session: SharingSession) -> None:
    want = session.prefill(TOKENS[:10])
    second = session.another()
    third = second.another()
    session.close()
    second.close()
    assert np.array_equal(third.prefill(TOKENS[:10]), want)
    third.close()
    for closed in (session, third):
        with pytest.raises(FoxEdgeError, match="closed"):
            closed.another()
