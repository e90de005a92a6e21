"""Artifacts are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fox_edge import artifact as artifact_module
from fox_edge.artifact import Artifact, ArtifactWriter, Manifest, TensorRecord, sha256_file
from fox_edge.errors import ArtifactError

ROOT = Path(__file__).parents[2]


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format": "gguf",
        "quant": "int4",
        "model_file": "model.gguf",
        "tied": True,
        "parameters": 1000,
        "context": 256,
        "checkpoint": "nano",
        "checkpoint_sha256": "0" * 64,
        "tensors": (
            TensorRecord("a", "tok", (10, 90), "q6_k", 600),
            TensorRecord("b", "blk", (100,), "f32", 25, "because"),
        ),
        "recipe": {"default": "q4_k"},
        "versions": {"gguf": "0.19.0"},
        "notes": ("a note",),
    }
    return Manifest(**{**fields, **changes})


def write(target: Path, content: str = "weights", replace: bool = False) -> Artifact:
    with ArtifactWriter(target, replace) as writer:
        (writer.folder / "model.gguf").write_text(content)
        (writer.folder / "config.json").write_text("{}")
        return writer.commit(manifest())


def test_write_and_open(tmp_path: Path) -> None:
    written = write(tmp_path / "deep" / "out")
    opened = Artifact.open(tmp_path / "deep" / "out")
    assert opened.manifest == written.manifest
    assert opened.manifest.weight_bytes == 625 and opened.manifest.bits_per_weight == 5.0
    assert opened.model_path.read_text() == "weights"
    assert set(opened.manifest.files) == {"model.gguf", "config.json"}
    assert opened.manifest.files["config.json"] == sha256_file(opened.path / "config.json")
    assert opened.total_bytes() == sum(p.stat().st_size for p in opened.path.iterdir())
    assert list(opened.changed_files()) == []
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    artifact = write(tmp_path / "out")
    artifact.model_path.write_text("weightz")
    assert list(artifact.changed_files()) == ["model.gguf"]


def test_existing_target_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="exists already; choose another name or pass --replace"):
        write(tmp_path / "out", "other")
    assert (tmp_path / "out" / "model.gguf").read_text() == "weights"


def test_replace(tmp_path: Path) -> None:
    write(tmp_path / "out")
    write(tmp_path / "out", "other", replace=True)
    assert Artifact.open(tmp_path / "out").model_path.read_text() == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_replace_never_deletes_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(ArtifactError, match="not an exported model, so --replace does not apply"):
        write(tmp_path / "photos", replace=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="does not apply"):
        write(tmp_path / "file", replace=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def test_failed_replacement_keeps_the_old(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "out", replace=True) as writer:
        (writer.folder / "model.gguf").write_text("half")
        raise RuntimeError("a bug")
    assert Artifact.open(tmp_path / "out").model_path.read_text() == "weights"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failed_rename_restores_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ArtifactError, match="cannot be renamed into place"):
        write(tmp_path / "out", "other", replace=True)
    assert Artifact.open(tmp_path / "out").model_path.read_text() == "weights"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        (writer.folder / "model.gguf").write_text("half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_full_or_protected_disk(tmp_path: Path, code: int) -> None:
    words = rf"out: writing failed \({os.strerror(code)}\); nothing was kept"
    with pytest.raises(ArtifactError, match=words), ArtifactWriter(tmp_path / "out") as writer:
        (writer.folder / "model.gguf").write_text("half")
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_the_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact_module, "sha256_file", fail)
    with pytest.raises(ArtifactError, match="No space left on device"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk(tmp_path: Path) -> None:
    """/dev/full, where the system has it, fails every write as a full disk does."""
    full = Path("/dev/full")
    source = full if full.exists() else None
    with pytest.raises(ArtifactError, match="nothing was kept"), ArtifactWriter(tmp_path / "out") as writer:
        if source is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        (writer.folder / "model.gguf").symlink_to(source)
        (writer.folder / "model.gguf").write_text("weights")
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with (
        pytest.raises(ArtifactError, match=r"needs 11 bytes, but .*\b10\b"),
        ArtifactWriter(tmp_path / "out") as w,
    ):
        w.need(10)
        w.need(11)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_bugs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), ArtifactWriter(tmp_path / "out"):
        (tmp_path / "nothing").read_text()


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write(tmp_path / "file" / "out")


KILLED = """
import sys, time
from pathlib import Path
from fox_edge.artifact import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1]), replace=sys.argv[2] == "replace") as writer:
    with (writer.folder / "model.gguf").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("mode", ["fresh", "replace"])
def test_killed_export_leaves_nothing_that_looks_like_a_model(tmp_path: Path, mode: str) -> None:
    target = tmp_path / "out"
    if mode == "replace":
        write(target)
    arguments = [sys.executable, "-c", KILLED, str(target), mode]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    if mode == "replace":
        assert Artifact.open(target).model_path.read_text() == "weights"
    else:
        assert not target.exists()
    (left,) = [p for p in tmp_path.iterdir() if p != target]
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    with pytest.raises(ArtifactError, match="not an exported model"):
        Artifact.open(left)
    write(target, "second try", replace=mode == "replace")
    assert Artifact.open(target).model_path.read_text() == "second try"


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        Artifact.open(tmp_path / "none")
    with pytest.raises(ArtifactError, match="not an exported model"):
        Artifact.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="not a folder"):
        Artifact.open(tmp_path / "file")


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: fields.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("schema", 2), "schema 2, but this version reads 1"),
        (lambda f: f.pop("schema"), "schema None"),
        (_set("parameters", "many"), "'parameters' is missing or not of the expected kind"),
        (lambda f: f.pop("tensors"), "'tensors'"),
        (_set("tensors", [{"name": "a"}]), "'tensors' is not a list of tensor records"),
        (_set("tensors", [7]), "'tensors' is not a list of tensor records"),
        (_set("surprise", 1), "unknown field 'surprise'"),
        (_set("parameters", 0), "field 'parameters' is 0, but must be at least 1"),
        (_set("context", -1), "field 'context' is -1, but must be at least 1"),
        (_set("context", True), "field 'context' is True, but must be at least 1"),
        (_set("verification", "passed"), "'verification' is not of the expected kind"),
        (lambda f: f["tensors"][0].update(bytes=-1), "'tensors' is not a list of tensor records"),
        (lambda f: f["tensors"][0].update(bytes="many"), "'tensors' is not a list of tensor records"),
        (lambda f: f["tensors"][0].update(shape=[]), "'tensors' is not a list of tensor records"),
        (lambda f: f["tensors"][0].update(shape=[4, -4]), "'tensors' is not a list of tensor records"),
        (lambda f: f["tensors"][0].update(stored_as=7), "'tensors' is not a list of tensor records"),
        (_set("model_file", "../secret"), r"'\.\./secret' is not a plain file name"),
        (_set("model_file", "/etc/passwd"), "not a plain file name"),
        (_set("files", {"a/b": "0"}), "'a/b' is not a plain file name"),
        (_set("files", {"gone.json": "0"}), r"gone\.json: named by the manifest, but missing"),
    ],
)
def test_damaged_manifest(tmp_path: Path, change: Any, words: str) -> None:
    artifact = write(tmp_path / "out")
    path = artifact.path / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match=words):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_manifest_that_is_no_json(tmp_path: Path, text: str) -> None:
    artifact = write(tmp_path / "out")
    (artifact.path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Artifact.open(artifact.path)


def test_manifest_is_bounded(tmp_path: Path) -> None:
    artifact = write(tmp_path / "out")
    with (artifact.path / "manifest.json").open("r+b") as file:
        file.truncate(20 << 20)
    with pytest.raises(ArtifactError, match=f"{20 << 20} bytes"):
        Artifact.open(artifact.path)
