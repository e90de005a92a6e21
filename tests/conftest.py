"""Fixtures that every room uses. The makers behind them are in helpers.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fox_edge.checkpoint import Checkpoint
from tests.helpers import TINY_256, make_checkpoint

# The models here are so small that a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied random checkpoint's folder, Gemma-like; not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Checkpoint:
    """That checkpoint, opened."""
    return Checkpoint.open(tiny_folder)


@pytest.fixture(scope="session")
def tiny_256(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tied random checkpoint whose rows hold whole blocks of 256 weights."""
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny_256", TINY_256))


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An untied random checkpoint with a Llama-like tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_untied"
    return Checkpoint.open(make_checkpoint(folder, tied=False, gemma=False))
