"""Damage to a GGUF file, seeded: what bits, lengths, texts and cuts can do to it."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path

from fox_edge.gguf_format import ARRAY, Header, read_header

INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    256,
    511,
    513,
    1 << 16,
    (1 << 20) + 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
]
LONG = [*INTEGERS, 1 << 33, 1 << 40, (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FLOATS = [0.0, -0.0, 1e-45, -1.0, 1e38, float("inf"), float("-inf"), float("nan")]


@dataclass(frozen=True)
class Regions:
    """Byte ranges of a file: keys and values, the vocabulary's arrays among them, tensor table, weights."""

    keys: tuple[tuple[int, int], ...]
    vocabulary: tuple[int, int]
    table: tuple[int, int]
    weights: tuple[int, int]
    values: tuple[tuple[int, str], ...]  # where a number is, and its struct code

    @classmethod
    def of(cls, path: Path) -> Regions:
        """Find them in an undamaged file."""
        data, header = path.read_bytes(), read_header(path)
        first = header.metadata["tokenizer.ggml.tokens"].start
        last = header.metadata["tokenizer.ggml.token_type"]
        end = last.start + 4 * last.length
        table = data.index(struct.pack("<Q", 17) + b"token_embd.weight")
        weights = min(info.offset for info in header.tensors.values())
        keys, values = ((0, first), (end, table)), _values(data, header)
        return cls(keys, (first, end), (table, weights), (weights, len(data)), values)


def _values(data: bytes, header: Header) -> tuple[tuple[int, str], ...]:
    """Every number that a value, an array's head, or an entry of the tensor table has."""
    found = [(4, "I"), (8, "Q"), (16, "Q")]
    for key, kind in header.kinds.items():
        at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
        found += [(at, "I"), (at + 4, {4: "I", 5: "i", 6: "f", 7: "B", 8: "Q", 9: "I"}[kind])]
        found += [(at + 8, "Q")] if kind == ARRAY else []
    for key, code in (("scores", "f"), ("token_type", "i")):
        array = header.metadata[f"tokenizer.ggml.{key}"]
        found += [(array.start + 4 * n, code) for n in range(0, array.length, 29)]
    for name, info in header.tensors.items():
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        sizes = len(info.shape)
        found += [(at, "I"), *((at + 4 + 8 * n, "Q") for n in range(sizes))]
        found += [(at + 4 + 8 * sizes, "I"), (at + 8 + 8 * sizes, "Q")]
    return tuple(found)


def mutate(data: bytes, regions: Regions, seed: int) -> bytes:
    """The same damage for the same seed; never the file itself."""
    rng = random.Random(seed)
    while True:
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            damaged = rng.choice(KINDS)(damaged, regions, rng)
        if bytes(damaged) != data:
            return bytes(damaged)


def _place(regions: Regions, rng: random.Random) -> int:
    """Somewhere before the weights, keys and tensor table before all."""
    start, stop = rng.choice((*regions.keys, regions.table, *regions.keys, regions.table, regions.vocabulary))
    return rng.randrange(start, stop)


def _flip_header(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = _place(regions, rng)
        if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return data


def _flip_weights(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 16, 256))):
        at = rng.randrange(*regions.weights)
        if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return data


def _number(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    """Another number where one may be: behind a text, or among the tensor table."""
    code, values = rng.choice(
        (("<Q", LONG), ("<I", INTEGERS), ("<f", FLOATS), ("<H", [0, 0x7C00, 0x7E00, 0xFFFF]))
    )
    at = _place(regions, rng)
    if rng.random() < 0.7:  # where a small number ends in zeros, most likely a length, a type or a value
        at = data.find(b"\0\0\0", at)
        at = max(0, at - rng.randrange(3)) if at > 0 else 0
    if at + 8 <= len(data):
        struct.pack_into(code, data, at, rng.choice(values))
    return data


def _value(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    """A number that is one gets another value: an edge, one more or less, or what another place has."""
    at, code = rng.choice(regions.values)
    size = struct.calcsize("<" + code)
    if at + 8 > len(data) or regions.weights[0] > len(data):
        return data
    before = struct.unpack_from("<" + code, data, at)[0]
    if code == "f":
        value = rng.choice((*FLOATS, before * 2, before + 1))
    else:
        other = struct.unpack_from("<Q", data, rng.choice(regions.values)[0])[0]
        value = rng.choice((*LONG, before + 1, before - 1, before * 2, other, other, rng.randrange(40)))
        value = value % (1 << 8 * size)
        code = code.upper()
    struct.pack_into("<" + code, data, at, value)
    return data


def _scales(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    """Not-a-numbers and infinities all over the weights."""
    for _ in range(rng.choice((1, 50, 2000))):
        at = rng.randrange(*regions.weights) & ~1
        if at + 2 <= len(data):
            struct.pack_into("<H", data, at, rng.choice((0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7F80, 0x7FC0)))
    return data


def _cut(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    return data[: rng.choice((rng.randrange(len(data)), rng.randrange(regions.weights[0]), len(data) - 1))]


def _splice(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    """A piece of the header overwrites, enters, or leaves another place."""
    size = rng.choice((1, 4, 8, 40, 300))
    source, target = _place(regions, rng), _place(regions, rng)
    piece = data[source : source + size]
    way = rng.randrange(3)
    data[target : target + (size if way == 0 else 0)] = piece if way < 2 else b""
    if way == 2:
        del data[target : target + size]
    return data


def _text(data: bytearray, regions: Regions, rng: random.Random) -> bytearray:
    """A byte of a text becomes nothing, a control character, or no UTF-8."""
    at = _place(regions, rng)
    if at < len(data):
        data[at] = rng.choice((0, 10, 27, 0x80, 0xC0, 0xFF, 0x3C, 0x3E))
    return data


KINDS = (_flip_header, _flip_weights, _number, _value, _value, _value, _scales, _cut, _splice, _text)
