"""The safetensors reader and writer, and every way in which a header can lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fox_edge.errors import CheckpointError
from fox_edge.safetensors_file import SafetensorsFile, SafetensorsWriter


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "b": torch.randn(7).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"some": "metadata"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert file.tensor(name).dtype == dtype
        assert torch.equal(file.tensor(name), tensor)


def test_release_keeps_views_valid(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 512), "b": torch.randn(300, 512)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    view, other = file.tensor("a"), file.tensor("b")
    file.release("a")
    file.release("b", 4096, 8192)
    assert torch.equal(view, tensors["a"]) and torch.equal(other, tensors["b"])


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}).encode()
    header += b" " * (-len(header) % 8)
    path = write(tmp_path / "x.safetensors", header, b"\7" + struct.pack("<2f", 1.5, -2.0))
    assert SafetensorsFile(path).tensor("b").tolist() == [1.5, -2.0]


LIES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "empty file": (lambda p: _raw(p, b""), ["0 bytes"]),
    "seven bytes": (lambda p: _raw(p, b"1234567"), ["7 bytes"]),
    "a gguf": (lambda p: _raw(p, b"GGUF\3\0\0\0" + bytes(64)), ["GGUF"]),
    "header beyond the file": (lambda p: write(p, {}, b"", length=1 << 20), ["1048576"]),
    "header of exabytes": (lambda p: write(p, {}, b"", length=(1 << 64) - 1), [str((1 << 64) - 1)]),
    "no json": (lambda p: write(p, b"{nonsense", b""), ["JSON"]),
    "not utf-8": (lambda p: write(p, b'{"\xff\xfe": 1}', b""), ["JSON"]),
    "deep json": (lambda p: write(p, b"[" * 200_000, b""), ["JSON"]),
    "a list": (lambda p: write(p, [], b""), ["object"]),
    "twice the same name": (
        lambda p: write(p, b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', b""),
        ["'a'", "twice"],
    ),
    "entry is a number": (lambda p: write(p, {"a": 7}, b""), ["'a'"]),
    "unknown type": (lambda p: write(p, {"a": entry("F7")}, bytes(8)), ["'a'", "F7"]),
    "type is a list": (lambda p: write(p, {"a": entry(["F32"])}, bytes(8)), ["'a'"]),  # type: ignore[arg-type]
    "negative shape": (lambda p: write(p, {"a": entry(shape=[-2])}, bytes(8)), ["'a'", "-2"]),
    "fractional shape": (lambda p: write(p, {"a": entry(shape=[2.0])}, bytes(8)), ["'a'", "2.0"]),
    "boolean shape": (lambda p: write(p, {"a": entry(shape=[True, 2])}, bytes(8)), ["'a'"]),
    "no shape": (
        lambda p: write(p, {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
        ["'a'", "None"],
    ),
    "shape that overflows 64 bits": (
        lambda p: write(p, {"a": entry(shape=[1 << 33, 1 << 33])}, bytes(8)),
        ["'a'", str(4 << 66), "8"],
    ),
    "a thousand dimensions": (lambda p: write(p, {"a": entry(shape=[1] * 1000)}, bytes(8)), ["'a'", "shape"]),
    "offsets backwards": (lambda p: write(p, {"a": entry(offsets=[8, 0])}, bytes(8)), ["'a'", "[8, 0]"]),
    "three offsets": (lambda p: write(p, {"a": entry(offsets=[0, 8, 9])}, bytes(8)), ["'a'"]),
    "negative offset": (lambda p: write(p, {"a": entry(offsets=[-8, 0])}, bytes(8)), ["'a'", "-8"]),
    "too few bytes for the shape": (
        lambda p: write(p, {"a": entry(offsets=[0, 4])}, bytes(4)),
        ["'a'", "takes 8 bytes", "gives it 4"],
    ),
    "beyond the end": (
        lambda p: write(p, {"a": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, bytes(8)),
        ["truncated", str(1 << 42)[:4]],
    ),
    "overlap": (
        lambda p: write(p, {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        ["'b'", "overlaps"],
    ),
    "gap": (lambda p: write(p, {"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), ["'b'", "gap"]),
    "bytes left over": (lambda p: write(p, {"a": entry()}, bytes(9)), ["longer"]),
}


def _raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("lie", LIES)
def test_hostile_header(tmp_path: Path, lie: str) -> None:
    make, words = LIES[lie]
    path = make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    assert all(word in message for word in words), message


def test_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=f"truncated: its header describes {whole} bytes.* {whole - 1000}"
    ):
        SafetensorsFile(path)


def test_writer_is_read_by_safetensors(tmp_path: Path) -> None:
    a, b = torch.randn(10, 3), torch.randn(4)
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {"a": (10, 3), "b": (4,)}, torch.bfloat16) as writer:
        writer.write_rows("a", a[:4])
        writer.write_rows("b", b)
        writer.write_rows("a", a[4:])
    back = load_file(path)
    assert torch.equal(back["a"], a.bfloat16()) and torch.equal(back["b"], b.bfloat16())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("c", torch.zeros(2))], "'c' was not announced"),
        ([("a", torch.zeros(2, 4))], r"\[10, 3\] cannot take \[2, 4\]"),
        ([("a", torch.zeros(10, 3)), ("a", torch.zeros(1, 3))], "after 30 of 30"),
        ([("a", torch.zeros(9, 3)), ("b", torch.zeros(4))], "'a' got 27 of 30"),
    ],
)
def test_writer_refuses_disorder(tmp_path: Path, rows: list[tuple[str, torch.Tensor]], words: str) -> None:
    shapes = {"a": (10, 3), "b": (4,)}
    with (
        pytest.raises(CheckpointError, match=words),
        SafetensorsWriter(tmp_path / "x.safetensors", shapes, torch.float32) as writer,
    ):
        for name, tensor in rows:
            writer.write_rows(name, tensor)
