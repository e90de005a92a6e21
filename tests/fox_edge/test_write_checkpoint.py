"""A checkpoint is written whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fox_edge import checkpoint as checkpoint_module
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.errors import CheckpointError
from tests.helpers import TINY, random_tensors

EMBEDDING = "model.embed_tokens.weight"


def test_write_and_read_back(tmp_path: Path, tiny: Checkpoint) -> None:
    tensors = random_tensors(TINY)
    pieces = [(n, rows) for n, t in tensors.items() for rows in ([t] if t.dim() == 1 else t.split(100))]
    write_checkpoint(tmp_path / "copy", TINY, pieces, tiny.tokenizer_files(), token_ids={"bos_token_id": 2})
    copy = Checkpoint.open(tmp_path / "copy")
    assert copy.digest() == tiny.digest() and not copy.notes
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(loaded.lm_head.weight.float(), tensors[EMBEDDING].float())


def test_write_refuses_existing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(tmp_path, TINY, [])


def test_write_incomplete_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got 0 of 64 weights"):
        write_checkpoint(tmp_path / "m", TINY, list(random_tensors(TINY).items())[:-1])
    assert list(tmp_path.iterdir()) == []


def test_write_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.SafetensorsWriter, "write_rows", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(tmp_path / "m", TINY, random_tensors(TINY).items())
    assert list(tmp_path.iterdir()) == []


def test_write_asks_for_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(
        CheckpointError, match=rf"needs {2 * TINY.num_parameters()} bytes, but only 10 are free"
    ):
        write_checkpoint(tmp_path / "m", TINY, random_tensors(TINY).items())
    assert list(tmp_path.iterdir()) == []


def test_write_where_nobody_can(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "m", TINY, random_tensors(TINY).items())
