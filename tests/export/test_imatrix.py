"""Importance matrices: gguf-py's reader, llama-imatrix's layout by hand, and llama.cpp's own quantizer."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from export.gguf import export_gguf
from export.imatrix import Importance, matrix_columns, read_imatrix, write_imatrix
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError, FoxEdgeError
from fox_edge.gguf_format import stored_name
from fox_edge.quant import EMBEDDING, GGUF, HEAD, find_recipe
from tests.helpers import TINY_256

UNTIED = dataclasses.replace(TINY_256, tied=False)
Q = "model.layers.0.self_attn.q_proj.weight"


def importance(config: FoxConfig = TINY_256, tokens: int = 2048) -> Importance:
    rng = np.random.default_rng(0)
    columns = matrix_columns(config)
    sums = {name: rng.gamma(1, tokens, count).astype(np.float32) for name, count in columns.items()}
    return Importance(sums, dict.fromkeys(sums, tokens), 256, 8, ("built-in",), "ab" * 32, "cd" * 32)


def written(path: Path, config: FoxConfig = TINY_256) -> Path:
    write_imatrix(path / "imatrix.gguf", importance(config), config)
    return path / "imatrix.gguf"


def test_every_matrix_that_multiplies_has_an_entry() -> None:
    assert len(matrix_columns(TINY_256)) == 2 * 7 + 1
    assert matrix_columns(TINY_256)[EMBEDDING] == 256 and HEAD not in matrix_columns(TINY_256)
    assert matrix_columns(UNTIED)[HEAD] == 256 and EMBEDDING not in matrix_columns(UNTIED)
    assert matrix_columns(TINY_256)["model.layers.1.mlp.down_proj.weight"] == 512


@pytest.mark.parametrize("config", [TINY_256, UNTIED])
def test_what_is_written_is_read(config: FoxConfig, tmp_path: Path) -> None:
    want, got = importance(config), read_imatrix(written(tmp_path, config), config)
    assert set(got.sums) == set(want.sums)
    for name, values in want.sums.items():
        np.testing.assert_array_equal(got.sums[name], values)
        np.testing.assert_allclose(got.mean_squares(name), values / 2048, rtol=1e-6)
    assert dataclasses.replace(got, sums={}) == dataclasses.replace(want, sums={})
    assert got.mean_squares("model.norm.weight") is None


def test_the_file_is_llama_imatrixs(tmp_path: Path) -> None:
    """Keys, types and shapes as llama.cpp's tool writes them, seen through gguf-py."""
    reader = gguf.GGUFReader(written(tmp_path))
    fields = {
        key: field for key, field in reader.fields.items() if not key.startswith(("GGUF.", "fox_edge."))
    }
    assert {key: field.contents() for key, field in fields.items()} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["built-in"],
        "imatrix.chunk_count": 8,
        "imatrix.chunk_size": 256,
    }
    assert fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = sorted(stored_name(name) for name in importance().sums)
    assert list(tensors) == [f"{name}.{part}" for name in names for part in ("in_sum2", "counts")]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert tensors["blk.1.ffn_down.weight.in_sum2"].shape.tolist() == [512]
    # The tied head stands where llama-quantize looks for it.
    np.testing.assert_array_equal(tensors["token_embd.weight.in_sum2"].data, importance().sums[EMBEDDING])
    assert tensors["token_embd.weight.counts"].data.tolist() == [2048]


# Runs llama.cpp's quantizer with the file's own entries, as llama-quantize hands them over; prints its log.
QUANTIZE = """
import ctypes, json, sys
import gguf, numpy as np
import llama_cpp.llama_cpp as lib
Entry = lib.llama_model_imatrix_data
log = []
@lib.llama_log_callback
def keep(level, text, user): log.append(text.decode("utf-8", "replace"))
lib.llama_log_set(keep, None)
model, imatrix, out, kind = sys.argv[1:]
found = {t.name: np.array(t.data, dtype=np.float32) for t in gguf.GGUFReader(imatrix).tensors}
means = {n[:-8]: v / found[n[:-8] + ".counts"] for n, v in found.items() if n.endswith(".in_sum2")}
floats = ctypes.POINTER(ctypes.c_float)
listed = [Entry(n.encode(), v.ctypes.data_as(floats), v.size) for n, v in means.items()]
entries = (Entry * (len(listed) + 1))(*listed)
params = lib.llama_model_quantize_default_params()
params.ftype, params.nthread = int(kind), 1
params.imatrix = ctypes.cast(entries, ctypes.POINTER(Entry))
status = lib.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(params))
print(json.dumps({"status": status, "log": "".join(log)}))
"""
IQ2_XXS = 19  # refused by llama.cpp for a matrix of a layer without an entry


@pytest.fixture(scope="module")
def bf16(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "out"
    return export_gguf(tiny_256, folder, find_recipe(GGUF, "bf16")).model_path


def quantized(model: Path, imatrix: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", QUANTIZE, str(model), str(imatrix), str(out), str(IQ2_XXS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_llama_cpps_quantizer_finds_every_entry_the_tied_heads_too(bf16: Path, tmp_path: Path) -> None:
    done = quantized(bf16, written(tmp_path), tmp_path / "q.gguf")
    assert done["status"] == 0 and "did not find" not in done["log"]
    headless = importance()
    sums = {name: values for name, values in headless.sums.items() if name != EMBEDDING}
    write_imatrix(tmp_path / "no_head.gguf", dataclasses.replace(headless, sums=sums), TINY_256)
    without = quantized(bf16, tmp_path / "no_head.gguf", tmp_path / "q2.gguf")
    assert without["status"] == 0 and "did not find weights for token_embd.weight" in without["log"]
    heads = [
        next(t.data for t in gguf.GGUFReader(tmp_path / name).tensors if t.name == "token_embd.weight")
        for name in ("q.gguf", "q2.gguf")
    ]
    assert not np.array_equal(*heads)


def test_llama_imatrix_leaves_the_tied_head_out(tmp_path: Path) -> None:
    """A file as llama-imatrix writes it: no head, and none of our digests."""
    want = importance()
    got = read_imatrix(theirs(tmp_path), TINY_256)
    assert set(got.sums) == set(want.sums) - {EMBEDDING}
    np.testing.assert_array_equal(got.sums[Q], want.sums[Q])
    assert (got.chunk_size, got.chunk_count, got.datasets) == (256, 8, ("wiki.txt",))
    assert got.ids_sha256 is None and got.checkpoint_sha256 is None


def test_an_entry_made_for_the_heads_own_matrix_serves_the_tied_one(tmp_path: Path) -> None:
    path = theirs(tmp_path, add={"output.weight": 256})
    np.testing.assert_array_equal(read_imatrix(path, TINY_256).sums[EMBEDDING], np.full(256, 2.0))
    both = theirs(tmp_path, add={"output.weight": 256, "token_embd.weight": 256})
    assert "two entries" in message(both)


def test_the_older_format(tmp_path: Path) -> None:
    want = importance()
    blob = struct.pack("<i", len(want.sums))
    for name, values in want.sums.items():
        text, means = stored_name(name).encode(), values / 2048 * 8
        blob += struct.pack("<i", len(text)) + text + struct.pack("<ii", 8, values.size) + means.tobytes()
    whole = blob + struct.pack("<ii", 8, 8) + b"wiki.txt"
    path = tmp_path / "imatrix.dat"
    path.write_bytes(whole)
    got = read_imatrix(path, TINY_256)
    for name in want.sums:
        np.testing.assert_allclose(got.mean_squares(name), want.mean_squares(name), rtol=1e-6)
    assert (got.chunk_count, got.datasets) == (8, ("wiki.txt",))
    path.write_bytes(blob)  # without its tail, as the first versions wrote it
    assert set(read_imatrix(path, TINY_256).sums) == set(want.sums)
    for size in (1, 7, 40, len(blob) // 2):
        path.write_bytes(whole[:size])
        assert "neither GGUF nor a" in message(path)
    path.write_bytes(struct.pack("<ii", 1 << 16, 1 << 30) + bytes(100))
    assert f"({1 << 30} bytes of a name)" in message(path)
    path.write_bytes(struct.pack("<i", -5) + bytes(100))
    assert "(-5 entries)" in message(path)


def theirs(
    folder: Path,
    add: dict[str, int] | None = None,
    change: Callable[[dict[str, np.ndarray]], Any] | None = None,
    type: str = "imatrix",
) -> Path:
    """A file as llama-imatrix makes it of a tied model; `change` edits its tensors."""
    want = importance()
    tensors: dict[str, np.ndarray] = {}
    for name, values in want.sums.items():
        if name != EMBEDDING:
            tensors[stored_name(name) + ".in_sum2"] = values
            tensors[stored_name(name) + ".counts"] = np.array([2048], np.float32)
    for stored, columns in (add or {}).items():
        tensors[stored + ".in_sum2"] = np.full(columns, 2, np.float32)
        tensors[stored + ".counts"] = np.ones(1, np.float32)
    if change is not None:
        change(tensors)
    path = folder / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(type)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 8)
    writer.add_uint32("imatrix.chunk_size", 256)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def message(path: Path, config: FoxConfig = TINY_256) -> str:
    """What a user is told; always one sentence that names the file."""
    with pytest.raises(ArtifactError) as error:
        read_imatrix(path, config)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and len(text) < 400
    return text


def put(name: str, at: int, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


FIRST = "blk.0.attn_q.weight"
BAD: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "wrong columns": (
        lambda t: t.update({FIRST + ".in_sum2": np.ones(64, np.float32)}),
        f"{FIRST} has 64 columns, but the model's has 256; it is another model's",
    ),
    "a missing matrix": (
        lambda t: [t.pop(FIRST + end) for end in (".in_sum2", ".counts")],
        f"has no entry for {FIRST} and 0 more of 15 matrices",
    ),
    "another layer": (
        lambda t: t.update({f"blk.2.attn_q.weight{end}": t[FIRST + end] for end in (".in_sum2", ".counts")}),
        "has an entry for blk.2.attn_q.weight, which a model of 2 layers has not",
    ),
    "no counts": (lambda t: t.pop(FIRST + ".counts"), f"{FIRST} has no counts"),
    "no sums": (lambda t: t.pop(FIRST + ".in_sum2"), f"{FIRST} has counts, but no sums"),
    "another tensor": (lambda t: t.update({"x.weight": t[FIRST + ".counts"]}), "tensor x.weight is neither"),
    "nan": (put(FIRST + ".in_sum2", 7, np.nan), f"{FIRST} has nan at column 7"),
    "infinite": (put(FIRST + ".in_sum2", 7, np.inf), f"{FIRST} has inf at column 7"),
    "negative": (put(FIRST + ".in_sum2", 9, -1), f"{FIRST} has -1 at column 9"),
    "all zero": (
        lambda t: t.update({FIRST + ".in_sum2": np.zeros(256, np.float32)}),
        f"{FIRST} is zero at all 256 columns",
    ),
    "no tokens": (put(FIRST + ".counts", 0, 0), f"{FIRST} was computed from 0 tokens"),
    "fewer than no tokens": (put(FIRST + ".counts", 0, -3), f"{FIRST}.counts is -3"),
    "half a token": (put(FIRST + ".counts", 0, 0.5), f"{FIRST}.counts is 0.5"),
    "nan tokens": (put(FIRST + ".counts", 0, np.nan), f"{FIRST}.counts is nan"),
    "experts": (
        lambda t: t.update({FIRST + ".counts": np.ones(8, np.float32)}),
        f"{FIRST}.counts holds 8 counts, one per expert",
    ),
    "half floats": (
        lambda t: t.update({FIRST + ".in_sum2": t[FIRST + ".in_sum2"].astype(np.float16)}),
        f"{FIRST}.in_sum2 has type f16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_importance_of_this_model(name: str, tmp_path: Path) -> None:
    change, sentence = BAD[name]
    assert sentence in message(theirs(tmp_path, change=change))


def test_the_importance_of_a_larger_model(tmp_path: Path) -> None:
    path = written(tmp_path, dataclasses.replace(TINY_256, num_layers=5))
    assert "blk.2." in message(path) and "a model of 2 layers" in message(path)
    small = tmp_path / "small"
    small.mkdir()
    path = written(small, dataclasses.replace(TINY_256, num_layers=1))
    assert "has no entry for blk.1.attn_q.weight and 6 more of 15 matrices" in message(path)


def test_a_model_instead(bf16: Path, tmp_path: Path) -> None:
    assert "general.type is 'model', but 'imatrix' is due" in message(bf16)
    assert "general.type is 'adapter'" in message(theirs(tmp_path, type="adapter"))


HUGE = 1 << 60
HOSTILE = {
    "tensors": (8, "Q", f"{HUGE} tensors, but at most"),
    "keys": (16, "Q", f"{HUGE} keys, but at most"),
    "a key": (24, "Q", f"{HUGE} bytes of text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    at, code, sentence = HOSTILE[name]
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + code, data, at, HUGE)
    path.write_bytes(data)
    assert sentence in message(path)


def test_hostile_lengths_and_cuts(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    for needle, skip, value in (
        (b"imatrix.datasets", 8, HUGE),  # length of the array
        (b"attn_q.weight.in_sum2", 4, HUGE),  # columns of a tensor
        (b"attn_q.weight.in_sum2", 16, HUGE),  # its offset
    ):
        damaged = bytearray(data)
        struct.pack_into("<Q", damaged, damaged.index(needle) + len(needle) + skip, value)
        path.write_bytes(damaged)
        message(path)
    for size in (0, 3, 20, 200, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        message(path)
    path.unlink()
    assert "no such file" in message(path)


def test_a_file_in_the_way_stays_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        write_imatrix(path, importance(tokens=5), TINY_256)
    monkeypatch.setattr("export.imatrix._Writer.write_tensors_to_file", _full)
    with pytest.raises(ArtifactError, match=r"writing failed \(No space left on device\); nothing was kept"):
        write_imatrix(path, importance(tokens=5), TINY_256, replace=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_imatrix(path, importance(tokens=5), TINY_256, replace=True)
    assert read_imatrix(path, TINY_256).counts[Q] == 5


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_sums_that_are_not_this_models_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FoxEdgeError, match=r"model\.norm\.weight is no matrix"):
        more = {**importance().sums, "model.norm.weight": np.ones(256, np.float32)}
        write_imatrix(tmp_path / "x.gguf", dataclasses.replace(importance(), sums=more), TINY_256)
    with pytest.raises(ArtifactError, match="was computed from 0 tokens"):
        write_imatrix(tmp_path / "x.gguf", dataclasses.replace(importance(), counts={}), TINY_256)
    assert list(tmp_path.iterdir()) == []
