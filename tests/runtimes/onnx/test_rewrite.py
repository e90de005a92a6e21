"""Settings chosen at opening: what they change in the graph, in the logits and in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.onnx import export_onnx
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.errors import ArtifactError, FoxEdgeError, NotEnoughMemoryError
from fox_edge.nano.problems import held_out
from fox_edge.quant import ONNX, find_recipe
from runtimes import memory
from runtimes.artifact_cache import FOLDER
from runtimes.base import SessionOptions
from runtimes.llama_cpp.session import LlamaCppSession
from runtimes.onnx import kv as onnx_kv
from runtimes.onnx.external import read_graph
from runtimes.onnx.rewrite import quantize_kv, set_accuracy_level
from runtimes.onnx.session import OnnxSession, memory_need
from runtimes.torch import TorchSession
from tests.helpers import TINY_256, random_tensors


@pytest.fixture(scope="module")
def artifact(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_onnx(nano, tmp_path_factory.mktemp("rewrite") / "out", find_recipe(ONNX, "q8s128"))


@pytest.fixture(scope="module")
def tokens(nano: Checkpoint) -> list[int]:
    text = "\n\n".join(f"{p.question}\n{p.answer}" for p in held_out(4))
    return nano.tokenizer().encode(text, bos=True)[:300]


def score(artifact: Artifact, tokens: list[int], **options: object) -> np.ndarray:
    session = OnnxSession(artifact, SessionOptions(threads=1, context=320, **options))  # type: ignore[arg-type]
    rows = np.concatenate(list(session.score(tokens)))
    session.close()
    return rows


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# --- accuracy level -----------------------------------------------------------------------------------------


def test_the_accuracy_level_is_chosen_at_opening(artifact: Artifact, tokens: list[int]) -> None:
    exported, float_, int8 = (score(artifact, tokens, accuracy_level=level) for level in (None, 1, 4))
    np.testing.assert_array_equal(exported, int8)
    # Rounding activations to int8 costs something, and not much.
    assert 1e-6 < mean_kl(float_, int8) < 0.02


@pytest.mark.parametrize("level", [0, 2, 5])
def test_an_accuracy_level_that_is_none(level: int, artifact: Artifact) -> None:
    with pytest.raises(FoxEdgeError, match=f"accuracy level {level} is none of 1, 4"):
        OnnxSession(artifact, SessionOptions(accuracy_level=level))


def test_the_level_is_set_on_every_product_and_nothing_else(artifact: Artifact) -> None:
    model = onnx.load(artifact.model_path, load_external_data=False)
    before = onnx.ModelProto()
    before.CopyFrom(model)
    set_accuracy_level(model, 1)
    for node, old in zip(model.graph.node, before.graph.node, strict=True):
        levels = [a.i for a in node.attribute if a.name == "accuracy_level"]
        assert levels == ([1] if node.op_type == "MatMulNBits" else [])
        assert len(node.attribute) == len(old.attribute)
    set_accuracy_level(model, 4)
    assert {n.name: {a.name: a.i for a in n.attribute} for n in model.graph.node} == {
        n.name: {a.name: a.i for a in n.attribute} for n in before.graph.node
    }


# --- int8 KV cache ------------------------------------------------------------------------------------------


def test_an_int8_cache_is_nearly_the_same_model(artifact: Artifact, tokens: list[int]) -> None:
    exact, rounded = score(artifact, tokens), score(artifact, tokens, kv="int8")
    assert 1e-7 < mean_kl(exact, rounded) < 0.003
    assert np.mean(exact.argmax(-1) == rounded.argmax(-1)) > 0.97


def test_an_int8_cache_takes_a_quarter(artifact: Artifact, tokens: list[int]) -> None:
    sizes = {}
    for kv in ("float32", "int8"):
        session = OnnxSession(artifact, SessionOptions(threads=1, context=320, kv=kv))
        session.prefill(tokens)
        sizes[kv] = sum(held.nbytes for held in session._buffers.values())
        assert {held.dtype for held in session._buffers.values()} == {np.dtype(kv)}
    config = TINY_256.read(artifact.path / "config.json")
    assert sizes["float32"] == 4 * sizes["int8"] == 2 * config.kv_bytes_per_token * 320


def test_an_int8_cache_is_written_in_place_however_tokens_arrive(
    artifact: Artifact, tokens: list[int]
) -> None:
    session = OnnxSession(artifact, SessionOptions(threads=1, context=320, kv="int8"))
    whole = session.prefill(tokens[:100])
    held = {name: value.copy() for name, value in session._buffers.items()}
    assert all(value[:, :, :100].any(axis=-1).all() for value in held.values())
    assert not any(value[:, :, 100:].any() for value in held.values())
    session.reset()
    session.prefill(tokens[:60])
    for token in tokens[60:99]:
        session.step(token)
    np.testing.assert_allclose(session.step(tokens[99]), whole, atol=0.2)
    session.truncate(50)
    np.testing.assert_allclose(session.prefill(tokens[50:100]), whole, atol=0.2)


def test_scales_leave_room_above_what_was_seen(artifact: Artifact, tokens: list[int]) -> None:
    session = OnnxSession(artifact, SessionOptions(threads=1, context=320, kv="int8"))
    session.prefill(tokens)
    stored = [np.abs(held[:, :, :300].astype(int)) for held in session._buffers.values()]
    # Hardly anything is cut off, and no more than a bit or two are given away.
    assert np.mean([values >= 127 for values in stored]) < 1e-4
    assert all(values.max() > 40 for values in stored)


def test_scales_are_measured_once(
    nano: Checkpoint, tmp_path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export_onnx(nano, tmp_path / "out", find_recipe(ONNX, "q8s128"))
    first = score(artifact, tokens, kv="int8")
    (record,) = (artifact.path / FOLDER).iterdir()
    monkeypatch.setattr(onnx_kv, "_tokens", lambda tokenizer: pytest.fail("measured again"))
    np.testing.assert_array_equal(score(artifact, tokens, kv="int8"), first)
    monkeypatch.undo()
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b"0.0", b"9.0", 1))
    np.testing.assert_array_equal(score(artifact, tokens, kv="int8"), first)
    assert record.read_bytes() == whole


def test_scales_are_not_kept_without_a_cache(nano: Checkpoint, tmp_path: Path, tokens: list[int]) -> None:
    artifact = export_onnx(nano, tmp_path / "out", find_recipe(ONNX, "q8s128"))
    score(artifact, tokens, kv="int8", cache=False)
    assert not (artifact.path / FOLDER).exists()


def test_a_graph_with_another_number_of_layers(artifact: Artifact) -> None:
    model = onnx.load(artifact.model_path, load_external_data=False)
    scale = np.ones((1, 64), np.float32)
    with pytest.raises(ArtifactError, match="1 layers have KV scales, but the graph has"):
        quantize_kv(model, [(scale, scale)])


def test_a_cache_that_is_none(artifact: Artifact) -> None:
    with pytest.raises(FoxEdgeError, match="--kv int2: onnxruntime has float32 or int8"):
        OnnxSession(artifact, SessionOptions(kv="int2"))


@pytest.mark.parametrize("choice", [{"kv": "int8"}, {"accuracy_level": 1}])
def test_other_runtimes_refuse_the_choice(choice: dict[str, object], nano: Checkpoint) -> None:
    options = SessionOptions(**choice)  # type: ignore[arg-type]
    flag = "--" + next(iter(choice)).replace("_", "-")
    with pytest.raises(FoxEdgeError, match=f"{flag} .*: PyTorch has (bfloat16|no such choice)"):
        TorchSession(nano, options)
    with pytest.raises(FoxEdgeError, match=f"{flag} .*: llama.cpp has (f16 or q8_0 or q4_0|no such choice)"):
        LlamaCppSession(None, options)  # type: ignore[arg-type]


# --- memory -------------------------------------------------------------------------------------------------


def test_a_context_beyond_memory_is_refused_before_anything_is_loaded(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    OnnxSession(artifact, SessionOptions(threads=1, kv="int8")).close()  # keeps the scales
    need = memory_need(artifact, read_graph(artifact.model_path), SessionOptions())
    monkeypatch.setattr(memory, "available_bytes", lambda: need.total(100))
    monkeypatch.setattr("runtimes.onnx.session._open", lambda *_: pytest.fail("loaded"))
    with pytest.raises(NotEnoughMemoryError, match=r"of KV cache .* = .*; a context of 100 would fit"):
        OnnxSession(artifact, SessionOptions(context=1024))
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_bytes", lambda: need.total(100))
    assert OnnxSession(artifact, SessionOptions(threads=1)).context == 100
    # A quarter of the bytes: more positions in the same memory.
    assert OnnxSession(artifact, SessionOptions(threads=1, context=400, kv="int8")).context == 400


def test_a_need_counts_a_tied_matrix_once(tiny: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_256, vocab_size=8192)
    write_checkpoint(tmp_path / "in", config, random_tensors(config).items(), tiny.tokenizer_files())
    artifact = export_onnx(Checkpoint.open(tmp_path / "in"), tmp_path / "out", find_recipe(ONNX, "float32"))
    need = memory_need(artifact, read_graph(artifact.model_path), SessionOptions())
    assert abs(need.weights - artifact.manifest.weight_bytes) < 1e6
