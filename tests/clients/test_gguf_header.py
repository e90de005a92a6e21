"""What the page says of a GGUF file before it is run, held against gguf-py and damaged files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fox_edge.artifact import Artifact
from tests.clients.helpers import HERE, need_node, run_node


def headers(*files: Path) -> dict[str, Any]:
    return run_node(need_node(HERE), "gguf_header.mjs", *files)


def test_sizes_of_blocks_are_ggml_s() -> None:
    told = headers()["blocks"]
    theirs = {str(int(kind)): list(size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert told == {kind: theirs[kind] for kind in told}
    # What is missing there is no type of weights: integers, and what only activations are rounded to.
    missing = {gguf.GGMLQuantizationType(int(kind)).name for kind in theirs.keys() - told.keys()}
    assert {"Q4_K", "Q8_0", "BF16"}.isdisjoint(missing) and "Q8_K" in missing


def test_a_header_is_read_as_gguf_py_reads_it(nano_gguf: Artifact) -> None:
    (found,) = headers(nano_gguf.model_path)["found"]
    reader = gguf.GGUFReader(nano_gguf.model_path)

    def value(key: str) -> object:
        field = reader.get_field(key)
        assert field is not None
        return field.contents()

    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    assert found["header"] == {
        "architecture": "llama",
        "name": value("general.name"),
        "context": value("llama.context_length"),
        "end": last.data_offset + last.n_bytes,
    }


def test_a_header_of_every_kind_of_value(tmp_path: Path) -> None:
    """Longer than one look at the file; values and arrays of all types before the one that is asked for."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "other")
    writer.add_array("a.tokens", [f"piece {n}" for n in range(60_000)])
    writer.add_array("a.scores", [0.5] * 1000)
    writer.add_array("a.nested", [["x", "yy"], ["z"]])
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_context_length(4096)
    writer.add_custom_alignment(64)
    writer.add_tensor("w", np.zeros((3, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (found,) = headers(path)["found"]
    (tensor,) = gguf.GGUFReader(path).tensors
    assert found["header"] == {
        "architecture": "other",
        "name": None,
        "context": 4096,
        "end": tensor.data_offset + tensor.n_bytes,
    }


def test_files_that_are_not_whole_are_told_apart(nano_gguf: Artifact, tmp_path: Path) -> None:
    whole = nano_gguf.model_path.read_bytes()
    size = len(whole)
    lengths = [0, 3, 4, 11, 30, 1000, 150_000, 3_000_000, size - 1]
    files = []
    for length in lengths:
        files.append(tmp_path / f"{length}.gguf")
        files[-1].write_bytes(whole[:length])
    said = [found["error"] for found in headers(*files)["found"]]
    letters = "is not a model: a GGUF file begins with the letters GGUF, and this one does not"
    assert said[:2] == [f"{n}.gguf {letters}" for n in lengths[:2]]
    for length, sentence in zip(lengths[2:-2], said[2:-2], strict=True):
        assert sentence == (
            f"{length}.gguf is cut short: its header is longer than the {length:,} bytes that it has"
        )
    for length, sentence in zip(lengths[-2:], said[-2:], strict=True):
        assert sentence == (
            f"{length}.gguf is cut short: it has {length:,} bytes, but its tensors end at {size:,} bytes"
        )


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_headers_end_in_a_sentence(nano_gguf: Artifact, tmp_path: Path, seed: int) -> None:
    """Whatever bytes there are: an answer in time, and no complaint of the language's own."""
    rng = random.Random(seed)
    head = nano_gguf.model_path.read_bytes()[:200_000]
    files = []
    for n in range(40):
        damaged = bytearray(head)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(4, 4000)] = rng.choice((0, 1, 255, rng.randrange(256)))
        files.append(tmp_path / f"{n}.gguf")
        files[-1].write_bytes(bytes(damaged))
    for found in headers(*files)["found"]:
        assert found["kind"] == "Error" and ".gguf" in found["error"]
