"""Where a model's weights come from: a checkpoint as it is, rounded on the way, a GGUF or an ONNX artifact.

Each says in which form a tensor can lie on the device, and gives its rows there piece by piece: nothing but
one piece is ever copied into the host's memory. Knows files and their types; not how matrices are fused, or
where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fox_edge.artifact import Artifact
from fox_edge.blockwise import column_scales, span, unpack
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError
from fox_edge.quant import EMBEDDING, GGUF, HEAD, ONNX, QuantType, Recipe, find_recipe
from runtimes.cuda.form import FLOATS, Form, Levels

# Weights that are taken apart at once: for a moment they stand on the device several times over. Floats go
# there as they are, 32 MiB at a time.
PIECE_WEIGHTS = 2 << 20

# First row, and rows (n, columns); a vector is one row.
Piece = tuple[int, Tensor | Levels]


class Source(Protocol):
    """The weights of one model."""

    config: FoxConfig
    name: str  # what a sentence about it speaks of
    context: int  # the most positions that it has

    def form(self, tensor: str) -> Form:
        """How a tensor of the checkpoint's name can lie on the device."""
        ...

    def pieces(self, tensor: str, device: torch.device) -> Iterator[Piece]:
        """Its rows in order: levels where its form has bits, then on the device; floats may be anywhere."""
        ...

    def factors(self, tensor: str) -> Tensor | None:
        """What a tensor's columns are multiplied by (C,), float32, where its form is `scaled`."""
        ...

    def notes(self) -> list[str]:
        """One sentence for each thing that is not on the device as the file has it."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class CheckpointSource:
    """A checkpoint's own floats."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.name = checkpoint.config, f"the checkpoint {checkpoint.name}"
        self.context = checkpoint.config.max_positions
        self._checkpoint = checkpoint

    def form(self, tensor: str) -> Form:
        """Floats."""
        return FLOATS

    def pieces(self, tensor: str, device: torch.device) -> Iterator[Piece]:
        """Views of the mapped file."""
        yield from self._checkpoint.pieces(tensor)

    def factors(self, tensor: str) -> Tensor | None:
        """None."""
        return None

    def notes(self) -> list[str]:
        """None: whoever opened the checkpoint has told its notes."""
        return []

    def close(self) -> None:
        """The checkpoint is its owner's."""


class RoundedSource(CheckpointSource):
    """A checkpoint whose matrices are rounded to nearest, in the blocks of an ONNX preset, on the device."""

    def __init__(self, checkpoint: Checkpoint, preset: str) -> None:
        super().__init__(checkpoint)
        self.name += f" in {preset}"
        recipe: Recipe = find_recipe(ONNX, preset)
        self._types = {name: a.type for name, a in recipe.resolve(checkpoint.shapes()).items()}
        self._factors: dict[str, Tensor] = {}

    def form(self, tensor: str) -> Form:
        """As the preset says."""
        kind = self._types[tensor]
        form = _onnx_form(kind.bits, kind.block_size, kind.symmetric)
        return replace(form, scaled=True) if form.bits and tensor in (EMBEDDING, HEAD) else form

    def pieces(self, tensor: str, device: torch.device) -> Iterator[Piece]:
        """Pieces of the mapped file, rounded where they are going to lie."""
        kind, factors = self._types[tensor], self.factors(tensor)
        for start, rows in self._checkpoint.pieces(tensor):
            step = max(1, PIECE_WEIGHTS // rows.shape[1])
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                yield start + first, _rounded(part.to(device).float(), kind, factors) if kind.bits else part

    def factors(self, tensor: str) -> Tensor | None:
        """The column scales that an export divides embedding and head by."""
        if tensor not in self._factors and self.form(tensor).scaled:
            self._factors[tensor] = column_scales(self._checkpoint, tensor)
        return self._factors.get(tensor)


def _rounded(rows: Tensor, kind: QuantType, factors: Tensor | None) -> Levels:
    """Rows (n, C), float32, as the nearest integers of a type."""
    if factors is not None:
        rows = rows / factors.to(rows.device)
    blocks = rows.reshape(len(rows), -1, kind.block_size)
    grid = span(blocks, kind)
    integers = grid.integers(blocks, kind.bits).to(torch.uint8).flatten(1)
    if kind.symmetric:
        return Levels(integers, grid.scales, None, 1 << (kind.bits - 1))
    return Levels(integers, grid.scales, -grid.zeros * grid.scales)


class GgufSource:
    """A GGUF artifact: ggml's integers and scales; what has none is dequantized to floats."""

    def __init__(self, artifact: Artifact) -> None:
        from runtimes.cuda.ggml_blocks import BLOCK_TYPES, levels
        from runtimes.llama_cpp.gguf_file import GgufFile

        self._file = GgufFile(artifact)
        self.config, self.name = self._file.config, str(artifact.path)
        self.context = min(artifact.manifest.context, self.config.max_positions)
        self._types, self._levels = BLOCK_TYPES, levels

    def form(self, tensor: str) -> Form:
        """That of its type."""
        kind = self._types.get(self._file.stored(tensor)[0])
        return FLOATS if kind is None else kind.form

    def pieces(self, tensor: str, device: torch.device) -> Iterator[Piece]:
        """Raw blocks are copied to the device and taken apart there."""
        kind = self._types.get(self._file.stored(tensor)[0])
        rows, columns = _rows_of(self._file.info(tensor).shape)
        for start, stop in _ranges(rows, columns):
            if kind is None:
                yield start, _tensor(self._file.rows(tensor, start, stop))
            else:
                raw = torch.from_numpy(self._file.blocks(tensor, start, stop))
                yield start, self._levels(raw.to(device), kind)

    def factors(self, tensor: str) -> Tensor | None:
        """None."""
        return None

    def notes(self) -> list[str]:
        """Which types' matrices are floats on the device."""
        found: dict[str, _Floats] = {}
        for tensor, shape in self.config.tensor_shapes().items():
            kind, size = self._file.stored(tensor)
            if kind not in self._types and kind != "bf16" and len(shape) == 2:
                found[kind] = found.get(kind, _Floats(0, 0, 0)).add(shape, size)
        return [floats.sentence(kind) for kind, floats in found.items()]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class OnnxSource:
    """An ONNX artifact: the integers, scales and zero points that MatMulNBits reads."""

    def __init__(self, artifact: Artifact) -> None:
        from runtimes.onnx.artifact import read_artifact_graph
        from runtimes.onnx.file import OnnxFile

        self.config, self.name = FoxConfig.read(artifact.path / "config.json"), str(artifact.path)
        self.context = min(artifact.manifest.context, self.config.max_positions)
        read_artifact_graph(artifact)  # for its checks
        self._file = OnnxFile(artifact)
        missing = set(self.config.tensor_shapes()) - set(self._file.tensor_names())
        if missing:
            raise ArtifactError(f"{artifact.model_path}: holds no tensor '{min(missing)}'")
        for tensor, shape in self.config.tensor_shapes().items():
            found, due = self._file.shape(tensor), _rows_of(shape)
            if found != due:
                raise ArtifactError(
                    f"{artifact.model_path}: '{tensor}' has {found[0]} rows of {found[1]}, but "
                    f"config.json asks for {due[0]} of {due[1]}"
                )

    def form(self, tensor: str) -> Form:
        """That of its blocks; two bits lie in four."""
        form = reduce(Form.join, (_onnx_form(*kind) for kind in self._file.block_types(tensor)))
        scaled = form.bits > 0 and self._file.column_scales(tensor) is not None
        return replace(form, scaled=scaled)

    def pieces(self, tensor: str, device: torch.device) -> Iterator[Piece]:
        """Packed rows are copied to the device and unpacked there."""
        rows, columns = _rows_of(self.config.tensor_shapes()[tensor])
        packed = self.form(tensor).bits > 0
        for start, stop in _ranges(rows, columns):
            if not packed:
                yield start, _tensor(self._file.rows(tensor, start, stop))
                continue
            first = start
            for blocks in self._file.blocks(tensor, start, stop):
                yield first, _onnx_levels(blocks, device)
                first += len(blocks.scales)

    def factors(self, tensor: str) -> Tensor | None:
        """What the graph multiplies the columns of embedding and head by."""
        found = self._file.column_scales(tensor) if self.form(tensor).scaled else None
        return None if found is None else _tensor(found)

    def notes(self) -> list[str]:
        """How many matrices are floats in the file."""
        floats = _Floats(0, 0, 0)
        for tensor, shape in self.config.tensor_shapes().items():
            if len(shape) == 2 and not self.form(tensor).bits:
                floats = floats.add(shape, self._file.stored(tensor)[1])
        return [floats.sentence("float32")] if floats.matrices else []

    def close(self) -> None:
        """Let go of the files."""
        self._file.close()


def open_source(model: Checkpoint | Artifact, preset: str | None = None) -> Source:
    """The weights of what was opened; `preset` is what a checkpoint is rounded to.

    Raises ArtifactError for a format that no kernel knows, and for a damaged file.
    """
    if isinstance(model, Artifact):
        kinds: dict[str, Any] = {GGUF: GgufSource, ONNX: OnnxSource}
        source: Source = kinds[model.manifest.format](model)
        return source
    return RoundedSource(model, preset) if preset else CheckpointSource(model)


def _onnx_form(bits: int, block: int, symmetric: bool) -> Form:
    return Form(max(4, bits), block, symmetric=symmetric) if bits else FLOATS


def _onnx_levels(stored: Any, device: torch.device) -> Levels:
    """Rows as an ONNX file stores them (`onnx_file.StoredBlocks`), unpacked on the device."""
    integers = unpack(_tensor(stored.packed).to(device), stored.bits)
    scales = _tensor(stored.scales).to(device).float()
    if stored.zero_points is None:
        return Levels(integers, scales, None, 1 << (stored.bits - 1))
    zeros = unpack(_tensor(stored.zero_points).to(device), stored.bits)[:, : scales.shape[1]]
    return Levels(integers, scales, -zeros.float() * scales)


def _tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; PyTorch wants none that cannot be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most PIECE_WEIGHTS."""
    step = max(1, PIECE_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class _Floats(NamedTuple):
    """Matrices of one type that the device holds as BF16."""

    matrices: int
    weights: int
    file_bytes: int

    def add(self, shape: tuple[int, ...], size: int) -> _Floats:
        return _Floats(self.matrices + 1, self.weights + shape[0] * shape[1], self.file_bytes + size)

    def sentence(self, kind: str) -> str:
        count = f"{self.matrices} matrices" if self.matrices > 1 else "one matrix"
        return (
            f"{count} of type {kind} ({self.file_bytes / 1e6:,.1f} MB in the file) are held as BF16 "
            f"({2 * self.weights / 1e6:,.1f} MB)"
        )
