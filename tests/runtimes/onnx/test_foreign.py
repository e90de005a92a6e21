"""Folders that other tools exported: described from their files alone, and run like our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.onnx import export_onnx
from fox_edge.artifact import MANIFEST
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError, NotEnoughMemoryError
from fox_edge.quant import ONNX, find_recipe
from runtimes.base import SCORE_CHUNK, Session, SessionOptions, is_foreign
from runtimes.onnx import foreign_session as onnx_foreign_session
from runtimes.onnx.foreign import ForeignOnnx
from runtimes.onnx.foreign_session import ForeignSession

ONE = SessionOptions(threads=1)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(6, 8192, 150)]
MATRIX = 8192 * 256


@pytest.fixture(scope="module")
def want(nano: Checkpoint) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = nano.load_model()(torch.tensor([TOKENS]))[0].float().numpy()
    return logits


@pytest.fixture(scope="module")
def genai_graph(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as onnxruntime-genai's builder leaves it: buffers in place, one row of logits."""
    folder = tmp_path_factory.mktemp("genai") / "folder"
    export_onnx(nano, folder, find_recipe(ONNX, "float32"))
    for name in (MANIFEST, "config.json", "model.onnx"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def without_manifest(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ours whose manifest was lost: its graph can be asked for any number of rows."""
    folder = tmp_path_factory.mktemp("lost") / "folder"
    export_onnx(nano, folder, find_recipe(ONNX, "float32"))
    (folder / MANIFEST).unlink()
    return folder / "model.onnx"


@pytest.fixture(scope="module", params=["optimum", "genai", "lost manifest"])
def session(
    request: pytest.FixtureRequest, optimum_folder: Path, genai_graph: Path, without_manifest: Path
) -> ForeignSession:
    folders = {"optimum": optimum_folder, "genai": genai_graph, "lost manifest": without_manifest}
    return ForeignSession(ForeignOnnx.open(folders[request.param]), ONE)


# --- descriptions -------------------------------------------------------------------------------------------


def test_optimums_export(optimum_folder: Path, nano: Checkpoint) -> None:
    foreign = ForeignOnnx.open(optimum_folder)
    graph = foreign.interface
    assert foreign.producer.startswith("pytorch ") and foreign.quant == "float32"
    assert (foreign.context, graph.vocab_size, graph.kv_heads, graph.head_dim) == (1024, 8192, 1, 64)
    assert (graph.shared, graph.last_only, graph.keep, graph.kv_type) == (False, False, None, np.float32)
    assert len(graph.cache) == 16 and graph.kv_bytes_per_position == 2 * nano.config.kv_bytes_per_token
    # Optimum writes the tied matrix twice; all of the first but one row is never read.
    assert foreign.parameters == nano.config.num_parameters()
    assert foreign.weight_bytes - 4 * foreign.parameters == pytest.approx(4 * MATRIX, rel=0.001)
    assert foreign.unread_bytes == 4 * MATRIX - 4 * 256
    assert foreign.total_bytes() == sum(p.stat().st_size for p in optimum_folder.iterdir())


def test_optimums_int8(optimum_int8_folder: Path) -> None:
    foreign = ForeignOnnx.open(optimum_int8_folder)
    assert foreign.model_path.name == "model_quantized.onnx" and foreign.quant == "int8+uint8"
    assert foreign.tie is not None and foreign.tie.second_bytes == MATRIX


def test_a_graph_for_genai(genai_graph: Path) -> None:
    foreign = ForeignOnnx.open(genai_graph)
    assert (foreign.interface.shared, foreign.interface.last_only) == (True, True)
    assert (foreign.context, foreign.parameters) == (1024, None)
    # The rotary tables are no weights.
    assert foreign.weight_bytes == pytest.approx(
        4 * Checkpoint.open("nano").config.num_parameters(), rel=1e-4
    )
    assert foreign.tie is not None and foreign.tie.one_copy and foreign.unread_bytes == 0


@pytest.mark.parametrize("quant", ["q4a128", "q8s32"])
def test_our_own_types_have_their_names(quant: str, tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny_256, tmp_path / "out", find_recipe(ONNX, quant))
    foreign = ForeignOnnx.open(artifact.model_path)
    assert foreign.quant == quant
    assert foreign.weight_bytes == pytest.approx(artifact.manifest.weight_bytes, abs=1024)


def test_what_is_foreign(optimum_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert is_foreign(optimum_folder) and is_foreign(optimum_folder / "model.onnx")
    (tmp_path / MANIFEST).write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert not is_foreign(tmp_path) and not is_foreign(tiny_folder) and not is_foreign(tmp_path / "nowhere")
    assert not is_foreign(optimum_folder / "config.json")


def test_a_repository_with_its_models_in_a_folder(optimum_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(optimum_folder, tmp_path / "repository")
    (tmp_path / "repository" / "onnx").mkdir()
    (tmp_path / "repository" / "model.onnx").rename(tmp_path / "repository" / "onnx" / "model.onnx")
    foreign = ForeignOnnx.open(tmp_path / "repository" / "onnx")
    assert foreign.folder == tmp_path / "repository" and foreign.context == 1024
    assert foreign.total_bytes() == ForeignOnnx.open(optimum_folder).total_bytes()


# --- sessions -----------------------------------------------------------------------------------------------


def test_the_same_logits_however_the_tokens_arrive(
    session: ForeignSession, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(session, Session)
    session.reset()
    np.testing.assert_allclose(session.prefill(TOKENS), want[-1], atol=1e-3)
    session.reset()
    monkeypatch.setattr(session, "_chunk", 37)
    np.testing.assert_allclose(session.prefill(TOKENS[:100]), want[99], atol=1e-3)
    for place in range(100, 110):
        np.testing.assert_allclose(session.step(TOKENS[place]), want[place], atol=1e-3)
    assert session.length == 110


@pytest.mark.parametrize("start", [0, 63, 149])
def test_score(start: int, session: ForeignSession, want: np.ndarray) -> None:
    session.reset()
    chunks = list(session.score(TOKENS, start))
    assert all(len(chunk) <= SCORE_CHUNK and chunk.dtype == np.float32 for chunk in chunks)
    np.testing.assert_allclose(np.concatenate(chunks), want[start:], atol=1e-3)


def test_truncate(session: ForeignSession, want: np.ndarray) -> None:
    session.reset()
    session.prefill([*TOKENS[:100], 7, 8, 9])
    session.truncate(100)
    np.testing.assert_allclose(session.prefill(TOKENS[100:120]), want[119], atol=1e-3)
    session.truncate(500)
    assert session.length == 120
    kept = session.step(TOKENS[120])
    before = kept.copy()
    session.step(TOKENS[121])
    np.testing.assert_array_equal(kept, before)


def test_tokens_and_contexts_that_do_not_fit(optimum_folder: Path) -> None:
    foreign = ForeignOnnx.open(optimum_folder)
    for context in (0, 1025):
        with pytest.raises(ContextOverflowError, match=f"{context} positions .* has 1 to 1024"):
            ForeignSession(foreign, SessionOptions(context=context))
    session = ForeignSession(foreign, SessionOptions(context=8, threads=1))
    with pytest.raises(ContextOverflowError, match="0 tokens and 9 more do not fit a context of 8"):
        session.prefill(TOKENS[:9])
    with pytest.raises(FoxEdgeError, match="not all in a vocabulary of 8192"):
        session.step(8192)
    session.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        session.step(1)


def test_a_context_that_would_not_fit_in_memory(
    optimum_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = ForeignOnnx.open(optimum_folder)
    # Weights, 256 rows of logits, and 100 positions of keys and values, old and new.
    room = foreign.weight_bytes + 256 * 8192 * 4 + 100 * 2 * 8 * 2 * 64 * 4
    monkeypatch.setattr("runtimes.memory.available_bytes", lambda: room)
    assert ForeignSession(foreign, ONE).context == 100
    words = r"a context of 101 tokens takes .* a context of 100 would fit"
    with pytest.raises(NotEnoughMemoryError, match=words):
        ForeignSession(foreign, SessionOptions(context=101, threads=1))


def test_logits_of_a_long_prompt_are_bounded(optimum_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows come back from such a graph, so that a prompt is cut into chunks whose rows fit the bound."""
    monkeypatch.setattr(onnx_foreign_session, "MAX_LOGITS_BYTES", 10 * 4 * 8192)
    session = ForeignSession(ForeignOnnx.open(optimum_folder), ONE)
    fed: list[int] = []
    run = session._run
    monkeypatch.setattr(session, "_run", lambda ids, keep: fed.append(len(ids)) or run(ids, keep))
    session.prefill(TOKENS[:35])
    assert fed == [10, 10, 10, 5]


# --- damaged and hostile folders ----------------------------------------------------------------------------


@pytest.fixture
def copy(optimum_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(optimum_folder, tmp_path / "copy")


def test_folders_that_describe_nothing(copy: Path) -> None:
    shutil.copy(copy / "model.onnx", copy / "other.onnx")
    with pytest.raises(
        ArtifactError, match=r"holds 2 ONNX models \(model\.onnx, other\.onnx\); name the file"
    ):
        ForeignOnnx.open(copy)
    (copy / "other.onnx").unlink()
    (copy / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no config\.json and no genai_config\.json"):
        ForeignOnnx.open(copy)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", r"config\.json: not readable as JSON"),
        ("config.json", "{}", r"head_dim is None|hidden_size is None|max_position_embeddings is None"),
        ("config.json", '{"max_position_embeddings": 1e9}', "must be a whole number"),
        ("genai_config.json", "[]", "an object is due"),
        ("genai_config.json", '{"model": 4}', "describes no decoder"),
        ("genai_config.json", '{"model": {"decoder": {"head_size": 64}}}', "context_length is None"),
    ],
)
def test_damaged_settings(name: str, text: str, words: str, copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / name).write_text(text)
    with pytest.raises(ArtifactError, match=words):
        ForeignOnnx.open(copy)


def add_input(model: onnx.ModelProto) -> None:
    value = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, (1,))
    model.graph.input.append(value)


def drop_cache(model: onnx.ModelProto) -> None:
    kept = [v for v in model.graph.input if not v.name.startswith("past")]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def drop_present(model: onnx.ModelProto) -> None:
    kept = [v for v in model.graph.output if v.name != "present.3.key"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def other_kind(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        value = next(v for v in [*model.graph.input, *model.graph.output] if v.name == name)
        value.type.tensor_type.elem_type = onnx.TensorProto.STRING

    return change


def flat(model: onnx.ModelProto) -> None:
    del next(v for v in model.graph.output if v.name == "logits").type.tensor_type.shape.dim[0]


def huge(model: onnx.ModelProto) -> None:
    shape = next(v for v in model.graph.input if v.name == "past_key_values.0.key").type.tensor_type.shape
    shape.dim[1].dim_value = 1 << 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_input, "is no text decoder .* has the input 'use_cache_branch'"),
        (drop_cache, "keeps no keys and values .*text-generation-with-past"),
        (drop_present, r"keeps no keys and values .*no output 'present\.3\.key'"),
        (other_kind("input_ids"), "'input_ids' has element type 8, but int64 is due"),
        (other_kind("logits"), "'logits' has element type 8, but float32 or float16 is due"),
        (flat, "'logits' has 2 dimensions, but 3 are due"),
        (huge, "kv_heads is 1125899906842624, but must be a whole number from 1 to"),
    ],
)
def test_graphs_that_cannot_be_fed(change: Callable[[onnx.ModelProto], None], words: str, copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    change(model)
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(ArtifactError, match=words):
        ForeignOnnx.open(copy)


def test_settings_that_lie_about_the_cache(genai_graph: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(genai_graph, tmp_path / "copy")
    model = onnx.load(copy / "genai.onnx", load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[1].dim_param = "heads"
    onnx.save(model, copy / "genai.onnx")
    fields = json.loads((copy / "genai_config.json").read_text())
    fields["model"]["decoder"]["num_key_value_heads"] = 3
    (copy / "genai_config.json").write_text(json.dumps(fields))
    session = ForeignSession(ForeignOnnx.open(copy), ONE)
    with pytest.raises(ArtifactError, match=r"genai\.onnx: onnxruntime cannot run it \("):
        session.prefill(TOKENS[:4])
    assert session.length == 0


def test_a_graph_that_onnxruntime_refuses(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    model.graph.node[5].op_type = "NoSuchOperator"
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(ArtifactError, match=r"onnxruntime cannot open it \(.*NoSuchOperator"):
        ForeignSession(ForeignOnnx.open(copy), ONE)


def test_data_outside_the_folder(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    onnx.save(model, copy / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    assert ForeignOnnx.open(copy).quant == "float32"
    (copy / "model.onnx_data").rename(copy.parent / "outside")
    (copy / "model.onnx_data").symlink_to(copy.parent / "outside")
    with pytest.raises(ArtifactError, match="which is no file of this folder"):
        ForeignOnnx.open(copy)
