"""Inputs for tests of the kernels: random, on a card where there is one, else for Triton's interpreter.

tests/conftest.py turns the interpreter on.
"""

import zlib

import pytest
import torch
from torch import Tensor

from runtimes.cuda.ops_matrix import Dense, Packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# (bits, block, scale type, offsets, factors) of packed matrices
PACKED = [
    (4, 16, torch.float32, True, False),
    (4, 32, torch.float16, False, False),
    (4, 128, torch.float32, True, True),
    (8, 16, torch.float32, True, False),
    (8, 32, torch.float16, True, True),
    (8, 256, torch.float32, False, False),
]


def error(found: Tensor, due: Tensor) -> float:
    """||found - due|| / ||due||; NaN for NaN, which is below no bound."""
    return float((found.double() - due.double()).norm() / due.double().norm())


@pytest.fixture(autouse=True)
def fresh(monkeypatch, request):
    """Inputs of its own for each test, and no memory that could be right by chance."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    plain_empty = torch.empty

    def poisoned(*args, **kwargs):
        return plain_empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))


def normal(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def dense(rows: int, columns: int) -> Dense:
    return Dense(normal(rows, columns) * columns**-0.5)


def packed(rows: int, columns: int, kind=PACKED[0]) -> Packed:
    bits, block, scale_type, offsets, factors = kind
    integers = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, device=DEVICE)
    size = columns**-0.5
    scales = normal(rows, columns // block) * size / 2 ** (bits - 2)  # some negative, as in symmetric types
    zeros = (normal(rows, columns // block) * size).to(scale_type) if offsets else None
    spread = normal(columns).abs() if factors else None
    return Packed(integers, scales.to(scale_type), zeros, bits, block, spread)
