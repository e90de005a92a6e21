"""ggml's block types as integers with scales and offsets: what a GGUF file stores, taken apart on the device.

One row of a table per type: the form that holds it exactly, and a function from raw blocks to levels. The
layouts are those of llama.cpp's ggml-common.h and ggml-quants.c. Of every type here, integer * scale + offset
in float32 is to the bit what dequantization gives. The types whose weights are points of a lattice (iq1, iq2,
iq3) are not in the table. Knows bytes; not files or names.

Shapes: m blocks of K weights; each has S scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from runtimes.cuda.form import Form, Levels

# The 16 values of iq4_nl and iq4_xs, and of mxfp4 and nvfp4 (doubled), as ggml has them.
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_ZERO = 128
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

# Integers uint8 (m, K), scales float32 (m, S), and offsets (m, S) or the integer that stands for 0.
_Parts = tuple[Tensor, Tensor, Tensor | int]


class BlockType(NamedTuple):
    """How one of ggml's types is held, and taken apart: raw blocks (m, bytes) to parts."""

    block_bytes: int
    form: Form
    split: Callable[[Tensor], _Parts]


def levels(raw: Tensor, kind: BlockType) -> Levels:
    """Rows of raw blocks, uint8 (n, bytes of a row), as integers, scales and offsets of those rows."""
    integers, scales, zero = kind.split(raw.reshape(-1, kind.block_bytes))
    integers, scales = integers.reshape(len(raw), -1), scales.reshape(len(raw), -1)
    if isinstance(zero, int):
        return Levels(integers, scales, None, zero)
    return Levels(integers, scales, zero.reshape(len(raw), -1))


def _float16(raw: Tensor) -> Tensor:
    """Bytes (m, 2 n) as float32 (m, n)."""
    return raw.contiguous().view(torch.float16).float()


def _fields(raw: Tensor, bits: int, run: int) -> Tensor:
    """Integers of some bits from bytes (m, n): first the lowest field of `run` bytes, then the next field."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
    split = raw.reshape(len(raw), -1, 1, run) >> shifts[:, None]
    return (split & (2**bits - 1)).reshape(len(raw), -1)


def _bits(raw: Tensor) -> Tensor:
    """Bits of bytes (m, n), lowest first: (m, 8 n)."""
    return _fields(raw, 1, 1)


def _table(values: tuple[int, ...], numbers: Tensor) -> Tensor:
    """Values of a table, shifted by _ZERO so that none is negative, uint8."""
    shifted = torch.tensor([v + _ZERO for v in values], dtype=torch.uint8, device=numbers.device)
    return shifted[numbers.long()]


def _q4_0(b: Tensor) -> _Parts:
    return _fields(b[:, 2:], 4, 16), _float16(b[:, :2]), 8


def _q4_1(b: Tensor) -> _Parts:
    return _fields(b[:, 4:], 4, 16), _float16(b[:, :2]), _float16(b[:, 2:4])


def _q5_0(b: Tensor) -> _Parts:
    return _fields(b[:, 6:], 4, 16) | _bits(b[:, 2:6]) << 4, _float16(b[:, :2]), 16


def _q5_1(b: Tensor) -> _Parts:
    return _fields(b[:, 8:], 4, 16) | _bits(b[:, 4:8]) << 4, _float16(b[:, :2]), _float16(b[:, 2:4])


def _q8_0(b: Tensor) -> _Parts:
    return b[:, 2:] ^ 128, _float16(b[:, :2]), 128  # a signed byte, plus 128


def _q2_k(b: Tensor) -> _Parts:
    scales, d, least = b[:, :16], _float16(b[:, 80:82]), _float16(b[:, 82:84])
    return _fields(b[:, 16:80], 2, 32), d * (scales & 15), -(least * (scales >> 4))


def _q3_k(b: Tensor) -> _Parts:
    low, high = _fields(b[:, 96:104], 4, 8), _fields(b[:, 104:108], 2, 4)
    d = _float16(b[:, 108:110]) * ((low | high << 4).float() - 32)
    # The third bit says that 4 is not to be taken away.
    return _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2, d, 4


def _scales_and_mins(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets (m, 8) of q4_k and q5_k: two float16, then 8 + 8 numbers of 6 bits in 12 bytes."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((first & 63, rest & 15 | (first >> 2) & 48), dim=1)
    least = torch.cat((second & 63, rest >> 4 | (second >> 2) & 48), dim=1)
    return _float16(b[:, :2]) * scales, -(_float16(b[:, 2:4]) * least)


def _q4_k(b: Tensor) -> _Parts:
    return _fields(b[:, 16:], 4, 32), *_scales_and_mins(b)


def _q5_k(b: Tensor) -> _Parts:
    return _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4, *_scales_and_mins(b)


def _q6_k(b: Tensor) -> _Parts:
    d = _float16(b[:, 208:210]) * b[:, 192:208].view(torch.int8)
    return _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4, d, 32


def _tq2_0(b: Tensor) -> _Parts:
    return _fields(b[:, :64], 2, 32), _float16(b[:, 64:66]), 1


def _tq1_0(b: Tensor) -> _Parts:
    """Five digits of base 3 in a byte, as a fraction: times 3^n, the next one is before the point."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=b.device)
    runs = ((b[:, :32], 5), (b[:, 32:48], 5), (b[:, 48:52], 4))
    digits = [(run[:, None] * powers[:count, None]).flatten(1) for run, count in runs]
    return (torch.cat(digits, dim=1).int() * 3 >> 8).to(torch.uint8), _float16(b[:, 52:54]), 1


def _q1_0(b: Tensor) -> _Parts:
    return _bits(b[:, 2:]) * 2, _float16(b[:, :2]), 1


def _iq4_nl(b: Tensor) -> _Parts:
    return _table(_NONLINEAR, _fields(b[:, 2:], 4, 16)), _float16(b[:, :2]), _ZERO


def _iq4_xs(b: Tensor) -> _Parts:
    low, high = _fields(b[:, 4:8], 4, 1), _fields(b[:, 2:4], 2, 1)
    d = _float16(b[:, :2]) * ((low | high << 4).float() - 32)
    return _table(_NONLINEAR, _fields(b[:, 8:], 4, 16)), d, _ZERO


def _mxfp4(b: Tensor) -> _Parts:
    """The scale is 2^(e - 128), which is subnormal for the two smallest exponents."""
    exponent = b[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _table(_E2M1, _fields(b[:, 1:], 4, 16)), bits.view(torch.float32), _ZERO


def _nvfp4(b: Tensor) -> _Parts:
    """Four scales of 4 exponent and 3 mantissa bits (bias 7), halved since the table is doubled."""
    byte = b[:, :4].int()
    exponent, mantissa = byte >> 3 & 15, (byte & 7).float()
    normal = (1 + mantissa / 8) * torch.exp2((exponent - 7).float())
    d = torch.where(exponent == 0, mantissa * 2**-9, normal) / 2
    d = torch.where((byte == 0) | (byte == 0x7F), 0.0, d)
    return _table(_E2M1, _fields(b[:, 4:], 4, 8)), d, _ZERO


def _row(
    block_bytes: int, split: Callable[[Tensor], _Parts], bits: int, block: int, *words: str
) -> BlockType:
    """A row of the table; `words`: 'half' for float16 scales, 'offsets' for blocks that are not symmetric."""
    return BlockType(block_bytes, Form(bits, block, "half" in words, "offsets" not in words), split)


BLOCK_TYPES: dict[str, BlockType] = {
    "q4_0": _row(18, _q4_0, 4, 32, "half"),
    "q4_1": _row(20, _q4_1, 4, 32, "half", "offsets"),
    "q5_0": _row(22, _q5_0, 8, 32, "half"),
    "q5_1": _row(24, _q5_1, 8, 32, "half", "offsets"),
    "q8_0": _row(34, _q8_0, 8, 32, "half"),
    "q2_k": _row(84, _q2_k, 4, 16, "offsets"),
    "q3_k": _row(110, _q3_k, 4, 16),
    "q4_k": _row(144, _q4_k, 4, 32, "offsets"),
    "q5_k": _row(176, _q5_k, 8, 32, "offsets"),
    "q6_k": _row(210, _q6_k, 8, 16),
    "tq2_0": _row(66, _tq2_0, 4, 256, "half"),
    "tq1_0": _row(54, _tq1_0, 4, 256, "half"),
    "q1_0": _row(18, _q1_0, 4, 128, "half"),
    "iq4_nl": _row(18, _iq4_nl, 8, 32, "half"),
    "iq4_xs": _row(136, _iq4_xs, 8, 32),
    "mxfp4": _row(17, _mxfp4, 8, 32),
    "nvfp4": _row(36, _nvfp4, 8, 16),
}
