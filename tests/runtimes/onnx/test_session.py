"""The onnxruntime session: the same logits however the tokens arrive, one tied matrix in memory."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import runtimes.onnx.session
from export.onnx import DATA_FILE, MODEL_FILE, export_onnx
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError
from fox_edge.quant import ONNX, find_recipe
from runtimes.base import SCORE_CHUNK, Session, SessionOptions, open_session
from runtimes.onnx.session import OnnxSession
from tests.helpers import TINY, random_tensors

TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, TINY.vocab_size, 200)]


@pytest.fixture(scope="module")
def artifact(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_onnx(tiny, tmp_path_factory.mktemp("onnx") / "float32", find_recipe(ONNX, "float32"))


@pytest.fixture(scope="module")
def want(tiny: Checkpoint) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = tiny.load_model()(torch.tensor([TOKENS]))[0].numpy()
    return logits


@pytest.fixture
def session(artifact: Artifact) -> OnnxSession:
    return OnnxSession(artifact, SessionOptions(threads=1))


def test_it_is_a_session(artifact: Artifact) -> None:
    opened = open_session(artifact)
    assert isinstance(opened, OnnxSession) and isinstance(opened, Session)
    assert (opened.context, opened.vocab_size, opened.length) == (TINY.max_positions, TINY.vocab_size, 0)


def test_whole_chunks_and_steps_agree(
    session: OnnxSession, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.testing.assert_allclose(session.prefill(TOKENS), want[-1], atol=1e-4)
    session.reset()
    monkeypatch.setattr(runtimes.onnx.session, "PREFILL_CHUNK", 37)
    np.testing.assert_allclose(session.prefill(TOKENS), want[-1], atol=1e-4)
    session.reset()
    for place, token in enumerate(TOKENS[:60]):
        np.testing.assert_allclose(session.step(token), want[place], atol=1e-4)
    np.testing.assert_allclose(session.prefill(TOKENS[60:170]), want[169], atol=1e-4)
    np.testing.assert_allclose(session.step(TOKENS[170]), want[170], atol=1e-4)
    assert session.length == 171


@pytest.mark.parametrize("start", [0, 1, 63, 64, 150, 199, 200])
def test_score(start: int, session: OnnxSession, want: np.ndarray) -> None:
    chunks = list(session.score(TOKENS, start))
    assert all(len(chunk) <= SCORE_CHUNK for chunk in chunks)
    rows = np.concatenate([np.empty((0, TINY.vocab_size), np.float32), *chunks])
    np.testing.assert_allclose(rows, want[start:], atol=1e-4)
    assert session.length == len(TOKENS)


def test_score_continues_what_is_cached(session: OnnxSession, want: np.ndarray) -> None:
    session.prefill(TOKENS[:50])
    np.testing.assert_allclose(np.concatenate(list(session.score(TOKENS[50:]))), want[50:], atol=1e-4)


def test_truncate_and_reset(session: OnnxSession, want: np.ndarray) -> None:
    session.prefill([*TOKENS[:100], 1, 2, 3])
    session.truncate(100)
    np.testing.assert_allclose(session.prefill(TOKENS[100:150]), want[149], atol=1e-4)
    session.truncate(500)
    assert session.length == 150
    session.reset()
    assert session.length == 0
    np.testing.assert_allclose(session.step(TOKENS[0]), want[0], atol=1e-4)


def test_logits_belong_to_the_caller(session: OnnxSession) -> None:
    first = session.step(TOKENS[0])
    kept = first.copy()
    session.step(TOKENS[1])
    np.testing.assert_array_equal(first, kept)


def test_a_prompt_longer_than_the_context(artifact: Artifact, want: np.ndarray) -> None:
    session = OnnxSession(artifact, SessionOptions(context=64, threads=1))
    session.prefill(TOKENS[:60])
    for attempt in (session.prefill, session.score):
        with pytest.raises(ContextOverflowError, match="60 tokens and 5 more do not fit a context of 64"):
            attempt(TOKENS[60:65])
    np.testing.assert_allclose(session.prefill(TOKENS[60:64]), want[63], atol=1e-4)
    with pytest.raises(ContextOverflowError, match="64 tokens and 1 more"):
        session.step(0)


@pytest.mark.parametrize("context", [0, -1, 257])
def test_a_context_that_the_model_does_not_have(context: int, artifact: Artifact) -> None:
    with pytest.raises(ContextOverflowError, match=f"{context} positions .* has 1 to 256"):
        OnnxSession(artifact, SessionOptions(context=context))


def test_tokens_that_are_none(session: OnnxSession) -> None:
    with pytest.raises(FoxEdgeError, match="-1 to 5 are not all in a vocabulary of 512"):
        session.prefill([5, -1])
    with pytest.raises(FoxEdgeError, match="512 to 512"):
        session.step(512)
    with pytest.raises(FoxEdgeError, match="at least one token"):
        session.prefill([])
    assert session.length == 0


def test_a_closed_session_says_so(session: OnnxSession) -> None:
    session.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        session.step(1)


# --- damaged and hostile artifacts --------------------------------------------------------------------------


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Artifact:
    """A copy of the artifact that a test may damage."""
    shutil.copytree(artifact.path, tmp_path / "copy")
    return Artifact(tmp_path / "copy", artifact.manifest)


def test_a_missing_data_file(copy: Artifact) -> None:
    (copy.path / DATA_FILE).unlink()
    with pytest.raises(ArtifactError, match=rf"{DATA_FILE}: missing, but tensor '.*' is in it"):
        OnnxSession(copy)


def test_a_short_data_file(copy: Artifact) -> None:
    size = (copy.path / DATA_FILE).stat().st_size
    os.truncate(copy.path / DATA_FILE, size - 1)
    with pytest.raises(ArtifactError, match=rf"but the file has {size - 1}"):
        OnnxSession(copy)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000)])
def test_a_model_file_that_is_none(content: bytes, copy: Artifact) -> None:
    copy.model_path.write_bytes(content)
    with pytest.raises(ArtifactError, match=MODEL_FILE):
        OnnxSession(copy)


def test_a_model_file_beyond_bounds(copy: Artifact) -> None:
    os.truncate(copy.model_path, 3 << 30)
    with pytest.raises(ArtifactError, match="3221225472 bytes, but a model file has at most 2147483648"):
        OnnxSession(copy)


def test_a_graph_that_onnxruntime_refuses(copy: Artifact) -> None:
    model = onnx.load(copy.model_path, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, copy.model_path)
    with pytest.raises(ArtifactError, match=r"onnxruntime cannot open it \(.*NoSuchOperator"):
        OnnxSession(copy)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("location", "../outside", "names data in '../outside', which is no file of this folder"),
        ("location", "/etc/hostname", "names data in '/etc/hostname', which is no file of this folder"),
        ("location", "sub/x", "which is no file of this folder"),
        ("location", "link", "which is no file of this folder"),
        ("location", "gone", "gone: missing, but tensor"),
        ("offset", "-8", "has no offset and length"),
        ("offset", "99999999999", "from 99999999999 on, but the file has"),
        ("length", "8", "needs .* bytes and names 8"),
        ("length", "9" * 30, "has no offset and length"),
    ],
)
def test_data_that_a_graph_may_not_name(key: str, value: str, sentence: str, copy: Artifact) -> None:
    (copy.path.parent / "outside").write_bytes(bytes(1 << 20))
    (copy.path / "link").symlink_to(copy.path.parent / "outside")
    model = onnx.load(copy.model_path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    # Hidden where a reader of initializers alone would miss it.
    model.graph.node[3].attribute.add(name="hidden", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    model.graph.initializer.remove(tensor)
    onnx.save(model, copy.model_path)
    with pytest.raises(ArtifactError, match=sentence):
        OnnxSession(copy)


@pytest.mark.parametrize("key", ["prepacked_0", "location"])
def test_data_that_a_graph_names_twice_or_otherwise(key: str, copy: Artifact) -> None:
    model = onnx.load(copy.model_path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key=key, value="MatMulNBits+1|99999999999;8;0")
    onnx.save(model, copy.model_path)
    with pytest.raises(ArtifactError, match=f"says where its data are with .*{key}"):
        OnnxSession(copy)


def test_dimensions_that_lie(copy: Artifact) -> None:
    model = onnx.load(copy.model_path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.dims[0] = 1 << 60
    onnx.save(model, copy.model_path)
    with pytest.raises(ArtifactError, match=r"needs .* bytes and names"):
        OnnxSession(copy)


# --- memory -------------------------------------------------------------------------------------------------

# What opening a session adds to a fresh process's own memory, in bytes.
_MEASURE = """
import re, resource, sys
from pathlib import Path
from fox_edge.artifact import Artifact
from runtimes.base import SessionOptions
from runtimes.onnx.session import OnnxSession

def own() -> int:
    smaps = Path("/proc/self/smaps_rollup")
    if smaps.exists():
        return 1024 * int(re.search(r"Anonymous: +([0-9]+) kB", smaps.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

artifact = Artifact.open(Path(sys.argv[1]))
before = own()
session = OnnxSession(artifact, SessionOptions(context=8, threads=1))
session.prefill([1, 2, 3])
print(own() - before)
"""


@pytest.mark.parametrize("quant", ["q8s128", "q4a128"])
def test_the_tied_matrix_is_in_memory_once(quant: str, tiny: Checkpoint, tmp_path: Path) -> None:
    """Embedding and head dominate this model; a second copy would double what the session takes."""
    config = dataclasses.replace(TINY, vocab_size=65_536, hidden_size=512, num_layers=1)
    tensors = random_tensors(config).items()
    write_checkpoint(tmp_path / "in", config, tensors, tiny.tokenizer_files())
    artifact = export_onnx(Checkpoint.open(tmp_path / "in"), tmp_path / "out", find_recipe(ONNX, quant))
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(artifact.path)], capture_output=True, text=True, check=True
    )
    matrix = artifact.manifest.tensors[0].bytes
    assert 0.5 * matrix < int(measured.stdout) < 1.5 * matrix


# What a prompt adds to the peak of a process whose session has run a chunk, in bytes.
_PROMPT = """
import re, sys
from pathlib import Path
from fox_edge.artifact import Artifact
from runtimes.base import SessionOptions
from runtimes.onnx.session import PREFILL_CHUNK, OnnxSession

def peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])

session = OnnxSession(Artifact.open(Path(sys.argv[1])), SessionOptions(threads=1))
session.prefill([1] * PREFILL_CHUNK)
before = peak()
session.prefill([2] * 3800)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_long_prompt_takes_no_more_than_a_chunk(tiny: Checkpoint, tmp_path: Path) -> None:
    """3,800 tokens at once would hold several times (3,800 x 4,096) float32, 62 MB each."""
    config = dataclasses.replace(TINY, intermediate_size=2048, num_layers=1, max_positions=4096)
    write_checkpoint(tmp_path / "in", config, random_tensors(config).items(), tiny.tokenizer_files())
    artifact = export_onnx(Checkpoint.open(tmp_path / "in"), tmp_path / "out", find_recipe(ONNX, "float32"))
    measured = subprocess.run(
        [sys.executable, "-c", _PROMPT, str(artifact.path)], capture_output=True, text=True, check=True
    )
    cache = 3800 * config.kv_bytes_per_token * 2
    assert int(measured.stdout) < cache + 20_000_000
