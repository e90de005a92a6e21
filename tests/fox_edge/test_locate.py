"""From a name to a folder: what is no checkpoint is told what it is, and the hub is asked only when due."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fox_edge import locate
from fox_edge.checkpoint import Checkpoint
from tests.helpers import make_checkpoint, message_of


def test_not_a_checkpoint(tmp_path: Path) -> None:
    assert "no such folder" in message_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in message_of(tmp_path / "empty")
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "GGUF" in message_of(gguf)
    assert "a GGUF file" in message_of(gguf / "model.gguf")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "manifest.json").write_text("{}")
    assert "exported model" in message_of(tmp_path / "exported")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").write_text("hello")
    assert "no config.json" in message_of(tmp_path / "other")


def test_a_file_of_a_checkpoint(tiny_folder: Path) -> None:
    assert "a file, but a checkpoint's folder is due" in message_of(tiny_folder / "model.safetensors")


def test_other_architecture(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", fields={"model_type": "qwen2"})
    text = message_of(folder)
    assert str(folder) in text and "qwen2" in text


def test_no_weights(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in message_of(folder)


def test_corrupt_weights(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in message_of(folder)
    path.write_bytes(b"\xff" * 5000)
    assert "header claims" in message_of(folder)


# ---- the hub ----------------------------------------------------------------------------------------


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the real client, told to stay offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "the hub cannot be reached (nothing of it is in the local cache)" in message_of("owner/name")


def test_hub_download(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    asked: list[Any] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["allow_patterns"]))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = Checkpoint.open("owner/name")
    assert checkpoint.name == "owner/name"
    assert asked == [("owner/name", ["*.json", "*.jinja", "tokenizer.model", "model*.safetensors"])]


@pytest.mark.parametrize("error", [OSError("proxy\nrefused"), ValueError("odd"), ConnectionError("down")])
def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert message_of("owner/name").startswith("owner/name: download failed (")


def test_only_plain_hub_ids_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "download", lambda name: pytest.fail(f"asked the hub for {name}"))
    for name in ("nowhere", "./a/b", "a/b/c", "../b", "/a/b", "a b/c"):
        assert "no such folder" in message_of(name)
