"""The ONNX export: the graph computes the reference, weights are streamed, nothing half-made stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import export.onnx_weights
import fox_edge.blockwise
from export.onnx import DATA_FILE, export_onnx
from export.onnx_weights import TASK_WEIGHTS
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError, CheckpointError, RecipeError, VerificationError
from fox_edge.model import Fox
from fox_edge.quant import EMBEDDING, GGUF, INT4_LIMITS, ONNX, Recipe, find_recipe
from runtimes.base import SessionOptions
from runtimes.onnx.file import OnnxFile
from runtimes.onnx.session import OnnxSession
from tests.helpers import TINY, make_checkpoint

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, 70)]


def recipe(default: str, *rules: tuple[str, str]) -> Recipe:
    return Recipe("test", ONNX, default, rules, INT4_LIMITS)


def reference(model: Fox, tokens: list[int] = TOKENS) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([tokens]))[0].numpy()
    return logits


def logits_of(artifact: Artifact, tokens: list[int] = TOKENS) -> np.ndarray:
    return np.concatenate(list(OnnxSession(artifact, SessionOptions(threads=1)).score(tokens)))


def plain_session(model: Path) -> ort.InferenceSession:
    """onnxruntime without our session around it; one thread, so that a busy machine does not matter."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def as_stored(artifact: Artifact, checkpoint: Checkpoint) -> Fox:
    """The reference model with the weights that the artifact holds, decoded independently of the exporter."""
    file, model = OnnxFile(artifact), Fox(checkpoint.config)
    weights = {
        name: torch.from_numpy(file.rows(name, 0, 1 if len(shape) == 1 else shape[0])).reshape(shape)
        for name, shape in checkpoint.shapes().items()
    }
    model.load_state_dict(weights)
    return model


@pytest.fixture
def exact_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MatMulNBits compute with float32 activations, so that only the weights are rounded."""
    monkeypatch.setattr("export.onnx_graph.INT8_ACTIVATIONS", 1)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (16, 1)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_float32_is_the_reference(heads: tuple[int, int], tied: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, num_heads=heads[0], num_kv_heads=heads[1], tied=tied)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in", config, dtype=torch.float32))
    artifact = export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, "float32"))
    want = reference(checkpoint.load_model())
    np.testing.assert_allclose(logits_of(artifact), want, atol=1e-4)
    assert {t.type for t in artifact.manifest.tensors} == {"float32"}


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize("name", ["q8s32", "q8a16", "q4s32", "q4a32", "q4a16", "q2s16", "q2a32"])
@pytest.mark.parametrize("which", ["tiny", "tiny_untied"])
def test_quantized_graph_computes_its_own_weights(
    name: str, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    artifact = export_onnx(checkpoint, tmp_path / "out", recipe(name))
    want = reference(as_stored(artifact, checkpoint))
    np.testing.assert_allclose(logits_of(artifact), want, atol=2e-4)


def test_int8_is_close_to_the_reference(tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny_256, tmp_path / "out", find_recipe(ONNX, "int8"))
    want = reference(tiny_256.load_model())
    error = logits_of(artifact) - want
    assert np.sqrt(np.square(error).mean() / np.square(want).mean()) < 0.05
    assert artifact.manifest.bits_per_weight < 8.5


@pytest.mark.usefixtures("exact_activations")
def test_projections_of_different_types_stay_apart(tiny: Checkpoint, tmp_path: Path) -> None:
    mixed = recipe("q8s32", ("*.v_proj.weight", "float32"), ("*.layers.1.mlp.up_proj.weight", "q4a16"))
    artifact = export_onnx(tiny, tmp_path / "out", mixed)
    np.testing.assert_allclose(logits_of(artifact), reference(as_stored(artifact, tiny)), atol=2e-4)
    stored = {t.name: t.stored_as for t in artifact.manifest.tensors}
    assert stored["model.layers.0.self_attn.v_proj.weight"] == "model.layers.0.self_attn.v_proj.weight"
    assert stored["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.gate_up_proj.weight[96:192]"
    assert stored["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("quant", ["q4a32", "q8s32"])
def test_a_sliced_head_is_the_same_head(
    quant: str, tiny: Checkpoint, tiny_untied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for checkpoint in (tiny, tiny_untied):
        name = checkpoint.path.name
        whole = export_onnx(checkpoint, tmp_path / f"{name}.whole", recipe(quant))
        monkeypatch.setattr("export.onnx_graph.HEAD_SLICE_BYTES", 5000)
        sliced = export_onnx(checkpoint, tmp_path / f"{name}.sliced", recipe(quant))
        monkeypatch.undo()
        assert (whole.path / DATA_FILE).read_bytes() == (sliced.path / DATA_FILE).read_bytes()
        heads = [n for n in onnx_graph(sliced).node if n.name.startswith("lm_head.")]
        assert len(heads) > 2
        np.testing.assert_allclose(logits_of(sliced), logits_of(whole), atol=1e-5)
        if checkpoint is tiny:
            assert OnnxFile(sliced).tie().startswith("embedding and head read the same")
        else:
            rows = OnnxFile(sliced).rows("lm_head.weight", 50, 300)
            np.testing.assert_array_equal(rows, OnnxFile(whole).rows("lm_head.weight", 50, 300))


def onnx_graph(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(artifact.model_path, load_external_data=False).graph


def test_anyone_can_run_it_with_plain_inputs(tiny: Checkpoint, tmp_path: Path) -> None:
    """The names and shapes that Optimum expects: a batch, an empty and a growing past, no logits_to_keep."""
    artifact = export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "float32"))
    session = plain_session(artifact.model_path)
    assert "logits_to_keep" not in [i.name for i in session.get_inputs()]
    batch = [TOKENS[:20], TOKENS[20:40]]
    past = {
        f"past_key_values.{n}.{part}": np.zeros((2, TINY.num_kv_heads, 0, TINY.head_dim), np.float32)
        for n in range(TINY.num_layers)
        for part in ("key", "value")
    }
    feeds = {"input_ids": np.array(batch)[:, :19], "attention_mask": np.ones((2, 19), np.int64)}
    first = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds | past), strict=True))
    assert first["logits"].shape == (2, 1, TINY.vocab_size)
    past = {k.replace("present", "past_key_values"): v for k, v in first.items() if k != "logits"}
    assert past["past_key_values.1.value"].shape == (2, 1, 19, 16)
    feeds = {"input_ids": np.array(batch)[:, 19:], "attention_mask": np.ones((2, 20), np.int64)}
    second = session.run(["logits"], feeds | past)[0]
    for row, tokens in enumerate(batch):
        want = reference(tiny.load_model(), tokens)
        np.testing.assert_allclose(first["logits"][row, 0], want[18], atol=1e-4)
        np.testing.assert_allclose(second[row, 0], want[19], atol=1e-4)


@pytest.mark.parametrize(("keep", "rows"), [(0, 20), (1, 1), (7, 7), (20, 20), (1000, 20)])
def test_logits_to_keep(keep: int, rows: int, tiny: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "float32"))
    session = plain_session(artifact.model_path)
    feeds = {
        i.name: np.zeros((1, TINY.num_kv_heads, 0, TINY.head_dim), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    feeds |= {"input_ids": np.array([TOKENS[:20]]), "attention_mask": np.ones((1, 20), np.int64)}
    logits = session.run(["logits"], feeds | {"logits_to_keep": np.array(keep)})[0]
    np.testing.assert_allclose(logits[0], reference(tiny.load_model(), TOKENS[:20])[-rows:], atol=1e-4)


def test_blocks_that_do_not_fit_a_row_get_smaller_and_the_manifest_says_so(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    artifact = export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "int4"))
    found = {t.name: (t.type, t.reason) for t in artifact.manifest.tensors}
    name = "model.layers.0.mlp.down_proj.weight"
    assert found[name] == ("q4a32", "96 columns are no whole number of q4a128 blocks of 128")
    assert found[EMBEDDING][0] == "q4a64"
    assert found["model.norm.weight"] == ("float32", None)


def test_a_row_that_no_block_divides_stays_float32(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, hidden_size=72)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in", config))
    artifact = export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, "int8"))
    types = {t.name: t.type for t in artifact.manifest.tensors}
    assert types[EMBEDDING] == "float32"
    assert types["model.layers.0.mlp.down_proj.weight"] == "q8s32"
    want = reference(checkpoint.load_model())
    assert np.abs(logits_of(artifact) - want).max() < 0.05 * np.abs(want).max()


def test_the_manifest_accounts_for_every_byte(tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny_256, tmp_path / "out", find_recipe(ONNX, "int4"))
    tables = 4 * tiny_256.config.max_positions * tiny_256.config.head_dim
    padding = (artifact.path / DATA_FILE).stat().st_size - artifact.manifest.weight_bytes - tables
    assert 0 <= padding < 4096 * 3 * len(artifact.manifest.tensors)
    assert list(artifact.changed_files()) == []
    assert set(artifact.manifest.files) >= {"model.onnx", DATA_FILE, "config.json", "tokenizer.model"}


def test_weights_are_streamed(tiny_256: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a task's rows are ever asked for at once, and every tensor's pages are given back."""
    asked: list[int] = []
    released: list[str] = []
    rows_of: Callable[..., torch.Tensor] = Checkpoint.float_rows
    monkeypatch.setattr(export.onnx_weights, "TASK_WEIGHTS", 4096)
    monkeypatch.setattr(fox_edge.blockwise, "_SCALE_WEIGHTS", 4096)
    monkeypatch.setattr(
        Checkpoint,
        "float_rows",
        lambda self, *a: asked.append((rows := rows_of(self, *a)).numel()) or rows,
    )
    monkeypatch.setattr(Checkpoint, "release", lambda self, name: released.append(name))
    export_onnx(tiny_256, tmp_path / "out", find_recipe(ONNX, "int4"), rounding="nearest")
    assert max(asked) == 4096 < TASK_WEIGHTS
    assert set(released) >= {n for n, s in tiny_256.shapes().items() if len(s) == 2}


def test_threads_and_tasks_do_not_change_a_bit(
    tiny_256: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    one = export_onnx(tiny_256, tmp_path / "one", find_recipe(ONNX, "int4"), threads=1)
    monkeypatch.setattr(export.onnx_weights, "TASK_WEIGHTS", 3000)
    three = export_onnx(tiny_256, tmp_path / "three", find_recipe(ONNX, "int4"), threads=3)
    assert one.manifest.files[DATA_FILE] == three.manifest.files[DATA_FILE]
    assert torch.get_num_threads() == before


def test_progress_ends_at_the_whole(tiny: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "int8"), progress=lambda *x: seen.append(x))
    total = 2 * tiny.config.num_parameters()
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def nothing_left(folder: Path) -> bool:
    return [p.name for p in folder.iterdir() if p.name != "in"] == []


def test_a_nan_weight_leaves_nothing(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5, 3] = float("nan")

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in", change=spoil))
    with pytest.raises(CheckpointError, match=rf"{name}.*row 5, column 3"):
        export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, "int8"))
    assert nothing_left(tmp_path)


def test_a_failed_verification_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    def refuse(artifact: Artifact) -> dict[str, object]:
        assert OnnxSession(artifact, SessionOptions(threads=1)).prefill(TOKENS[:3]).shape == (
            TINY.vocab_size,
        )
        raise VerificationError("not the model")

    with pytest.raises(VerificationError, match="not the model"):
        export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "int8"), verify=refuse)
    assert nothing_left(tmp_path)


def test_a_verification_report_is_kept(tiny: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(
        tiny, tmp_path / "out", find_recipe(ONNX, "int8"), verify=lambda _: {"passed": True}
    )
    assert Artifact.open(artifact.path).manifest.verification == {"passed": True}


def test_an_existing_target_is_replaced_only_when_told(tiny: Checkpoint, tmp_path: Path) -> None:
    export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "int8"))
    with pytest.raises(ArtifactError, match="exists already"):
        export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "q4s32"))
    replaced = export_onnx(tiny, tmp_path / "out", find_recipe(ONNX, "q4s32"), replace=True)
    assert Artifact.open(replaced.path).manifest.quant == "q4s32"


def test_a_recipe_for_another_format(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is for gguf"):
        export_onnx(tiny, tmp_path / "out", find_recipe(GGUF, "int8"))
    with pytest.raises(RecipeError, match="unknown onnx type 'q5_k'; known: float32, q8s16"):
        export_onnx(tiny, tmp_path / "out", recipe("q5_k"))
    assert nothing_left(tmp_path)


def test_a_head_size_that_attention_cannot_take(tmp_path: Path) -> None:
    config = FoxConfig(**{**dataclasses.asdict(TINY), "head_dim": 24})
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in", config))
    with pytest.raises(RecipeError, match=r"head_dim is 24.*multiples of 16"):
        export_onnx(checkpoint, tmp_path / "out", find_recipe(ONNX, "int8"))
