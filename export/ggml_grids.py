"""ggml's blocks taken apart: which values a block's weights can take, and which of them they take.

For the types whose weights are stored one by one, as a level times a scale, plus an offset. ggml finds the
scales; then the levels can be chosen anew, and a block's float16 factors moved to where they fit best, while
the file stays one that any llama.cpp reads. The layouts are those of the block structures in llama.cpp's
ggml-common.h. Knows bytes and the order of the work; not how levels are chosen (compensate.py).

Shapes: R rows, C columns, S blocks per row, G groups of one scale per block, K weights per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.compensate import Compensation, Steps, choose, choose_blocks, refit
from export.ggml import quantize
from fox_edge.errors import MissingPackageError
from fox_edge.quant import QuantType

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

# What the levels of the non-linear 4-bit types stand for.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TERNARY = ("tq1_0", "tq2_0")
# More would be infinite in float16.
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Layout:
    """How blocks (N, bytes) of a type hold their numbers.

    `factors`: byte places of the float16 numbers, the scales' and then the offsets', that all others of the
    block are multiples of. `multiples`: for blocks the whole numbers (N, G), of the scales and of the
    offsets; None: all 1. `levels`: what the level numbers stand for. `get` and `put` read and write level
    numbers (N, block size), from 0, uint8.
    """

    factors: tuple[int, ...]
    multiples: Callable[[Tensor], tuple[Tensor, ...]] | None
    levels: Sequence[int]
    get: Callable[[Tensor], Tensor]
    put: Callable[[Tensor, Tensor], None]


def quantize_compensated(
    type_: QuantType, rows: Tensor, guide: Compensation, tensor: str = "rows"
) -> NDArray[np.uint8]:
    """Round float32 rows (R, C) so that their product with the input changes least.

    Returns ggml's blocks (R, bytes of a row). Types whose blocks are not taken apart here are rounded block
    by block by ggml, each block making good the errors of those before. Ternary types are not compensated:
    their step is a block's largest weight, so that errors would grow from block to block.
    """
    if type_.name in _TERNARY:
        return quantize(type_, rows.numpy(), guide.importance.numpy(), tensor)
    rows = guide.target(rows)
    if type_.name not in LAYOUTS:
        return _by_blocks(type_, rows, guide, tensor)
    blocks = torch.from_numpy(quantize(type_, rows.numpy(), guide.importance.numpy(), tensor))
    grid = BlockGrid(blocks, type_)
    numbers = choose(rows, grid.steps(), guide)
    grid.factors = refit(rows, grid.basis(numbers), grid.factors, guide)
    grid.store(numbers)
    return blocks.numpy()


def _by_blocks(type_: QuantType, rows: Tensor, guide: Compensation, tensor: str) -> NDArray[np.uint8]:
    found: list[NDArray[np.uint8]] = []

    def rounded(columns: Tensor, importance: Tensor) -> Tensor:
        found.append(quantize(type_, columns.numpy(), importance.numpy(), tensor))
        return dequantize(type_, found[-1])

    choose_blocks(rows, type_.block_size, rounded, guide)
    return np.concatenate(found, axis=1)


def dequantize(type_: QuantType, blocks: NDArray[np.uint8]) -> Tensor:
    """Rows of blocks (R, bytes) as they can be read, float32 (R, C)."""
    if type_.bits == 0:
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[type_.name]
        return torch.from_numpy(blocks).view(kind).float()
    if type_.name not in LAYOUTS:
        kind = getattr(gguf.GGMLQuantizationType, type_.name.upper())
        return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(blocks, kind), np.float32))
    grid = BlockGrid(torch.from_numpy(blocks), type_)
    return grid.steps().values(grid.layout.get(grid.blocks).view(len(blocks), -1))


class BlockGrid:
    """The scales of rows of blocks (R, row bytes), uint8; `store` writes into these very blocks."""

    def __init__(self, blocks: Tensor, type_: QuantType) -> None:
        self.layout = LAYOUTS[type_.name]
        self.blocks = blocks.view(-1, type_.block_bits // 8)
        self.shape = (blocks.shape[0], blocks.shape[1] // self.blocks.shape[1])  # R, S
        self.block_size = type_.block_size
        # Each (R, S).
        self.factors = [_half(self.blocks, place).view(self.shape) for place in self.layout.factors]
        if self.layout.multiples is None:
            # Each (R, S, G).
            self.multiples = [torch.ones(*self.shape, 1) for _ in self.factors]
        else:
            self.multiples = [m.float().view(*self.shape, -1) for m in self.layout.multiples(self.blocks)]

    def steps(self) -> Steps:
        """The values that the weights can take."""
        scales, *rest = (
            (factor[..., None] * multiple).flatten(1)
            for factor, multiple in zip(self.factors, self.multiples, strict=True)
        )
        offsets = rest[0] if rest else torch.zeros_like(scales)
        levels = self.layout.levels
        if isinstance(levels, range):
            return Steps(scales, offsets + levels[0] * scales, len(levels))
        return Steps(scales, offsets, len(levels), torch.tensor(levels, dtype=torch.float32))

    def levels(self, numbers: Tensor) -> Tensor:
        """Level numbers (R, C) -> levels (R, S, G, K), float32."""
        values = torch.tensor(self.layout.levels, dtype=torch.float32)[numbers.long()]
        return values.view(*self.multiples[0].shape, -1)

    def basis(self, numbers: Tensor) -> list[Tensor]:
        """What each factor is multiplied with, (R, S, block size), for level numbers (R, C)."""
        levels = self.levels(numbers)
        found = [(levels * self.multiples[0][..., None]).flatten(2)]
        if len(self.multiples) == 2:
            found.append(self.multiples[1][..., None].expand_as(levels).flatten(2))
        return found

    def store(self, numbers: Tensor) -> None:
        """Write the factors and the level numbers (R, C) into the blocks; the factors are now float16's."""
        for n, place in enumerate(self.layout.factors):
            half = self.factors[n].clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().contiguous()
            self.blocks[:, place : place + 2] = half.view(-1, 1).view(torch.uint8)
            self.factors[n] = half.float()
        self.layout.put(self.blocks, numbers.reshape(-1, self.block_size))


def _half(blocks: Tensor, place: int) -> Tensor:
    """The float16 at a byte place of blocks (N, bytes), as float32 (N,)."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16).float().squeeze(1)


def _bytes(place: int, weights: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]]:
    """Levels -127 to 127 as signed bytes."""

    def get(blocks: Tensor) -> Tensor:
        return (blocks[:, place : place + weights].view(torch.int8).short() + 127).to(torch.uint8)

    def put(blocks: Tensor, numbers: Tensor) -> None:
        signed = (numbers.short() - 127).to(torch.int8)
        blocks[:, place : place + weights] = signed.view(torch.uint8)

    return get, put


def _bits(
    fields: tuple[tuple[int, int, int, int], ...],
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]]:
    """Levels cut into bit fields, each packed by itself.

    A field (place, weights, run, bits): at byte `place`, `weights` numbers of `bits` bits, the lowest bits of
    the level first among the fields. Bytes go by runs: byte i of a run holds number i of the run in its
    lowest bits, number `run` + i in the next, and so on until it is full; then the next run's bytes follow.
    """

    def shape(run: int, bits: int) -> tuple[int, int, int]:
        return (-1, 8 // bits, run)

    def get(blocks: Tensor) -> Tensor:
        numbers, low = None, 0
        for place, weights, run, bits in fields:
            packed = blocks[:, place : place + weights * bits // 8].reshape(len(blocks), -1, 1, run)
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
            field = ((packed >> shifts) & (2**bits - 1)).reshape(len(blocks), weights) << low
            numbers, low = field if numbers is None else numbers | field, low + bits
        assert numbers is not None
        return numbers

    def put(blocks: Tensor, numbers: Tensor) -> None:
        low = 0
        for place, weights, run, bits in fields:
            field = ((numbers >> low) & (2**bits - 1)).view(len(blocks), *shape(run, bits))
            packed = field[:, :, 0].clone()
            for k in range(1, 8 // bits):
                packed |= field[:, :, k] << (bits * k)
            blocks[:, place : place + weights * bits // 8] = packed.flatten(1)
            low += bits

    return get, put


def _six_bits(place: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Eight scales and eight offsets of 6 bits in 12 bytes; offsets are subtracted."""

    def multiples(blocks: Tensor) -> tuple[Tensor, ...]:
        first, second, third = blocks[:, place : place + 12].view(-1, 3, 4).unbind(1)
        scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
        offsets = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
        return scales, -offsets.short()

    return multiples


def _q3_k_scales(blocks: Tensor) -> tuple[Tensor, ...]:
    """Sixteen scales of 6 bits less 32: 4 low bits each in 8 bytes, then 2 high bits each in 4."""
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = torch.cat([low & 15, low >> 4], 1)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return ((low | (high << 4)).short() - 32,)


def _q2_k_scales(blocks: Tensor) -> tuple[Tensor, ...]:
    """Sixteen scales and offsets of 4 bits, a byte for each pair; offsets are subtracted."""
    return blocks[:, :16] & 15, -(blocks[:, :16] >> 4).short()


def _q6_k_scales(blocks: Tensor) -> tuple[Tensor, ...]:
    """Sixteen signed bytes."""
    return (blocks[:, 192:208].contiguous().view(torch.int8),)


def _iq4_xs_scales(blocks: Tensor) -> tuple[Tensor, ...]:
    """Eight scales of 6 bits less 32: 4 low bits each in 4 bytes, 2 high bits each in the 2 before them."""
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    high = torch.cat([(blocks[:, 2:4, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3], 2)
    return ((low | (high.flatten(1) << 4)).short() - 32,)


LAYOUTS: dict[str, Layout] = {
    "q8_0": Layout((0,), None, range(-127, 128), *_bytes(2, 32)),
    "q4_0": Layout((0,), None, range(-8, 8), *_bits(((2, 32, 16, 4),))),
    "q4_1": Layout((0, 2), None, range(16), *_bits(((4, 32, 16, 4),))),
    "q5_0": Layout((0,), None, range(-16, 16), *_bits(((6, 32, 16, 4), (2, 32, 1, 1)))),
    "q5_1": Layout((0, 2), None, range(32), *_bits(((8, 32, 16, 4), (4, 32, 1, 1)))),
    "iq4_nl": Layout((0,), None, _IQ4, *_bits(((2, 32, 16, 4),))),
    "q2_k": Layout((80, 82), _q2_k_scales, range(4), *_bits(((16, 256, 32, 2),))),
    "q3_k": Layout((108,), _q3_k_scales, range(-4, 4), *_bits(((32, 256, 32, 2), (0, 256, 32, 1)))),
    "q4_k": Layout((0, 2), _six_bits(4), range(16), *_bits(((16, 256, 32, 4),))),
    "q5_k": Layout((0, 2), _six_bits(4), range(32), *_bits(((48, 256, 32, 4), (16, 256, 32, 1)))),
    "q6_k": Layout((208,), _q6_k_scales, range(-32, 32), *_bits(((0, 256, 64, 4), (128, 256, 32, 2)))),
    "q1_0": Layout((0,), None, (-1, 1), *_bits(((2, 128, 1, 1),))),
    "iq4_xs": Layout((0,), _iq4_xs_scales, _IQ4, *_bits(((8, 256, 16, 4),))),
}
