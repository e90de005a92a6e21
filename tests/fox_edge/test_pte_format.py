"""The container of an ExecuTorch program, against ExecuTorch's own reader, and damaged in every place."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import pytest

from fox_edge.artifact import Artifact
from fox_edge.errors import ArtifactError
from fox_edge.pte_format import PteProgram, PteTensor, read_program

# Where the extended header and the FlatBuffer's own are in a file.
ROOT, IDENTIFIER, PROGRAM_BYTES, BASE, SEGMENT_BYTES = 0, 4, 16, 24, 32


@pytest.fixture(scope="module")
def program(tiny_pte: Artifact) -> PteProgram:
    return read_program(tiny_pte.model_path)


@pytest.fixture
def copy(tiny_pte: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_pte.model_path, tmp_path / "model.pte"))


def test_it_reads_what_executorch_reads(tiny_pte: Artifact, program: PteProgram) -> None:
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir.schema import Tensor

    data = tiny_pte.model_path.read_bytes()
    size, base = struct.unpack_from("<QQ", data, PROGRAM_BYTES)
    theirs = _flatbuffer_to_program(data[:size])
    assert [(s.offset - base, s.bytes) for s in program.segments] == [
        (s.offset, s.size) for s in theirs.segments
    ]
    assert {key: program.segments.index(region) for key, region in program.named.items()} == {
        named.key: named.segment_index for named in theirs.named_data or []
    }
    assert list(program.methods) == [plan.name for plan in theirs.execution_plan]
    start = theirs.segments[theirs.constant_segment.segment_index].offset + base
    for plan in theirs.execution_plan:
        ours = program.methods[plan.name]
        values = [value.val for value in plan.values if isinstance(value.val, Tensor)]
        assert ours.arenas == tuple(plan.non_const_buffer_sizes)
        assert ours.operators == tuple(f"{o.name}.{o.overload}".rstrip(".") for o in plan.operators)
        assert [backend for backend, _ in ours.backends] == [delegate.id for delegate in plan.delegates]
        assert [t.shape for t in ours.tensors] == [tuple(value.sizes) for value in values]
        for tensor, value in zip(ours.tensors, values, strict=True):
            told = value.extra_tensor_info
            assert tensor.name == (told.fully_qualified_name if told and told.fully_qualified_name else "")
            plan_ = value.allocation_info
            assert tensor.memory == (plan_ and (plan_.memory_id, plan_.memory_offset))
            if tensor.constant is not None:
                assert tensor.constant == start + theirs.constant_segment.offsets[value.data_buffer_idx]


def test_what_a_runner_asks(program: PteProgram) -> None:
    assert program.constant("get_vocab_size") == 512
    assert program.constant("use_kv_cache") is True
    with pytest.raises(ArtifactError, match="no constant method forward"):
        program.constant("forward")
    (tokens, position), (logits,) = program.methods["forward"].inputs, program.methods["forward"].outputs
    assert isinstance(logits, PteTensor)
    assert (tokens.type, position.shape, logits.type, logits.shape) == ("int64", (1,), "float32", (1, 512))


def test_a_file_cut_short_anywhere(copy: Path) -> None:
    data = copy.read_bytes()
    for size in (*range(0, 64, 3), *range(64, len(data), max(1, len(data) // 97)), len(data) - 1):
        copy.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"model\.pte: .*(empty|no \.pte|cut short|damaged)"):
            read_program(copy)


@pytest.mark.parametrize(
    ("at", "put", "said"),
    [
        (IDENTIFIER, b"ET11", "a program of schema ET11, but ET12 is read"),
        (IDENTIFIER, b"GGUF", r"no \.pte file"),
        (8, b"eh99", "no extended header"),
        (PROGRAM_BYTES, struct.pack("<Q", 1 << 60), f"a program of {1 << 60} bytes"),
        (BASE, struct.pack("<Q", 8), "segments from byte 8"),
        (SEGMENT_BYTES, struct.pack("<Q", 1 << 62), "cut short: segments end at byte"),
        (ROOT, struct.pack("<I", 0xFFFFFFF0), "damaged ExecuTorch program: 4 bytes at byte 4294967280"),
    ],
)
def test_a_header_that_cannot_be(at: int, put: bytes, said: str, copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[at : at + len(put)] = put
    copy.write_bytes(data)
    with pytest.raises(ArtifactError, match=said):
        read_program(copy)


def test_another_version_of_the_schema(copy: Path) -> None:
    """The version is the program table's first field: absent while it is 0, so it is given a place."""
    data = bytearray(copy.read_bytes())
    root = struct.unpack_from("<I", data)[0]
    vtable = root - struct.unpack_from("<i", data, root)[0]
    # Any field will do for a number that is not 0: the offset of the list of methods.
    struct.pack_into("<H", data, vtable + 4, struct.unpack_from("<H", data, vtable + 6)[0])
    copy.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"schema version [1-9][0-9]*, but 0 is read"):
        read_program(copy)


def test_bytes_changed_at_random_end_in_a_sentence_or_in_numbers(copy: Path) -> None:
    rng = random.Random(3)
    whole = copy.read_bytes()
    end = struct.unpack_from("<Q", whole, PROGRAM_BYTES)[0]
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 32))):
            at = rng.randrange(end)
            data[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        copy.write_bytes(data)
        try:
            read_program(copy)
        except ArtifactError as error:
            assert "model.pte" in str(error)
            refused += 1
    assert refused > 100
