"""Another tool rewrites an exported model in its folder: verification says whether the tie survived."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from benchmarks.fidelity.verify import verify, verify_foreign
from export.onnx import DATA_FILE, MODEL_FILE, export_onnx
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import ONNX, Limits, find_recipe
from runtimes.onnx.foreign import ForeignOnnx

LOOSE = Limits(mean_kl_nats=0.5, greedy_tokens=0)
# nano's tied matrix at 4 bits; each block of 128 has a float32 scale and half a byte of zero point.
MATRIX = 8192 * 256 // 2
# What two names share all the same when each initializer is saved on its own: scales and zero points.
WHOLE = MATRIX + 8192 * 2 * 4 + 8192


@pytest.fixture(scope="module")
def exported(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_onnx(
        nano, tmp_path_factory.mktemp("exported") / "int4", find_recipe(ONNX, "q4a128"), rounding="nearest"
    )


def one_file(path: Path) -> None:
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=True)


def one_file_over_the_old(path: Path) -> None:
    model = onnx.load(path)
    (path.parent / DATA_FILE).unlink()  # onnx appends to a file that is there
    onnx.save_model(model, path, save_as_external_data=True, location=DATA_FILE)


def a_file_each(path: Path) -> None:
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, all_tensors_to_one_file=False)


def inside_the_model_file(path: Path) -> None:
    onnx.save_model(onnx.load(path), path)


def converted(path: Path) -> None:
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin")
    onnx.save_model(model, path)


def optimized(level: str, *entries: tuple[str, str]) -> Callable[[Path], None]:
    """What onnxruntime saves of a graph that it has optimized."""

    def rewrite(path: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        for key, value in entries:
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        path.with_name("optimized.onnx").rename(path)

    rewrite.__name__ = f"optimized {level} {len(entries)}"
    return rewrite


BREAK = [
    one_file,
    one_file_over_the_old,
    a_file_each,
    inside_the_model_file,
    converted,
    optimized("ORT_ENABLE_BASIC", ("file_name", "weights.bin"), ("min_size_in_bytes", "1024")),
]
KEEP = [optimized(level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")]


def rewritten(exported: Artifact, rewrite: Callable[[Path], None], folder: Path) -> Artifact:
    shutil.copytree(exported.path, folder)
    rewrite(folder / MODEL_FILE)
    return Artifact(folder, exported.manifest)


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"]}


@pytest.mark.parametrize("rewrite", BREAK, ids=lambda f: f.__name__)
def test_a_broken_tie(
    rewrite: Callable[[Path], None], exported: Artifact, nano: Checkpoint, tmp_path: Path
) -> None:
    artifact = rewritten(exported, rewrite, tmp_path / "copy")
    report = verify(artifact, nano, LOOSE, threads=1)
    found = rows(report)
    assert not report["passed"] and MODEL_FILE in found["files"]["detail"]
    sentence = (
        f"embedding and head are two copies: the head's 'lm_head.weight' takes {MATRIX:,} bytes besides the "
        f"{WHOLE:,} of the embedding's 'model.embed_tokens.weight'"
    )
    assert not found["tie"]["passed"] and found["tie"]["detail"] == f"{artifact.model_path}: {sentence}"
    # Nothing else is wrong with it: it is the same model, only larger.
    assert {name for name, check in found.items() if not check["passed"]} == {"files", "tie"}
    # The file alone, without our manifest, tells the same as a finding.
    foreign = verify_foreign(ForeignOnnx.open(artifact.model_path), nano, LOOSE, threads=1)
    assert foreign["passed"] and rows(foreign)["tie"]["detail"] == sentence
    assert rows(foreign)["tie"]["finding"]
    assert (foreign["tied_copies"], foreign["second_copy_bytes"]) == (2, MATRIX)


@pytest.mark.parametrize("rewrite", KEEP, ids=lambda f: f.__name__)
def test_a_tie_that_survives(
    rewrite: Callable[[Path], None], exported: Artifact, nano: Checkpoint, tmp_path: Path
) -> None:
    """onnxruntime leaves the weights where they are when it saves a graph."""
    artifact = rewritten(exported, rewrite, tmp_path / "copy")
    found = rows(verify(artifact, nano, LOOSE, threads=1))
    assert found["tie"]["passed"] and "hold them once" in found["tie"]["detail"]
    assert {name for name, check in found.items() if not check["passed"]} == {"files"}
    foreign = verify_foreign(ForeignOnnx.open(artifact.model_path), nano, LOOSE, threads=1)
    assert (
        rows(foreign)["tie"]["detail"] == f"embedding and head are one copy of {WHOLE:,} bytes in the files"
    )
    assert not rows(foreign)["tie"]["finding"]
    assert (foreign["tied_copies"], foreign["second_copy_bytes"]) == (1, 0)
