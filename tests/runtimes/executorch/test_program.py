"""Damaged and hostile .pte artifacts: refused in one sentence before ExecuTorch sees them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fox_edge import cli
from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError, MissingPackageError, VerificationError
from fox_edge.quant import EMBEDDING, PTE
from runtimes.base import open_model_file, open_session
from runtimes.executorch.file import PteFile
from runtimes.executorch.program import read_artifact_program
from runtimes.executorch.weights import F32, QB4W, QC8W, Place
from runtimes.executorch.weights import read_places as places_of
from runtimes.kv_types import artifact_kv, kv_bytes_per_position
from tests.helpers import TINY_256

NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copy(tiny_pte: Artifact, tmp_path: Path) -> Artifact:
    """A copy of the artifact that a test may damage."""
    shutil.copytree(tiny_pte.path, tmp_path / "copy")
    return Artifact(tmp_path / "copy", tiny_pte.manifest)


def read_places(artifact: Artifact) -> dict[str, Place]:
    return places_of(artifact, read_artifact_program(artifact).pte)


def told(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> Artifact:
    """The artifact with another `pte` in its manifest, written and read again."""
    path = artifact.path / MANIFEST
    fields = json.loads(path.read_text("utf-8"))
    change(fields["pte"])
    path.write_text(json.dumps(fields), encoding="utf-8")
    return Artifact.open(artifact.path)


def test_an_intact_one_is_read(copy: Artifact) -> None:
    program = read_artifact_program(copy)
    assert (program.context, program.kv, program.vocab_size) == (256, "float32", 512)
    assert program.cache_bytes == 2 * 2 * 16 * 4 * 256
    assert sorted(t.shape for t in program.caches.values()) == [(1, 256, 1, 16)] * 4


@pytest.mark.parametrize("opened", [open_session, open_model_file])
def test_one_that_is_cut_short(opened: Callable[[Artifact], object], copy: Artifact) -> None:
    data = copy.model_path.read_bytes()
    copy.model_path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"cut short.*{len(data) - 1}"):
        opened(copy)


def test_the_command_says_it_in_one_sentence(copy: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    copy.model_path.write_bytes(copy.model_path.read_bytes()[:5000])
    for words in (["chat", str(copy.path), "Hello"], ["inspect", str(copy.path)]):
        assert cli.main(words) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert len(said) == 1 and "model.pte: cut short" in said[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["tensors"][EMBEDDING].update(offset=4096), "no such piece of data there"),
        (lambda p: p["tensors"][QUERY].update(scales_offset=0), r"the scales of .*q_proj.* no such piece"),
        (lambda p: p["tensors"][QUERY].update(rows=1), "no such piece of data there"),
        (lambda p: p["tensors"][NORM].update(offset=1 << 40), "would end at byte"),
        (lambda p: p["tensors"][NORM].update(offset=-4), "'offset' of model.norm.weight is -4"),
        (lambda p: p["tensors"][QUERY].update(layout="q9"), "none of the layouts"),
        (
            lambda p: p["tensors"][QUERY].update(scales_type="f32"),
            r"are 'f32', but qb4w has bf16",
        ),
        (lambda p: p["tensors"][QUERY].update(block=100), "no whole number of blocks of 100"),
        (lambda p: p["tensors"].pop(EMBEDDING), "of which no place is told"),
        (lambda p: p.update(tensors=[]), "has no 'pte' with the places"),
        (lambda p: p.update(context=100), "get_max_context_len is 256, but 100"),
        (lambda p: p.update(chunk=7), "pte's chunk is 7, but the program's is 128"),
        (lambda p: p.update(kv="int8"), "pte's kv is 'int8', but the program's is 'float32'"),
        (lambda p: p["embedding"].update(column_scales_offset=1 << 44), "would end at byte"),
    ],
)
def test_a_manifest_whose_places_do_not_match(
    change: Callable[[dict[str, Any]], object], said: str, copy: Artifact
) -> None:
    changed = told(copy, change)
    for opened in (open_session, open_model_file):
        with pytest.raises(ArtifactError, match=said):
            opened(changed)


def test_a_manifest_without_places(copy: Artifact) -> None:
    bare = Artifact(copy.path, dataclasses.replace(copy.manifest, pte=None))
    with pytest.raises(ArtifactError, match="pte's context is None, but the program's is 256"):
        open_session(bare)


def renamed(artifact: Artifact, old: bytes, new: bytes) -> Artifact:
    data = artifact.model_path.read_bytes()
    assert data.count(old) and len(old) == len(new)
    artifact.model_path.write_bytes(data.replace(old, new))
    return artifact


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"\x05\0\0\0score\0", b"\x05\0\0\0scare\0", "no method 'score', but: enable_dynamic_shape, forward"),
        (b"get_vocab_size", b"get_vocab_sise", "no constant method get_vocab_size"),
        (b"XnnpackBackend", b"OpenvinoBacken", "wants the delegate OpenvinoBacken"),
    ],
)
def test_a_program_of_another_kind(old: bytes, new: bytes, said: str, copy: Artifact) -> None:
    with pytest.raises(ArtifactError, match=said):
        open_session(renamed(copy, old, new))


def test_methods_that_do_not_share_their_cache(copy: Artifact) -> None:
    """The same names at other places: what is changed is the name in one method."""
    data = copy.model_path.read_bytes()
    name = next(iter(read_artifact_program(copy).caches)).encode()
    assert data.count(name) == 2
    copy.model_path.write_bytes(data.replace(name, name[:-1] + b"_", 1))
    with pytest.raises(ArtifactError, match="do not share a cache"):
        open_session(copy)


def test_another_vocabulary_than_config_json_s(copy: Artifact) -> None:
    path = copy.path / "config.json"
    path.write_text(
        path.read_text("utf-8").replace('"vocab_size": 512', '"vocab_size": 500'), encoding="utf-8"
    )
    with pytest.raises(ArtifactError, match="get_vocab_size is 512, but 500"):
        open_session(copy)


def test_what_executorch_itself_refuses(copy: Artifact) -> None:
    """XNNPACK's payloads are beyond what is looked into here: its own refusal becomes a sentence."""
    program = read_artifact_program(copy)
    payload = program.pte.methods["forward"].backends[0][1]
    data = bytearray(copy.model_path.read_bytes())
    data[payload.offset : payload.offset + 64] = bytes(64)
    copy.model_path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.pte: ExecuTorch refuses it: \S"):
        open_session(copy)


def test_a_second_copy_of_the_matrix_is_found(copy: Artifact) -> None:
    """Bytes that belong to nothing, as many as the matrix has, before the end."""
    with_room = copy.model_path.read_bytes() + bytes(512 * 32 + (64 << 10) + 4096 * 200)
    copy.model_path.write_bytes(with_room)
    with (
        contextlib.closing(PteFile(copy)) as file,
        pytest.raises(VerificationError, match="room for a second"),
    ):
        file.tie()


def test_a_matrix_that_is_not_what_its_key_says(copy: Artifact) -> None:
    data, at = bytearray(copy.model_path.read_bytes()), read_places(copy)[EMBEDDING].offset
    data[at] ^= 1
    copy.model_path.write_bytes(data)
    with contextlib.closing(PteFile(copy)) as file, pytest.raises(VerificationError, match="their sha256 is"):
        file.tie()


def test_lookups_elsewhere_than_in_the_head(copy: Artifact) -> None:
    """The constant segment's offset of the table, moved by a line: as an export with two copies has it."""
    data, place = bytearray(copy.model_path.read_bytes()), read_places(copy)[EMBEDDING]
    segments = read_artifact_program(copy).pte.segments
    (start,) = [r.offset for r in segments if r.offset < place.offset < r.offset + r.bytes]
    at, scales = place.offset - start, place.scales_offset - start
    told = struct.pack("<QQ", at, scales)
    assert data.count(told) == 1
    copy.model_path.write_bytes(data.replace(told, struct.pack("<QQ", at - 128, scales)))
    with (
        contextlib.closing(PteFile(copy)) as file,
        pytest.raises(VerificationError, match="does not look rows up"),
    ):
        file.tie()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    monkeypatch.delitem(sys.modules, "runtimes.executorch.engine", raising=False)
    with pytest.raises(MissingPackageError, match=r"^executorch is not installed; .*fox-edge\[executorch\]"):
        importlib.import_module("runtimes.executorch.engine")


@pytest.mark.parametrize(
    ("told", "positions", "kv"),
    [
        ({"context": 100, "kv": "int8"}, 100, "int8"),
        ({"context": 256, "kv": "float32"}, 256, "float32"),
        ({"context": 257, "kv": "int3"}, 256, "float32"),
        ({"context": 0, "kv": []}, 256, "float32"),
        ({"context": True, "kv": None}, 256, "float32"),
        ({"context": "9"}, 256, "float32"),
        (None, 256, "float32"),
    ],
)
def test_what_a_manifest_says_of_the_cache(
    told: dict[str, Any] | None, positions: int, kv: str, tiny_pte: Artifact
) -> None:
    manifest = dataclasses.replace(tiny_pte.manifest, pte=told)
    assert (manifest.positions, artifact_kv(manifest)) == (positions, kv)


def test_a_position_of_int8_has_a_scale_and_a_zero_point_per_head() -> None:
    """Per layer, for keys and for values: 2 heads of 64 numbers, a float32 and an int8 beside each head."""
    assert kv_bytes_per_position(TINY_256, PTE, "int8") == 2 * 2 * 2 * (64 + 5)
    assert kv_bytes_per_position(TINY_256, PTE, "float32") == 2 * 2 * 2 * 64 * 4


# --- the two layouts, by hand -------------------------------------------------------------------------------


def test_four_bits_by_hand() -> None:
    """Two rows of four columns in blocks of two: low nibble first, 8 above the value, bfloat16 scales."""
    numbers = bytes([0x98, 0x07, 0xF8, 0x88])  # 0 1 -1 -8 / 0 7 0 0
    scales = np.array([0.5, 2.0, 1.0, 4.0], np.float32).view(np.uint32) >> 16
    data = b"????" + numbers + scales.astype("<u2").tobytes() + np.array([1, 10, 100, 1], "<f4").tobytes()
    place = Place(QB4W, offset=4, rows=2, columns=4, block=2, scales_offset=8)
    want = np.array([[0, 0.5, -2, -16], [0, 7, 0, 0]], np.float32)
    np.testing.assert_array_equal(place.decode(data, 0, 2), want)
    np.testing.assert_array_equal(place.decode(data, 1, 2), want[1:])
    scaled = dataclasses.replace(place, column_scales=16)
    np.testing.assert_array_equal(scaled.decode(data, 0, 2), want * [1, 10, 100, 1])


def test_eight_bits_and_floats_by_hand() -> None:
    data = bytes([1, 255, 128, 127]) + np.array([0.5, 3.0], "<f4").tobytes()
    place = Place(QC8W, offset=0, rows=2, columns=2, block=2, scales_offset=4)
    np.testing.assert_array_equal(place.decode(data, 0, 2), [[0.5, -0.5], [-384, 381]])
    plain = Place(F32, offset=4, rows=1, columns=2, block=2, scales_offset=0)
    np.testing.assert_array_equal(plain.decode(data, 0, 1), [[0.5, 3.0]])
