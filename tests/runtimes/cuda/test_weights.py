"""Weights on the device: each once, exactly what the file says, from every kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge.artifact import Artifact
from fox_edge.blockwise import column_scales, dequantize, quantize
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError
from fox_edge.quant import EMBEDDING, GGUF, ONNX, TYPES, find_recipe, type_names
from runtimes.base import SessionOptions, open_model_file
from runtimes.cuda import sources, weights
from runtimes.cuda.form import Form, Levels, put
from runtimes.cuda.ops import Dense, Matrix, Packed
from runtimes.cuda.ops import dequantize as values_of
from runtimes.cuda.session import CudaInt4Session, CudaInt8Session, CudaSession
from runtimes.cuda.sources import open_source
from runtimes.torch import TorchSession

CPU = torch.device("cpu")
IDS = [int(t) for t in np.random.default_rng(3).integers(8, 512, 60)]
OPTIONS = SessionOptions(device="cpu", threads=1)


def floats(matrix: Matrix) -> np.ndarray:
    return values_of(matrix, torch.empty(matrix.rows, matrix.columns)).numpy()


def fused(rows: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """The matrices of a layer as they should lie, of the tensors' float32 rows."""
    at = f"model.layers.{layer}."
    parts = {
        "qkv": [f"self_attn.{p}_proj" for p in "qkv"],
        "o": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    return {
        field: np.concatenate([rows[f"{at}{name}.weight"] for name in names])
        for field, names in parts.items()
    }


def check(loaded: weights.Weights, rows: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    """Every matrix and vector is the rows' own; `tolerance` is of the largest weight."""

    def same(got: np.ndarray, want: np.ndarray) -> None:
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()

    same(floats(loaded.embedding), rows[EMBEDDING])
    same(loaded.norm.numpy(), rows["model.norm.weight"][0])
    for number, layer in enumerate(loaded.layers):
        for field, want in fused(rows, number).items():
            same(floats(getattr(layer, field)), want)
        at = f"model.layers.{number}."
        same(layer.attention_norm.numpy(), rows[f"{at}input_layernorm.weight"][0])
        same(layer.mlp_norm.numpy(), rows[f"{at}post_attention_layernorm.weight"][0])


def rows_in(artifact: Artifact) -> dict[str, np.ndarray]:
    """Float32 rows of every tensor, as verification reads them."""
    file = open_model_file(artifact)
    shapes = {record.name: record.shape for record in artifact.manifest.tensors}
    rows = {name: file.rows(name, 0, shape[0] if len(shape) == 2 else 1) for name, shape in shapes.items()}
    file.close()
    return rows


def test_a_checkpoint_s_floats(tiny: Checkpoint, tiny_untied: Checkpoint) -> None:
    for checkpoint in (tiny, tiny_untied):
        rows = {name: checkpoint.float_rows(name).numpy() for name in checkpoint.shapes()}
        loaded = weights.load(open_source(checkpoint), torch.bfloat16, CPU)
        check(loaded, rows)
        if checkpoint is tiny_untied:
            assert np.array_equal(floats(loaded.head), rows["lm_head.weight"])


def test_a_tied_matrix_is_one_and_everything_is_in_one_block(tiny: Checkpoint) -> None:
    source = open_source(tiny)
    loaded = weights.load(source, torch.bfloat16, CPU)
    assert isinstance(loaded.embedding, Dense) and isinstance(loaded.head, Dense)
    assert loaded.head.weight.data_ptr() == loaded.embedding.weight.data_ptr()
    storage = loaded.embedding.weight.untyped_storage()
    assert storage.nbytes() == weights.weight_bytes(source, torch.bfloat16)
    assert loaded.layers[-1].down.weight.untyped_storage().data_ptr() == storage.data_ptr()  # type: ignore[union-attr]
    least = 2 * tiny.config.num_parameters()
    assert least <= storage.nbytes() < least + 256 * (3 + 6 * tiny.config.num_layers) + 4096


def test_nothing_but_a_piece_is_on_the_host(tiny_256: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded or not, whatever the file, no more rows at a time than a piece."""
    monkeypatch.setattr(sources, "PIECE_WEIGHTS", 4096)
    monkeypatch.setattr("fox_edge.checkpoint._PIECE_BYTES", 8192)
    sizes: list[int] = []
    real = put

    def watched(matrix: Matrix, first: int, rows: torch.Tensor | Levels, name: str) -> None:
        sizes.append((rows.integers if isinstance(rows, Levels) else rows).numel())
        real(matrix, first, rows, name)

    monkeypatch.setattr(weights, "put", watched)
    for preset in (None, "int8"):
        weights.load(open_source(tiny_256, preset), torch.bfloat16, CPU)
    assert max(sizes) == 4096 and sum(sizes) > 2 * 500_000


# --- every format ----------------------------------------------------------------------------------------


FAST = [name for name in type_names(GGUF) if not name.startswith(("iq1", "iq2", "iq3"))]


@pytest.mark.parametrize("quant", [*FAST, "iq3_s", "int4"])
def test_a_gguf_s_very_weights(quant: str, tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, quant), rounding="nearest")
    rows = rows_in(artifact)
    source = open_source(artifact)
    loaded = weights.load(source, torch.float32, CPU)
    check(loaded, rows)
    packed = [isinstance(m, Packed) for m in (loaded.embedding, loaded.layers[0].qkv)]
    assert packed == [quant not in ("f32", "f16", "bf16", "iq3_s")] * 2
    notes = source.notes()
    assert len(notes) == (quant in ("f32", "f16", "iq3_s"))
    if quant == "iq3_s":
        assert "matrices of type iq3_s" in notes[0] and "held as BF16" in notes[0]
    source.close()


@pytest.mark.parametrize("quant", ["int8", "int4", "q2a16", "q4s32", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_onnx_s_very_weights(
    quant: str, tied: bool, tiny_256: Checkpoint, tiny_untied: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = tiny_256 if tied else tiny_untied
    artifact = export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, quant), rounding="nearest")
    rows = rows_in(artifact)
    source = open_source(artifact)
    loaded = weights.load(source, torch.float32, CPU)
    # Of float32 scales, a zero point's product is rounded for itself.
    check(loaded, rows, 1e-6)
    if not tied:
        np.testing.assert_allclose(floats(loaded.head), rows["lm_head.weight"], atol=1e-6)
    assert (loaded.head is loaded.embedding) == tied
    assert len(source.notes()) == (quant == "float32")
    source.close()


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_checkpoint_rounded_at_load(preset: str, tiny_256: Checkpoint) -> None:
    kind = TYPES[ONNX, find_recipe(ONNX, preset).default]
    rows = {name: tiny_256.float_rows(name) for name in tiny_256.shapes()}
    factors = column_scales(tiny_256, EMBEDDING)
    for name, row in rows.items():
        if len(tiny_256.shapes()[name]) == 2:
            scale = factors if name == EMBEDDING else torch.ones(row.shape[1])
            rows[name] = dequantize(quantize(row / scale, kind), kind) * scale
    loaded = weights.load(open_source(tiny_256, preset), torch.float32, CPU)
    check(loaded, {name: row.numpy() for name, row in rows.items()}, 1e-6)
    assert isinstance(loaded.embedding, Packed) and loaded.embedding.bits == kind.bits


@pytest.mark.parametrize("quant", ["q4_0", "q4_k", "q8_0", "q6_k", "int4"])
def test_a_session_of_a_gguf_computes_with_them(quant: str, tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, quant), rounding="nearest")
    agree(artifact, CudaSession(artifact, OPTIONS, torch.float32), tiny_256)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_session_of_an_onnx_computes_with_them(quant: str, tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny_256, tmp_path / "out", find_recipe(ONNX, quant), rounding="nearest")
    agree(artifact, CudaSession(artifact, OPTIONS, torch.float32), tiny_256)


def agree(artifact: Artifact, session: CudaSession, checkpoint: Checkpoint) -> None:
    """Prompt and steps are those of the reference model with the artifact's dequantized weights in it."""
    model = checkpoint.load_model()
    with torch.no_grad():
        for (name, weight), rows in zip(model.named_parameters(), rows_in(artifact).items(), strict=True):
            assert name == rows[0]
            weight.copy_(torch.from_numpy(rows[1]).view_as(weight))
    with torch.inference_mode():
        want = model(torch.tensor([IDS]))[0].numpy()
    got = [session.prefill(IDS[:40]), *(session.step(t) for t in IDS[40:])]
    assert np.abs(np.stack(got) - want[39:]).max() < 2e-5 * np.abs(want).max()
    session.close()


def test_rounding_at_load_stays_near_the_model(nano: Checkpoint) -> None:
    ids = [2, *range(300, 360)]
    want = TorchSession(nano, SessionOptions(threads=1), torch.float32).prefill(ids)
    errors = []
    for kind in (CudaInt8Session, CudaInt4Session):
        got = kind(nano, OPTIONS, torch.float32).prefill(ids)
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert 0 < errors[0] < 0.03 < errors[1] < 0.5


def test_a_scale_that_is_none_of_weights_is_refused() -> None:
    matrix = Form(4, 32, half=True).make(2, 32, torch.float32, weights.Arena(1 << 10, CPU).take)
    integers = torch.zeros(2, 32, dtype=torch.uint8)
    for scale in (float("nan"), float("inf"), 1e6):
        with pytest.raises(ArtifactError, match=r"^q: a block's scale is (nan|inf|1e\+06), which is none"):
            put(matrix, 0, Levels(integers, torch.full((2, 1), scale), None, 8), "q")


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_config_that_is_not_the_file_s_is_refused(field: str, tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny_256, tmp_path / "out", find_recipe(ONNX, "int8"), rounding="nearest")
    path = artifact.path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, field: 2 * fields[field]}))
    with pytest.raises(ArtifactError) as error:
        CudaSession(artifact, OPTIONS)
    assert "\n" not in str(error.value) and "model.onnx" in str(error.value)


def test_a_gguf_is_its_own_config(tiny_256: Checkpoint, tmp_path: Path) -> None:
    """As for llama.cpp, which never sees config.json."""
    artifact = export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, "q8_0"))
    want = CudaSession(artifact, OPTIONS).prefill(IDS)
    path = artifact.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 50.0, "vocab_size": 1024}))
    assert np.array_equal(CudaSession(artifact, OPTIONS).prefill(IDS), want)
