"""Bad input: data files that are not as they were written, and manifests that lie, refused at opening."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.gguf import export_gguf
from export.onnx import DATA_FILE, export_onnx
from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, FoxEdgeError
from fox_edge.quant import GGUF, ONNX, find_recipe
from runtimes.base import SessionOptions, open_session

OPTIONS = SessionOptions(threads=1, cache=False)


@pytest.fixture(scope="module")
def exported(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_onnx(tiny, tmp_path_factory.mktemp("artifact") / "int8", find_recipe(ONNX, "int8"))


@pytest.fixture
def copy(exported: Artifact, tmp_path: Path) -> Path:
    return shutil.copytree(exported.path, tmp_path / "copy")


def opened(folder: Path) -> None:
    open_session(Artifact.open(folder), OPTIONS).close()


def lie_to(folder: Path, **fields: Any) -> None:
    told = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(told | fields))


def test_as_it_was_written(copy: Path) -> None:
    opened(copy)


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def beheaded(path: Path) -> None:
    path.write_bytes(path.read_bytes()[1:])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def shifted(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes())


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def moved(path: Path) -> None:
    (path.parent / "data").mkdir()
    path.rename(path.parent / "data" / path.name)


def moved_and_linked(path: Path) -> None:
    path.rename(path.parents[1] / path.name)
    path.symlink_to(path.parents[1] / path.name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (short, "tensor '.*' needs .* but the file has"),
        (beheaded, "tensor '.*' needs .* but the file has"),
        (longer, "its last tensor ends at [0-9]+: 1 do not belong there"),
        (shifted, "its last tensor ends at [0-9]+: 1 do not belong there"),
        (empty, "but the file has 0"),
        (missing, f"{DATA_FILE}: named by the manifest, but missing"),
        (moved, f"{DATA_FILE}: named by the manifest, but missing"),
        (moved_and_linked, f"names data in '{DATA_FILE}', which is no file of this folder"),
    ],
)
def test_a_data_file_that_is_not_as_it_was(damage: Callable[[Path], None], words: str, copy: Path) -> None:
    damage(copy / DATA_FILE)
    with pytest.raises(ArtifactError, match=words) as error:
        opened(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"context": 4096}, "promises a context of 4096, but the graph has tables for 256 positions"),
        ({"context": -1}, "field 'context' is -1, but must be at least 1"),
        ({"model_file": "genai.onnx"}, r"names 'genai\.onnx' as the model, but that graph has no input"),
        ({"model_file": "config.json"}, r"config\.json: [0-9]+ bytes that are no ONNX model"),
        ({"model_file": DATA_FILE}, "_data: [0-9]+ bytes that are no ONNX model"),
        ({"model_file": "gone.onnx"}, r"gone\.onnx: named by the manifest, but missing"),
        ({"model_file": "../model.onnx"}, "is not a plain file name inside the artifact's folder"),
        ({"format": "gguf"}, r"model\.onnx: not a GGUF file"),
        ({"format": "tflite"}, "no runtime opens the format 'tflite'"),
    ],
)
def test_a_manifest_that_lies(lie: dict[str, Any], words: str, copy: Path) -> None:
    lie_to(copy, **lie)
    with pytest.raises(FoxEdgeError, match=words) as error:
        opened(copy)
    assert "\n" not in str(error.value)


def test_a_smaller_context_than_the_graphs_is_no_lie(copy: Path) -> None:
    lie_to(copy, context=100)
    assert open_session(Artifact.open(copy), OPTIONS).context == 100


def test_a_gguf_manifest_that_promises_more_than_the_file(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = export_gguf(tiny, tmp_path / "gguf", find_recipe(GGUF, "q8_0")).path
    lie_to(folder, context=4096)
    with pytest.raises(ArtifactError, match="promises a context of 4096, but the model has 256"):
        opened(folder)
