"""Packed weights kept beside an artifact: the same logits, less memory, nothing trusted that is not whole."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.onnx import export_onnx
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.quant import ONNX, find_recipe
from runtimes.artifact_cache import FOLDER, read_record, write_record
from runtimes.base import SessionOptions
from runtimes.onnx import prepacked as onnx_prepacked
from runtimes.onnx.external import read_graph
from runtimes.onnx.packing import lay_out
from runtimes.onnx.session import OnnxSession
from tests.helpers import TINY_256, random_tensors

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, TINY_256.vocab_size, 40)]


@pytest.fixture(scope="module", params=["q8s128", "q4a128"])
def exported(
    request: pytest.FixtureRequest, tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    folder = tmp_path_factory.mktemp("prepacked")
    write_checkpoint(folder / "in", TINY_256, random_tensors(TINY_256).items(), tiny.tokenizer_files())
    return export_onnx(Checkpoint.open(folder / "in"), folder / "out", find_recipe(ONNX, request.param))


@pytest.fixture
def artifact(exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A copy that tests may damage, of a size that is worth while."""
    monkeypatch.setattr(onnx_prepacked, "MIN_BYTES", 0)
    shutil.copytree(exported.path, tmp_path / "out")
    return Artifact(tmp_path / "out", exported.manifest)


def logits(artifact: Artifact, **options: object) -> np.ndarray:
    session = OnnxSession(artifact, SessionOptions(threads=1, **options))  # type: ignore[arg-type]
    rows = [session.prefill(TOKENS), session.step(3)]
    session.close()
    return np.stack(rows)


def kept(artifact: Artifact) -> Path:
    """The only folder of packed weights."""
    (folder,) = (artifact.path / FOLDER).glob("packed-*")
    return folder


def test_the_second_start_maps_what_the_first_packed(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    want = logits(artifact, cache=False)
    assert not (artifact.path / FOLDER).exists() and not capsys.readouterr().err
    np.testing.assert_array_equal(logits(artifact), want)
    assert "of weights packed for this processor" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in kept(artifact).iterdir()}
    assert {path.name for path in before} == {"packed.bin", "index.json"}
    np.testing.assert_array_equal(logits(artifact), want)
    assert not capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in kept(artifact).iterdir()}


def test_the_artifact_does_not_know(artifact: Artifact) -> None:
    size = artifact.total_bytes()
    logits(artifact)
    assert kept(artifact).is_dir()
    assert artifact.total_bytes() == size and not list(artifact.changed_files())
    assert Artifact.open(artifact.path).manifest == artifact.manifest


def test_a_replaced_artifact_starts_anew(artifact: Artifact, exported: Artifact) -> None:
    logits(artifact)
    source, recipe = Checkpoint.open(exported.path.parent / "in"), find_recipe(ONNX, "q8s64")
    other = export_onnx(source, artifact.path, recipe, replace=True)
    assert not (artifact.path / FOLDER).exists()
    want = logits(other, cache=False)
    np.testing.assert_array_equal(logits(other), want)
    np.testing.assert_array_equal(logits(other), want)


def test_the_packed_bytes_are_what_runs(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that the others test something: with no check of any kind, damage changes the logits."""
    want = logits(artifact)
    packed = kept(artifact) / "packed.bin"
    packed.write_bytes(bytes(packed.stat().st_size))
    monkeypatch.setattr(onnx_prepacked, "_is_whole", lambda *_: True)
    monkeypatch.setattr(onnx_prepacked.Prepacked, "holds", lambda self, logits: True)
    assert np.abs(logits(artifact) - want).max() > 0.1


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "first byte": lambda folder: flip(folder / "packed.bin", 0),
    "a byte in the middle": lambda folder: flip(
        folder / "packed.bin", (folder / "packed.bin").stat().st_size // 2
    ),
    "last byte": lambda folder: flip(folder / "packed.bin", -1),
    "short": lambda folder: os.truncate(folder / "packed.bin", (folder / "packed.bin").stat().st_size - 1),
    "long": lambda folder: os.truncate(folder / "packed.bin", (folder / "packed.bin").stat().st_size + 1),
    "no packed file": lambda folder: (folder / "packed.bin").unlink(),
    "index: a digit": lambda folder: flip(folder / "index.json", 200),
    "index: empty": lambda folder: (folder / "index.json").write_bytes(b""),
    "index: no object": lambda folder: (folder / "index.json").write_text("[" * 100_000),
    "index: missing": lambda folder: (folder / "index.json").unlink(),
    "index: huge": lambda folder: os.truncate(folder / "index.json", 1 << 30),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_anew(damage: str, artifact: Artifact) -> None:
    want = logits(artifact)
    whole = {path.name: path.read_bytes() for path in kept(artifact).iterdir()}
    DAMAGE[damage](kept(artifact))
    np.testing.assert_array_equal(logits(artifact), want)
    assert {path.name: path.read_bytes() for path in kept(artifact).iterdir()} == whole


@pytest.mark.parametrize("field", ["keys", "checksums", "logits", "made_for"])
@pytest.mark.parametrize("value", [None, [], {}, ["x"], {"x": 1}])
def test_an_index_that_says_something_else(field: str, value: object, artifact: Artifact) -> None:
    want = logits(artifact)
    index = kept(artifact) / "index.json"
    write_record(index, (read_record(index) or {}) | {field: value})
    np.testing.assert_array_equal(logits(artifact), want)


def test_a_key_cannot_name_other_bytes(artifact: Artifact) -> None:
    want = logits(artifact)
    index = kept(artifact) / "index.json"
    fields = read_record(index) or {}
    name = next(iter(fields["keys"]))
    fields["keys"][name] = "MatMulNBits+1|0;999999999999;0"
    write_record(index, fields)
    np.testing.assert_array_equal(logits(artifact), want)
    assert (read_record(index) or {})["keys"][name] != fields["keys"][name]


def test_packed_weights_that_onnxruntime_does_not_find(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if a hash had changed: the checksums hold, the logits tell, and it is not tried again."""
    want = logits(artifact)
    index = kept(artifact) / "index.json"
    fields = read_record(index) or {}
    fields["keys"] = {name: f"MatMulNBits+{n}" for n, name in enumerate(fields["keys"])}
    write_record(index, fields)
    capsys.readouterr()
    np.testing.assert_array_equal(logits(artifact), want)
    assert "does not find its packed weights; going on without" in capsys.readouterr().err
    np.testing.assert_array_equal(logits(artifact), want)
    assert not capsys.readouterr().err and [p.name for p in kept(artifact).iterdir()] == ["index.json"]


def _new_version(artifact: Artifact, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnx_prepacked.ort, "__version__", "99.0")


def _new_processor(artifact: Artifact, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnx_prepacked, "processor", lambda: "another")


def _new_file(artifact: Artifact, patch: pytest.MonkeyPatch) -> None:
    os.utime(artifact.path / "model.onnx_data", ns=(1, 1))


def _new_graph(artifact: Artifact, patch: pytest.MonkeyPatch) -> None:
    model = onnx.load(artifact.model_path, load_external_data=False)
    model.doc_string = "another"
    onnx.save(model, artifact.model_path)


@pytest.mark.parametrize("change", [_new_version, _new_processor, _new_file, _new_graph])
def test_what_was_made_for_something_else_goes(
    change: object, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logits(artifact)
    old = kept(artifact)
    assert callable(change)
    change(artifact, monkeypatch)
    np.testing.assert_array_equal(logits(artifact), want)
    assert kept(artifact) != old


def test_only_what_is_abandoned_is_removed(artifact: Artifact) -> None:
    root = artifact.path / FOLDER
    for name in ("packed-old.partial", "packed-new.partial", "packed-0123456789abcdef", "kv-scales"):
        (root / name).mkdir(parents=True)
    hour_ago = time.time() - 3700
    os.utime(root / "packed-old.partial", (hour_ago, hour_ago))
    logits(artifact)
    names = {path.name for path in root.iterdir()}
    assert {"packed-new.partial", "kv-scales"} < names and len(names) == 3


@pytest.mark.parametrize("order", [("float32", "int8"), ("int8", "float32")])
def test_one_cache_serves_both_kv_caches(
    order: tuple[str, str], artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    want = {kv: logits(artifact, cache=False, kv=kv) for kv in order}
    np.testing.assert_array_equal(logits(artifact, kv=order[0]), want[order[0]])
    made = kept(artifact)
    assert "of weights packed" in capsys.readouterr().err
    for kv in order:
        np.testing.assert_array_equal(logits(artifact, kv=kv), want[kv])
    assert kept(artifact) == made and not capsys.readouterr().err


def test_without_a_place_to_write(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    want = logits(artifact, cache=False)
    (artifact.path / FOLDER).write_text("in the way")
    np.testing.assert_array_equal(logits(artifact), want)
    assert not capsys.readouterr().err


def test_a_full_disk(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 30))
    logits(artifact)
    assert not (artifact.path / FOLDER).exists()


def test_a_link_is_not_followed(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (artifact.path / FOLDER).symlink_to(tmp_path / "elsewhere")
    logits(artifact)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_only_the_artifacts_own_accuracy_level_is_kept(artifact: Artifact) -> None:
    logits(artifact, accuracy_level=1)
    assert not (artifact.path / FOLDER).exists()


def test_a_small_model_needs_none(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_prepacked, "MIN_BYTES", 64 << 20)
    logits(artifact)
    assert not (artifact.path / FOLDER).exists()


def test_the_layout_leaves_room_for_every_matrix_and_none_for_others(artifact: Artifact) -> None:
    model = read_graph(artifact.model_path)
    slots = lay_out(model)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert [slot.name for slot in slots] == [node.input[1] for node in products]
    assert all(slot.offset % 65536 == 0 and slot.size > slot.raw for slot in slots)
    assert all(a.offset + a.size == b.offset for a, b in itertools.pairwise(slots))
    # A matrix that something else reads too must stay what it is.
    model.graph.node.add(op_type="Identity", input=[slots[0].name], output=["copy"])
    assert [slot.name for slot in lay_out(model)] == [slot.name for slot in slots[1:]]
    # One whose operator reckons with another size is left to onnxruntime.
    next(a for a in products[1].attribute if a.name == "N").i += 1
    assert [slot.name for slot in lay_out(model)] == [slot.name for slot in slots[2:]]


# --- memory -------------------------------------------------------------------------------------------------

# What opening a session and running it adds to a fresh process's own memory, in bytes.
_MEASURE = """
import re, sys
from pathlib import Path
from fox_edge.artifact import Artifact
from runtimes.onnx import prepacked as onnx_prepacked
from runtimes.base import SessionOptions
from runtimes.onnx.session import OnnxSession

def own() -> int:
    return 1024 * int(re.search(r"Anonymous: +([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])

onnx_prepacked.MIN_BYTES = 0
artifact = Artifact.open(Path(sys.argv[1]))
before = own()
session = OnnxSession(artifact, SessionOptions(context=8, threads=1))
session.prefill([1, 2, 3])
print(own() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_packed_weights_are_no_memory_of_the_process(tiny: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_256, vocab_size=65_536, hidden_size=512, num_layers=1)
    write_checkpoint(tmp_path / "in", config, random_tensors(config).items(), tiny.tokenizer_files())
    artifact = export_onnx(Checkpoint.open(tmp_path / "in"), tmp_path / "out", find_recipe(ONNX, "q8s128"))
    taken = []
    for _ in range(2):
        run = [sys.executable, "-c", _MEASURE, str(artifact.path)]
        measured = subprocess.run(run, capture_output=True, text=True, check=True)
        taken.append(int(measured.stdout))
    matrix = artifact.manifest.tensors[0].bytes
    assert taken[0] > matrix > 2 * taken[1]
