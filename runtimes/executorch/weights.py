"""Where an artifact's weights lie in its .pte, as the manifest tells it, held against the file.

The manifest's `pte` names a byte range for every tensor: XNNPACK's integers and scales for matrices, float32
for vectors. Whoever reads rows of the tied matrix, here or in an app of another language, trusts it, so it is
refused where the program's own table says otherwise. Knows XNNPACK's two layouts and how they become floats;
not what runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError
from fox_edge.pte_format import PteProgram, Region

QB4W, QC8W, F32 = "qb4w", "qc8w", "f32"
# Layout -> bits of an integer, how its scales are stored, bytes of a scale.
_LAYOUTS = {QB4W: (4, "bf16", 2), QC8W: (8, "f32", 4), F32: (0, "", 0)}


@dataclass(frozen=True)
class Place:
    """One tensor: `rows` x `columns` numbers from byte `offset` of the file, scales of `block` columns each.

    qb4w: byte i of a row has column 2i in its low four bits and 2i + 1 in the high ones; a number is
    (integer - 8) * scale. qc8w: signed bytes, times the row's scale. f32: the numbers themselves. Where there
    are `column_scales` (float32, one per column), each number is multiplied by its column's, too.
    """

    layout: str
    offset: int
    rows: int
    columns: int
    block: int
    scales_offset: int
    column_scales: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's numbers, without scales."""
        return self.columns * (_LAYOUTS[self.layout][0] or 32) // 8

    @property
    def blocks(self) -> int:
        """Scales per row; 0 where there are none."""
        return self.columns // self.block if self.layout != F32 else 0

    @property
    def numbers(self) -> Region:
        """Where the numbers are."""
        return Region(self.offset, self.rows * self.row_bytes)

    @property
    def scales(self) -> Region:
        """Where the scales of all rows are."""
        return Region(self.scales_offset, self.rows * self.blocks * _LAYOUTS[self.layout][2])

    @property
    def regions(self) -> list[Region]:
        """Everything that belongs to the tensor."""
        columns = [] if self.column_scales is None else [Region(self.column_scales, 4 * self.columns)]
        return [region for region in (self.numbers, self.scales, *columns) if region.bytes]

    @property
    def type(self) -> str:
        """The type's name in the quantization table."""
        return {QB4W: f"q4s{self.block}", QC8W: "q8row", F32: "float32"}[self.layout]

    def decode(self, data: Any, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 (rows, columns), from the mapped file."""
        count = stop - start
        raw = np.frombuffer(data, np.uint8, count * self.row_bytes, self.offset + start * self.row_bytes)
        if self.layout == F32:
            return raw.view("<f4").reshape(count, self.columns).astype(np.float32)
        rows = raw.reshape(count, self.row_bytes)
        numbers = np.empty((count, self.columns), np.float32)
        if self.layout == QB4W:
            numbers[:, 0::2], numbers[:, 1::2] = rows & 15, rows >> 4
            numbers -= 8
        else:
            numbers[:] = rows.view(np.int8)
        scales = self._scales(data, start, count)
        values = (numbers.reshape(count, self.blocks, -1) * scales[:, :, None]).reshape(count, -1)
        if self.column_scales is not None:
            values *= np.frombuffer(data, "<f4", self.columns, self.column_scales)
        return values

    def _scales(self, data: Any, start: int, count: int) -> NDArray[np.float32]:
        """Scales (count, blocks) of rows from `start` on."""
        _, kind, size = _LAYOUTS[self.layout]
        at, total = self.scales_offset + start * self.blocks * size, count * self.blocks
        if kind == "f32":
            return np.frombuffer(data, "<f4", total, at).reshape(count, self.blocks)
        # bfloat16: the upper half of a float32.
        halves = np.frombuffer(data, "<u2", total, at).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(count, self.blocks)


def read_places(artifact: Artifact, pte: PteProgram) -> dict[str, Place]:
    """The places of all tensors, by Hugging Face's names; raises ArtifactError for what cannot be."""
    where = artifact.path / MANIFEST
    told = artifact.manifest.pte
    if (
        told is None
        or not isinstance(told.get("tensors"), dict)
        or not isinstance(told.get("embedding"), dict)
    ):
        raise ArtifactError(f"{where}: has no 'pte' with the places of tensors in {artifact.model_path.name}")
    places = {str(name): _place(where, str(name), fields) for name, fields in told["tensors"].items()}
    embedding = told["embedding"]
    name = str(embedding.get("tensor"))
    if name not in places:
        raise ArtifactError(f"{where}: the embedding is '{name[:80]}', of which no place is told")
    if embedding.get("column_scales_offset") is not None:
        at = _count(where, name, embedding, "column_scales_offset")
        places[name] = Place(**{**vars(places[name]), "column_scales": at})
    size = artifact.model_path.stat().st_size
    held = {*pte.named.values()}
    for method in pte.methods.values():
        held |= {Region(t.constant, t.bytes) for t in method.tensors if t.constant is not None}
    for name, place in places.items():
        _check_place(where, name, place, size, held)
    return places


def _place(where: Path, name: str, fields: Any) -> Place:
    if not isinstance(fields, dict) or fields.get("layout") not in _LAYOUTS:
        raise ArtifactError(
            f"{where}: the place of {name[:80]} has none of the layouts {', '.join(_LAYOUTS)}"
        )
    layout = fields["layout"]
    plain = layout == F32
    if not plain and fields.get("scales_type") != _LAYOUTS[layout][1]:
        raise ArtifactError(
            f"{where}: the scales of {name} are {fields.get('scales_type')!r}, but {layout} has "
            f"{_LAYOUTS[layout][1]}"
        )
    rows, columns = (_count(where, name, fields, key) or 1 for key in ("rows", "columns"))
    block = columns if layout != QB4W else _count(where, name, fields, "block")
    if layout == QB4W and (block < 2 or columns % block or columns % 2):
        raise ArtifactError(f"{where}: {name} has {columns} columns, no whole number of blocks of {block}")
    return Place(
        layout,
        _count(where, name, fields, "offset"),
        rows,
        columns,
        block,
        0 if plain else _count(where, name, fields, "scales_offset"),
    )


def _count(where: Path, name: str, fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ArtifactError(f"{where}: '{key}' of {name[:80]} is {value!r}, no number of bytes or things")
    return value


def _check_place(where: Path, name: str, place: Place, size: int, held: set[Region]) -> None:
    """In the file, and for matrices exactly what the program itself calls a piece of data."""
    for region in place.regions:
        if region.offset + region.bytes > size:
            raise ArtifactError(
                f"{where}: {name} would end at byte {region.offset + region.bytes}, but the file has {size}"
            )
    if place.layout == F32:
        return
    for what, region in (("weights", place.numbers), ("scales", place.scales)):
        if region not in held:
            raise ArtifactError(
                f"{where}: the {what} of {name} are told to be {region.bytes} bytes from byte "
                f"{region.offset} on, but the program has no such piece of data there"
            )
