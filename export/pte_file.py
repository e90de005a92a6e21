"""The bytes of a .pte: a program whose weights are stand-ins becomes a file with room for the real ones.

A .pte is a FlatBuffer, the program, and after it segments: constants that operators read in place, payloads
of delegates, and named data that a delegate asks for by key. XNNPACK copies the head's named data into a
layout of its own when it loads; an embedding's lookup reads the file as it is. Here the tables of a tied
embedding are constants whose place is the head's named data: the constant segment is made to reach over them,
so the file holds one copy. Knows ExecuTorch's schema and where everything goes; not what a weight is.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program, _program_to_flatbuffer
from executorch.exir._serialize._program import (
    _ExtendedHeader,
    _get_extended_header,
    _insert_flatbuffer_header,
)
from executorch.exir.schema import DataLocation, DataSegment, DelegateCall, Program, Tensor

# Large data begin on a page of their own, small ones as XNNPACK and the operators want them.
_PAGE_BYTES, _LINE_BYTES = 4096, 128
_KEY = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class Place:
    """A byte range, counted from the file's first byte."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Table:
    """A constant whose stand-in repeats `fill`: its real row count, and the key of the data that it is."""

    fill: bytes
    rows: int
    key: str


class PteFile:
    """Where everything lies in a .pte that is yet to be filled.

    `program` is a whole small .pte, `sizes` the bytes of the named data that have stand-ins there, `tables`
    the constants that lie where named data (or, under a key of no delegate, data of their own) do.
    """

    def __init__(self, program: bytes, sizes: Mapping[str, int], tables: Iterable[Table]) -> None:
        header = _get_extended_header(program)
        assert header is not None
        self._program: Program = _flatbuffer_to_program(program[: header.program_size])
        base = header.segment_base_offset
        data = [program[base + s.offset : base + s.offset + s.size] for s in self._program.segments]
        names = {n.segment_index: str(n.key) for n in self._program.named_data or []}
        self._tables = list(tables)
        constants = self._program.constant_segment.segment_index
        shared = [table.key for table in self._tables]

        def order(index: int) -> tuple[int, int]:
            """Payloads and small data, then weights, then constants and what they share, at the end."""
            key = names.get(index, "")
            if index == constants:
                return 2, index
            return (3 if key in shared else 1 if key in sizes else 0), index

        self._small: list[tuple[int, bytes]] = []
        self._keyed: dict[str, tuple[int, int]] = {}
        at, moved = 0, {}
        segments: list[DataSegment] = []
        for index in sorted(range(len(data)), key=order):
            key = names.get(index, "")
            size = sizes.get(key, len(data[index]))
            at = _aligned(at, size)
            if key in sizes:
                self._keyed[key] = (at, size)
            else:
                self._small.append((at, data[index]))
            moved[index] = len(segments)
            segments.append(DataSegment(offset=at, size=size))
            at += size
        for key in dict.fromkeys(shared):
            if key not in self._keyed:
                at = _aligned(at, sizes[key])
                self._keyed[key] = (at, sizes[key])
                at += sizes[key]
        self._end = at
        self._renumber(moved)
        self._load_head_first()
        self._program.segments = segments
        self._alias(data[constants])
        self._head = self._serialized()

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self._head) + self._end

    @property
    def places(self) -> dict[str, Place]:
        """Key -> where its data go."""
        base = len(self._head)
        return {key: Place(base + offset, size) for key, (offset, size) in self._keyed.items()}

    def begin(self, path: Path) -> None:
        """Create the file with all but the weights, which are zeros until they are written."""
        with path.open("wb") as file:
            file.write(self._head)
            for offset, data in self._small:
                file.seek(len(self._head) + offset)
                file.write(data)
            file.truncate(self.nbytes)

    def seal(self, path: Path) -> None:
        """Name every weight by the digest of its bytes, as ExecuTorch does; the file holds them all now.

        A runtime that keeps packed weights by name must never take those of one model for another's.
        """
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            digests = {key.encode(): _digest(data, place) for key, place in self._named_places()}
            for start, stop in self._spoken():
                told = bytes(data[start:stop])
                data[start:stop] = _KEY.sub(lambda found: digests.get(found[0], found[0]), told)

    def _named_places(self) -> Iterator[tuple[str, Place]]:
        for key, place in self.places.items():
            yield key.removeprefix("scale_"), place

    def _spoken(self) -> Iterator[tuple[int, int]]:
        """Byte ranges in which keys are told."""
        yield 0, len(self._head)
        for offset, data in self._small:
            yield len(self._head) + offset, len(self._head) + offset + len(data)

    def _renumber(self, moved: Mapping[int, int]) -> None:
        """Segments are in the order of their offsets now."""
        program = self._program
        program.constant_segment.segment_index = moved[program.constant_segment.segment_index]
        for group in program.mutable_data_segments or []:
            group.segment_index = moved[group.segment_index]
        for named in program.named_data or []:
            named.segment_index = moved[named.segment_index]
        for plan in program.execution_plan:
            for delegate in plan.delegates:
                if delegate.processed.location == DataLocation.SEGMENT:
                    delegate.processed.index = moved[delegate.processed.index]

    def _load_head_first(self) -> None:
        """Delegates are loaded in the order of their list, and each one's data are in memory twice meanwhile:
        the largest comes first, when nothing else is there yet."""
        for plan in self._program.execution_plan:
            plan.delegates.reverse()
            calls = (step.instr_args for chain in plan.chains for step in chain.instructions)
            for call in calls:
                if isinstance(call, DelegateCall):
                    call.delegate_index = len(plan.delegates) - 1 - call.delegate_index

    def _alias(self, constants: bytes) -> None:
        """Point each table's constant at its data, and let the constant segment reach that far."""
        segment = self._program.constant_segment
        whole = self._program.segments[segment.segment_index]
        for table in self._tables:
            index = _filled_with(table.fill, constants, segment.offsets)
            offset, size = self._keyed[table.key]
            segment.offsets[index] = offset - whole.offset
            whole.size = max(whole.size, offset + size - whole.offset)
            for tensor in self._tensors(index):
                tensor.sizes[0] = table.rows

    def _tensors(self, buffer_index: int) -> Iterator[Tensor]:
        for plan in self._program.execution_plan:
            for value in plan.values:
                tensor = value.val
                if not isinstance(tensor, Tensor) or tensor.allocation_info is not None:
                    continue
                if tensor.data_buffer_idx == buffer_index:
                    yield tensor

    def _serialized(self) -> bytes:
        """Header and program, filled up to where segments begin."""
        result = _program_to_flatbuffer(self._program, constant_tensor_alignment=16)
        header_size = -(-_ExtendedHeader.EXPECTED_LENGTH // result.max_alignment) * result.max_alignment
        size = header_size + len(result.data)
        base = -(-size // _PAGE_BYTES) * _PAGE_BYTES
        header = _ExtendedHeader(program_size=size, segment_base_offset=base, segment_data_size=self._end)
        told = header.to_bytes().ljust(header_size, b"\0")
        return _insert_flatbuffer_header(result.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", told).ljust(base, b"\0")


def _aligned(offset: int, size: int) -> int:
    step = _PAGE_BYTES if size >= 4 * _PAGE_BYTES else _LINE_BYTES
    return -(-offset // step) * step


def _filled_with(fill: bytes, constants: bytes, offsets: list[int]) -> int:
    """The number of the constant that begins with a fill, twice over; 0 is no constant's."""
    found = [n for n, at in enumerate(offsets) if n and constants[at : at + 2 * len(fill)] == 2 * fill]
    (index,) = found
    return index


def _digest(data: mmap.mmap, place: Place) -> bytes:
    """sha256 of a range in hexadecimal; its pages are given back as it goes."""
    digest, step = hashlib.sha256(), 16 << 20
    with memoryview(data) as view:
        for start in range(place.offset, place.offset + place.nbytes, step):
            digest.update(view[start : min(start + step, place.offset + place.nbytes)])
    return digest.hexdigest().encode()
