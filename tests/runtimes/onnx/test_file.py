"""Looking into an ONNX artifact: its tensors, the proof of the tie, what it tells a runtime about tokens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.onnx import DATA_FILE, export_onnx
from fox_edge.artifact import Artifact
from fox_edge.blockwise import column_scales, dequantize, quantize
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, VerificationError
from fox_edge.quant import EMBEDDING, HEAD, ONNX, TYPES, find_recipe
from runtimes.base import ModelFile, open_model_file
from runtimes.onnx.file import OnnxFile
from tests.helpers import PROBES


def exported(checkpoint: Checkpoint, quant: str, folder: Path) -> Artifact:
    return export_onnx(checkpoint, folder / quant, find_recipe(ONNX, quant))


@pytest.fixture
def artifact(tiny: Checkpoint, tmp_path: Path) -> Artifact:
    return exported(tiny, "q4a32", tmp_path)


@pytest.mark.parametrize("quant", ["float32", "q8s32", "q8a16", "q4s16", "q4a32", "q2s32", "q2a16"])
@pytest.mark.parametrize("which", ["tiny", "tiny_untied"])
def test_every_tensor_comes_back(
    quant: str, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    artifact = export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, quant), rounding="nearest")
    file = open_model_file(artifact)
    assert isinstance(file, OnnxFile)
    assert set(file.tensor_names()) == set(checkpoint.shapes())
    for record in artifact.manifest.tensors:
        rows = 1 if len(record.shape) == 1 else record.shape[0]
        whole = checkpoint.float_rows(record.name, 0, rows)
        type_ = TYPES[ONNX, record.type]
        # What embedding and head get divided by before they are rounded.
        factors = column_scales(checkpoint, record.name) if record.name in (EMBEDDING, HEAD) else 1.0
        want = dequantize(quantize(whole / factors, type_), type_) * factors if type_.bits else whole
        got = file.rows(record.name, 0, rows)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-7)
        low, high = rows // 3, rows - rows // 4
        np.testing.assert_array_equal(file.rows(record.name, low, high), got[low:high])
    file.close()


def test_an_unknown_tensor(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"holds no tensor 'model\.nothing'"):
        OnnxFile(artifact).rows("model.nothing", 0, 1)


# --- the tie ------------------------------------------------------------------------------------------------


def test_the_tie_is_proven(artifact: Artifact) -> None:
    matrix = 512 * 64 // 2
    sentence = OnnxFile(artifact).tie()
    assert f"the same {matrix} bytes of {DATA_FILE}" in sentence and "hold them once" in sentence


def test_a_float32_tie_is_one_range(tiny: Checkpoint, tmp_path: Path) -> None:
    assert "the same 131072 bytes" in OnnxFile(exported(tiny, "float32", tmp_path)).tie()


def resaved(artifact: Artifact) -> Artifact:
    """What a tool that knows nothing of aliases makes of the artifact: every initializer on its own."""
    model = onnx.load(artifact.model_path)
    folder = artifact.path.with_name("resaved")
    shutil.copytree(artifact.path, folder)
    for name in ("model.onnx", DATA_FILE):
        (folder / name).unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location=DATA_FILE, size_threshold=0)
    return Artifact(folder, artifact.manifest)


def test_a_tool_that_breaks_the_tie_is_found_out(artifact: Artifact) -> None:
    broken = resaved(artifact)
    with pytest.raises(VerificationError, match=r"two copies: the head's 'lm_head\.weight' takes 16,384"):
        OnnxFile(broken).tie()
    # The weights themselves are still all there.
    want, got = (OnnxFile(a).rows(EMBEDDING, 0, 512) for a in (artifact, broken))
    np.testing.assert_array_equal(want, got)


def edited(artifact: Artifact, edit: Callable[[onnx.ModelProto], None]) -> OnnxFile:
    model = onnx.load(artifact.model_path, load_external_data=False)
    edit(model)
    onnx.save(model, artifact.model_path)
    return OnnxFile(artifact)


def test_a_second_set_of_scales_is_found_out(artifact: Artifact) -> None:
    def second(model: onnx.ModelProto) -> None:
        head = next(n for n in model.graph.node if n.name == "lm_head")
        found = next(t for t in model.graph.initializer if t.name == head.input[2])
        model.graph.initializer.add().CopyFrom(found)
        model.graph.initializer[-1].name = head.input[2] = "another"
        entry = next(e for e in model.graph.initializer[-1].external_data if e.key == "offset")
        entry.value = str(int(entry.value) + 64)

    with pytest.raises(VerificationError, match="two copies: the head's 'another'"):
        edited(artifact, second).tie()


def test_a_head_of_its_own_inside_the_graph_is_found_out(artifact: Artifact) -> None:
    def inside(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == HEAD)
        size = int(np.prod(tensor.dims))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = bytes(size)

    with pytest.raises(VerificationError, match=r"two copies: the head's 'lm_head\.weight'"):
        edited(artifact, inside).tie()


def test_room_for_a_second_copy_is_found_out(artifact: Artifact) -> None:
    path = artifact.path / DATA_FILE
    os.truncate(path, path.stat().st_size + 512 * 64)
    with pytest.raises(VerificationError, match="belong to no tensor"):
        OnnxFile(artifact).tie()


def test_a_graph_without_a_head(artifact: Artifact) -> None:
    def behead(model: onnx.ModelProto) -> None:
        model.graph.node.remove(next(n for n in model.graph.node if n.name == "lm_head"))

    with pytest.raises(VerificationError, match="the graph has no head: no product"):
        edited(artifact, behead).tie()


def test_a_stack_of_the_wrong_height(artifact: Artifact) -> None:
    def swap(model: onnx.ModelProto) -> None:
        down = next(n for n in model.graph.node if n.name.endswith("1.mlp.down_proj"))
        down.name = "model.layers.1.self_attn.qkv_proj"

    with pytest.raises(ArtifactError, match="has 64 rows, but"):
        edited(artifact, swap).tensor_names()


def test_a_missing_initializer(artifact: Artifact) -> None:
    def lose(model: onnx.ModelProto) -> None:
        model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == HEAD))

    file = edited(artifact, lose)
    with pytest.raises(ArtifactError, match=r"no initializer 'lm_head\.weight' among"):
        file.tensor_names()
    with pytest.raises(VerificationError, match="the graph has no head"):
        file.tie()


def test_a_weight_that_an_operator_makes(artifact: Artifact) -> None:
    """As by a tool that moves a cast or a transposition in front of its reader."""

    def wrap(model: onnx.ModelProto) -> None:
        down = next(n for n in model.graph.node if n.name.endswith("1.mlp.down_proj"))
        cast = onnx.helper.make_node("Cast", [down.input[1]], ["cast"], to=onnx.TensorProto.UINT8)
        model.graph.node.insert(0, cast)
        down.input[1] = "cast"

    file = edited(artifact, wrap)
    assert "hold them once" in file.tie()
    with pytest.raises(
        ArtifactError, match=r"'cast' is no initializer but made by the operator Cast: another"
    ):
        file.tensor_names()
    with pytest.raises(ArtifactError, match="another tool has rewritten this graph"):
        file.rows("model.layers.1.mlp.down_proj.weight", 0, 1)


def test_an_embedding_that_is_reshaped_at_load(artifact: Artifact) -> None:
    """One copy in the file, two in memory: as onnxruntime-genai's builder ties a quantized embedding."""

    def share(model: onnx.ModelProto) -> None:
        embed = next(n for n in model.graph.node if n.name == "model.embed_tokens")
        model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.array([512, 32]), "flat"))
        model.graph.node.insert(0, onnx.helper.make_node("Reshape", [HEAD, "flat"], ["reshaped"]))
        embed.input[0] = "reshaped"

    file = edited(artifact, share)
    words = "one copy of .* bytes in the files, but read through Reshape: .* second one of .* in memory"
    with pytest.raises(VerificationError, match=words):
        file.tie()


@pytest.mark.parametrize("quant", ["float32", "q8s32", "q4a16"])
def test_what_is_stored(quant: str, tiny: Checkpoint, tmp_path: Path) -> None:
    """Types and bytes follow from the file alone, and are what the manifest says."""
    artifact = exported(tiny, quant, tmp_path)
    file = OnnxFile(artifact)
    assert {t.name: file.stored(t.name) for t in artifact.manifest.tensors} == {
        t.name: (t.type, t.bytes) for t in artifact.manifest.tensors
    }


# --- tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "tiny_untied"])
def test_tokens(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    tokenizer = checkpoint.tokenizer()
    file: ModelFile = OnnxFile(exported(checkpoint, "q8s32", tmp_path))
    for text in PROBES:
        for special in (True, False):
            assert file.tokenize(text, special) == tokenizer.encode(text, special=special)
    # The tokenizer's ids, not those that the checkpoint's config.json has swapped.
    assert file.special_ids() == {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "unk": tokenizer.unk_id,
    }
    assert file.chat_template() == tokenizer.chat_template
