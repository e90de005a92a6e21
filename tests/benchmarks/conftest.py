"""A small random checkpoint with nano's tokenizer, written once."""

from pathlib import Path

import pytest
import torch

import fox_edge.nano
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.config import FoxConfig

NANO = Path(fox_edge.nano.__file__).parent


def make_checkpoint(folder: Path, seed: int = 0, **fields) -> Checkpoint:
    """Random weights of a trained model's sizes: norms about 1, matrices about 1/sqrt(columns)."""
    shape = {
        "vocab_size": 8192,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_positions": 512,
    }
    config = FoxConfig(**{**shape, **fields})
    rng = torch.Generator().manual_seed(seed)
    tensors = (
        (
            name,
            torch.randn(size, generator=rng) / size[-1] ** 0.5
            if len(size) == 2
            else 1 + 0.1 * torch.randn(size, generator=rng),
        )
        for name, size in config.tensor_shapes().items()
    )
    files = [p for p in NANO.iterdir() if p.name.startswith(("tokenizer", "special_tokens", "chat_template"))]
    write_checkpoint(folder, config, tensors, files)
    return Checkpoint.open(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture
def known_machine(monkeypatch):
    """A machine whose bandwidth is known, and that reckons neither operations nor memory."""
    from benchmarks.devices.roofline import Bandwidth
    from benchmarks.latency import bounds, ceilings

    ceiling = Bandwidth(1e9, "said", 1 << 20, 1, {"said": 1e9})
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda *_, **__: ceiling)
    monkeypatch.setattr(bounds, "measure_compute", lambda *_: [])
    monkeypatch.setattr(bounds, "needs_of", lambda *_: {})


@pytest.fixture(scope="session")
def nano_onnx(tmp_path_factory):
    """The embedded model as an int8 ONNX artifact; not to be written to."""
    from export.onnx import export_onnx
    from fox_edge.quant import ONNX, find_recipe

    folder = tmp_path_factory.mktemp("artifacts") / "nano-onnx"
    return export_onnx(Checkpoint.open("nano"), folder, find_recipe(ONNX, "int8"), verify=None, threads=1)
