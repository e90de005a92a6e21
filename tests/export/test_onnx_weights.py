"""The three ways of rounding, from end to end: what is left of the model, tied and untied, mixed types."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from export.onnx import export_onnx
from fox_edge.blockwise import column_scales
from fox_edge.checkpoint import Checkpoint
from fox_edge.nano.problems import held_out
from fox_edge.quant import EMBEDDING, HEAD, INT4_LIMITS, ONNX, ROUNDINGS, Recipe, find_recipe
from runtimes.base import SessionOptions
from runtimes.onnx.session import OnnxSession
from tests.helpers import make_checkpoint

LAYERS = "model.layers.*"


def error_of(checkpoint: Checkpoint, folder: Path, recipe: Recipe, rounding: str) -> float:
    """Mean KL divergence from the reference, nats, with float32 activations.

    On problems that are none of the calibration's, since nothing is promised for text of another kind.
    """
    artifact = export_onnx(checkpoint, folder / rounding, recipe, rounding=rounding)
    assert artifact.manifest.recipe["rounding"] == rounding
    assert (artifact.manifest.recipe["calibration"] is None) == (rounding == "nearest")
    text = "\n\n".join(f"Question: {p.question}\nAnswer: {p.answer}" for p in held_out(8))
    tokens = torch.tensor(checkpoint.tokenizer().encode(text, bos=True)[: checkpoint.config.max_positions])
    with closing(OnnxSession(artifact, SessionOptions(accuracy_level=1, cache=False))) as session:
        got = torch.from_numpy(np.concatenate(list(session.score(tokens.tolist()))))
    with torch.inference_mode():
        want = checkpoint.load_model()(tokens[None])[0].log_softmax(-1)
    return float((want.exp() * (want - got.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("which", ["nano", "tiny_256", "tiny_untied"])
def test_each_way_is_better_than_the_one_before(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    recipe = find_recipe(ONNX, "q4a32")
    nearest, search, compensated = (error_of(checkpoint, tmp_path, recipe, how) for how in ROUNDINGS)
    assert search < nearest and compensated < 0.9 * nearest


@pytest.mark.parametrize(
    "rules",
    [
        ((EMBEDDING, "float32"),),
        ((EMBEDDING, "q8s64"),),
        (("*down_proj.weight", "q2a32"), ("*k_proj.weight", "q8s32")),
    ],
)
@pytest.mark.parametrize("rounding", ["search", "compensated"])
def test_types_may_be_mixed(
    tiny_256: Checkpoint, tmp_path: Path, rules: tuple[tuple[str, str], ...], rounding: str
) -> None:
    recipe = Recipe("mixed", ONNX, "q4a64", rules, INT4_LIMITS)
    nearest, better = (error_of(tiny_256, tmp_path, recipe, how) for how in ("nearest", rounding))
    assert better < nearest


def test_the_tied_matrix_alone(nano: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe("head", ONNX, "q4a128", ((LAYERS, "float32"),), INT4_LIMITS)
    nearest, search, compensated = (error_of(nano, tmp_path, recipe, how) for how in ROUNDINGS)
    assert search < nearest and compensated < 0.8 * nearest


def test_column_scales_by_hand(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "in"))
    rows = checkpoint.float_rows(EMBEDDING)
    want = rows.square().mean(0).pow(0.25)
    torch.testing.assert_close(column_scales(checkpoint, EMBEDDING), want / want.mean())


def test_silent_columns_are_left_alone(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.ones(tiny.shapes()[EMBEDDING])
    rows[:, 3] = 0
    rows[:, 5] = 16
    monkeypatch.setattr(Checkpoint, "float_rows", lambda self, name, start, stop: rows[start:stop])
    scales = column_scales(tiny, EMBEDDING)
    assert scales[5] / scales[0] == pytest.approx(4) and scales[3] > 0
    assert torch.isfinite(scales).all()


def test_an_untied_head_has_column_scales_of_its_own(tiny_untied: Checkpoint, tmp_path: Path) -> None:
    artifact = export_onnx(tiny_untied, tmp_path / "out", find_recipe(ONNX, "q8s32"))
    sizes = {record.name: record.bytes for record in artifact.manifest.tensors}
    rows, columns = tiny_untied.shapes()[HEAD]
    assert sizes[HEAD] == sizes[EMBEDDING] == rows * (columns + 4 * columns // 32) + 4 * columns
