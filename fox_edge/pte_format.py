"""The container of an ExecuTorch program: what is in a .pte file, and where.

A .pte is a FlatBuffer (the program: methods, tensors, operators) behind an extended header, and after it
segments (weights, delegates' payloads) that the program speaks of by number. Read here bounds first, so that
a damaged or hostile file ends in one sentence before ExecuTorch sees it. Knows the container as its schema
(program.fbs, identifier ET12) tells it; not what a delegate's payload holds, nor what the methods compute.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fox_edge.errors import ArtifactError

IDENTIFIER, EXTENDED = b"ET12", b"eh00"
VERSION = 0  # of the schema
_HEADER = struct.Struct("<I4s4sIQQQ")
MAX_PROGRAM_BYTES = 256 << 20
MAX_ENTRIES = 1 << 20
MAX_NAME_BYTES = 1 << 12
MAX_DIMENSIONS = 16

# ExecuTorch's ScalarType -> numpy's name, for those that a language model has.
SCALARS = {
    **{0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64"},
    **{5: "float16", 6: "float32", 7: "float64", 11: "bool", 15: "bfloat16"},
}
_SIZES = {
    **{"uint8": 1, "int8": 1, "bool": 1, "int16": 2, "float16": 2, "bfloat16": 2},
    **{"int32": 4, "float32": 4, "int64": 8, "float64": 8},
}

# The members of the union KernelTypes that are read.
_INT, _BOOL, _DOUBLE, _TENSOR, _STRING, _INT_LIST = 2, 3, 4, 5, 6, 7


class Region(NamedTuple):
    """A byte range, counted from the file's first byte."""

    offset: int
    bytes: int


@dataclass(frozen=True)
class PteTensor:
    """A value of a method that is a tensor; `shape` is the largest that it may have.

    `constant` is where in the file its data starts, None where it has none; `memory` is arena and offset
    where the method plans it. `name` is empty where the exporter gave none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    constant: int | None
    memory: tuple[int, int] | None

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        size = _SIZES[self.type]
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class PteMethod:
    """A method: the values that go in and come out, what it is computed by, the memory that it plans.

    An input or output that is no tensor is its value, None where it is of no kind that is read.
    """

    name: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    tensors: tuple[PteTensor, ...]
    operators: tuple[str, ...]
    backends: tuple[tuple[str, Region], ...]
    arenas: tuple[int, ...]


@dataclass(frozen=True)
class PteProgram:
    """Everything that a .pte says of itself."""

    path: Path
    methods: dict[str, PteMethod]
    segments: tuple[Region, ...]
    named: dict[str, Region] = field(default_factory=dict)

    def constant(self, name: str) -> Any:
        """What a method without inputs answers (get_vocab_size and the like); raises ArtifactError."""
        method = self.methods.get(name)
        if method is None or method.inputs or len(method.outputs) < 1:
            raise ArtifactError(f"{self.path}: has no constant method {name}")
        return method.outputs[0] if len(method.outputs) == 1 else list(method.outputs)


def read_program(path: Path) -> PteProgram:
    """Read and check a .pte's header and program; raises ArtifactError naming the file and the number."""
    with _mapped(path) as data:
        return _Reader(path, data).program()


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except ValueError:
        raise ArtifactError(f"{path}: an empty file, but an ExecuTorch program is due") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None


class _Table:
    """A FlatBuffers table: fields by number, each looked up in its vtable. Reads past the end are errors."""

    def __init__(self, reader: _Reader, at: int) -> None:
        self._reader, self._at = reader, at
        vtable = at - reader.number("i", at)
        self._slots = (reader.number("H", vtable) - 4) // 2
        self._vtable = vtable

    def _where(self, slot: int) -> int:
        """The byte of a field's value; 0 where the field is absent."""
        if slot >= self._slots:
            return 0
        offset = self._reader.number("H", self._vtable + 4 + 2 * slot)
        return self._at + offset if offset else 0

    def number(self, slot: int, code: str, default: int = 0) -> Any:
        """A scalar field."""
        at = self._where(slot)
        return self._reader.number(code, at) if at else default

    def table(self, slot: int) -> _Table | None:
        """A field that is a table."""
        at = self._where(slot)
        return _Table(self._reader, self._reader.follow(at)) if at else None

    def text(self, slot: int) -> str:
        """A short text, '' where it is absent."""
        at = self._where(slot)
        return self._reader.text(self._reader.follow(at)) if at else ""

    def numbers(self, slot: int, code: str) -> tuple[Any, ...]:
        """A vector of scalars."""
        at = self._where(slot)
        if not at:
            return ()
        start, count = self._reader.vector(self._reader.follow(at), struct.calcsize("<" + code))
        return self._reader.unpack(f"{count}{code}", start)

    def tables(self, slot: int) -> Iterator[_Table]:
        """A vector of tables."""
        at = self._where(slot)
        if at:
            start, count = self._reader.vector(self._reader.follow(at), 4)
            for index in range(count):
                yield _Table(self._reader, self._reader.follow(start + 4 * index))


class _Reader:
    """The program of a mapped .pte, read in bounds."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._end, self._base, self._entries = 0, 0, 0

    def error(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: damaged ExecuTorch program: {what}")

    # --- bytes ------------------------------------------------------------------------------------------

    def unpack(self, format: str, at: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + format)
        if not 0 <= at <= self._end - size:
            raise self.error(f"{size} bytes at byte {at} are due, but the program ends at byte {self._end}")
        return struct.unpack_from("<" + format, self._data, at)

    def number(self, code: str, at: int) -> Any:
        return self.unpack(code, at)[0]

    def follow(self, at: int) -> int:
        """Where an offset that is stored at a byte leads."""
        return at + int(self.number("I", at))

    def vector(self, at: int, size: int) -> tuple[int, int]:
        """Start and length of a vector of elements of `size` bytes."""
        count = int(self.number("I", at))
        # What is told twice is counted twice: a small file cannot make for long work.
        self._entries += count
        if self._entries > MAX_ENTRIES or count * size > self._end - at - 4:
            raise self.error(f"a list of {count} at byte {at}, but the program ends at byte {self._end}")
        return at + 4, count

    def text(self, at: int) -> str:
        start, count = self.vector(at, 1)
        try:
            text = self._data[start : start + min(count, MAX_NAME_BYTES + 1)].decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the text at byte {at} is not UTF-8") from None
        if count > MAX_NAME_BYTES or not (text.isprintable() or not text):
            raise self.error(f"{text[:40]!r} at byte {at} is no name")
        return text

    # --- the program ------------------------------------------------------------------------------------

    def program(self) -> PteProgram:
        root = _Table(self, self._header())
        version = root.number(0, "I")
        if version != VERSION:
            raise ArtifactError(f"{self._path}: a program of schema version {version}, but {VERSION} is read")
        if any(True for _ in root.tables(2)):
            raise self.error("constants inside the program; since ExecuTorch 0.4 they are in a segment")
        segments = tuple(self._segment(table) for table in root.tables(4))
        constants = self._constants(root.table(5), segments)
        methods: dict[str, PteMethod] = {}
        for table in root.tables(1):
            method = self._method(table, segments, constants)
            if method.name in methods:
                raise self.error(f"two methods are called {method.name}")
            methods[method.name] = method
        named = {t.text(0): self._index(segments, t.number(1, "I"), "segment") for t in root.tables(7)}
        return PteProgram(self._path, methods, segments, named)

    def _header(self) -> int:
        """Check the extended header against the file; where the root table is."""
        size = len(self._data)
        if self._data[4:8] != IDENTIFIER:
            found = self._data[4:8]
            known = found[:2] == b"ET" and found[2:].isdigit()
            raise ArtifactError(
                f"{self._path}: "
                + (f"a program of schema {found.decode()}, but ET12 is read" if known else "no .pte file")
            )
        if size < _HEADER.size:
            raise ArtifactError(f"{self._path}: cut short: {size} bytes, less than a header")
        root, _, magic, length, program, base, segments = _HEADER.unpack_from(self._data)
        if magic != EXTENDED or length < _HEADER.size - 8:
            raise ArtifactError(f"{self._path}: has no extended header, which ExecuTorch writes since 0.1")
        if not _HEADER.size <= program <= min(size, MAX_PROGRAM_BYTES) or (base and base < program):
            raise ArtifactError(
                f"{self._path}: cut short or damaged: a program of {program} bytes and segments from byte "
                f"{base}, but the file has {size}"
            )
        if base + segments > size:
            raise ArtifactError(
                f"{self._path}: cut short: segments end at byte {base + segments}, but the file has {size}"
            )
        self._end, self._base = int(program), int(base)
        return int(root)

    def _segment(self, table: _Table) -> Region:
        offset, size = int(table.number(0, "Q")), int(table.number(1, "Q"))
        room = len(self._data) - self._base
        if offset > room or size > room - offset:
            raise ArtifactError(
                f"{self._path}: cut short or damaged: a segment of {size} bytes at byte "
                f"{self._base + offset}, but the file has {len(self._data)}"
            )
        return Region(self._base + offset, size)

    def _index(self, items: tuple[Any, ...], index: int, what: str) -> Any:
        if not 0 <= index < len(items):
            raise self.error(f"{what} {index} of {len(items)}")
        return items[index]

    def _constants(self, table: _Table | None, segments: tuple[Region, ...]) -> tuple[Region, ...]:
        """Where each constant begins, and how many bytes the segment has from there on."""
        if table is None:
            return ()
        offsets = table.numbers(1, "Q")
        if not offsets:
            return ()
        segment = self._index(segments, table.number(0, "I"), "segment")
        if max(offsets) > segment.bytes:
            raise self.error(f"a constant at byte {max(offsets)} of a segment of {segment.bytes}")
        return tuple(Region(segment.offset + offset, segment.bytes - offset) for offset in offsets)

    def _method(
        self, table: _Table, segments: tuple[Region, ...], constants: tuple[Region, ...]
    ) -> PteMethod:
        arenas = tuple(int(size) for size in table.numbers(8, "q"))
        if min(arenas, default=0) < 0:
            raise self.error(f"an arena of {min(arenas)} bytes")
        values = tuple(self._value(value, constants, arenas) for value in table.tables(2))
        return PteMethod(
            name=table.text(0),
            inputs=tuple(self._index(values, i, "value") for i in table.numbers(3, "i")),
            outputs=tuple(self._index(values, i, "value") for i in table.numbers(4, "i")),
            tensors=tuple(value for value in values if isinstance(value, PteTensor)),
            operators=tuple(f"{o.text(0)}.{o.text(1)}".rstrip(".") for o in table.tables(6)),
            backends=tuple(self._backend(delegate, segments) for delegate in table.tables(7)),
            arenas=arenas,
        )

    def _backend(self, table: _Table, segments: tuple[Region, ...]) -> tuple[str, Region]:
        place = table.table(1)
        if place is None or place.number(0, "b") != 1:
            raise self.error("a delegate's payload is not in a segment")
        return table.text(0), self._index(segments, place.number(1, "I"), "segment")

    def _value(self, table: _Table, constants: tuple[Region, ...], arenas: tuple[int, ...]) -> Any:
        kind, held = table.number(0, "B"), table.table(1)
        if held is None:
            return None
        if kind == _TENSOR:
            return self._tensor(held, constants, arenas)
        if kind in (_INT, _BOOL, _DOUBLE):
            return held.number(0, {_INT: "q", _BOOL: "?", _DOUBLE: "d"}[kind])
        if kind == _STRING:
            return held.text(0)
        return None

    def _tensor(self, table: _Table, constants: tuple[Region, ...], arenas: tuple[int, ...]) -> PteTensor:
        shape = tuple(int(n) for n in table.numbers(2, "i"))
        scalar = int(table.number(0, "b"))
        if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or scalar not in SCALARS:
            raise self.error(f"a tensor of type {scalar} and shape {list(shape)[:MAX_DIMENSIONS]}")
        extra, plan, index = table.table(9), table.table(6), int(table.number(5, "I"))
        place = self._index(constants, index, "constant") if index and plan is None else None
        memory = None if plan is None else self._memory(plan)
        tensor = PteTensor(
            name="" if extra is None else extra.text(1),
            type=SCALARS[scalar],
            shape=shape,
            constant=None if place is None else place.offset,
            memory=memory,
        )
        if place is not None and tensor.bytes > place.bytes:
            raise self.error(
                f"a constant of {tensor.bytes} bytes, but its segment has {place.bytes} from there on"
            )
        if memory is not None and memory[1] + tensor.bytes > self._index(arenas, memory[0], "arena"):
            raise self.error(
                f"a tensor of {tensor.bytes} bytes at byte {memory[1]} of an arena of {arenas[memory[0]]}"
            )
        return tensor

    def _memory(self, plan: _Table) -> tuple[int, int]:
        low, high = int(plan.number(1, "I")), int(plan.number(2, "I"))
        return int(plan.number(0, "I")), (high << 32) + low
