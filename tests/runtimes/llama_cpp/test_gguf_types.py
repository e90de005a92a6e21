"""Every type that a GGUF recipe may name: read here as ggml's C reads it, and computed with by llama.cpp."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from export.ggml import TYPE_NUMBERS, library
from export.gguf import export_gguf
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, TYPES, find_recipe, type_names
from runtimes.base import SessionOptions
from runtimes.llama_cpp.gguf_file import GgufFile, dequantize
from runtimes.llama_cpp.session import LlamaCppSession
from tests.helpers import TINY_256, make_checkpoint

# Reading these is no arithmetic of ggml's.
QUANTIZED = [name for name in type_names(GGUF) if name not in ("f32", "f16", "bf16")]


class Traits(ctypes.Structure):
    """The start of struct ggml_type_traits in ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def traits(name: str) -> Traits:
    get = library().ggml_get_type_traits
    get.restype, get.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    found: Traits = get(TYPE_NUMBERS[name]).contents
    return found


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_block_is_read_as_ggml_reads_it(name: str) -> None:
    """Blocks of random bytes: every level, scale and sign that there is, not only a quantizer's."""
    ours, theirs = TYPES[GGUF, name], traits(name)
    assert theirs.name.decode() == name or theirs.name.decode().lower() == name
    assert (theirs.block_size, theirs.block_bytes) == (ours.block_size, ours.block_bits // 8)
    count = 2000
    blocks = np.random.default_rng(0).integers(0, 256, (count, theirs.block_bytes), dtype=np.uint8)
    c = np.empty((count, theirs.block_size), dtype=np.float32)
    with np.errstate(all="ignore"):  # many of the scales are no numbers
        theirs.to_float(blocks.ctypes.data, c.ctypes.data, c.size)
        np.testing.assert_allclose(dequantize(blocks, name), c, rtol=2e-6, equal_nan=True)
    assert np.isfinite(c).any()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One layer: the one-bit types take seconds per million weights."""
    config = dataclasses.replace(TINY_256, num_layers=1, intermediate_size=256)
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("types") / "checkpoint", config))


@pytest.mark.parametrize("name", type_names(GGUF))
def test_llama_cpp_computes_with_what_verification_reads(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Logits of the session are the reference model's with the file's own dequantized weights in it.

    llama.cpp rounds activations too (to 8 bits and a scale), which leaves a few percent; a misread type would
    leave nothing.
    """
    artifact = export_gguf(checkpoint, tmp_path / "out", find_recipe(GGUF, name), rounding="search")
    assert name in {record.type for record in artifact.manifest.tensors}
    model = checkpoint.load_model()
    file = GgufFile(artifact)
    with torch.no_grad():
        for tensor, weight in model.named_parameters():
            rows = weight.shape[0] if weight.dim() == 2 else 1
            weight.copy_(torch.from_numpy(file.rows(tensor, 0, rows)).view_as(weight))
    file.close()
    tokens = np.random.default_rng(0).integers(8, 512, size=60).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0].numpy()
    with LlamaCppSession(artifact, SessionOptions(threads=1)) as session:
        got = np.concatenate(list(session.score(tokens)))
    assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)
