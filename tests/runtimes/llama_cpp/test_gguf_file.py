"""Looking into GGUF files: gguf-py's reader and the checkpoint as oracles, damaged and hostile headers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from safetensors.torch import save_file

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, VerificationError
from fox_edge.gguf_format import ArrayInfo, read_header
from fox_edge.quant import EMBEDDING, GGUF, TYPES, find_recipe
from runtimes.base import ModelFile, open_model_file
from runtimes.llama_cpp.gguf_file import GgufFile
from tests.helpers import PROBES, TINY, make_checkpoint, random_tensors

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def f32(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(tiny, tmp_path_factory.mktemp("f32") / "out", find_recipe(GGUF, "f32"))


@pytest.fixture(scope="module")
def int4(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(
        tiny_256, tmp_path_factory.mktemp("int4") / "out", find_recipe(GGUF, "int4"), rounding="nearest"
    )


@pytest.fixture(scope="module")
def untied(tiny_untied: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(tiny_untied, tmp_path_factory.mktemp("untied") / "out", find_recipe(GGUF, "bf16"))


def _original(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.float_rows(name).numpy()


def test_the_header_is_what_gguf_py_reads(int4: Artifact) -> None:
    header, theirs = read_header(int4.model_path), gguf.GGUFReader(int4.model_path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(header.metadata) == set(fields)
    for key, value in header.metadata.items():
        if isinstance(value, ArrayInfo):
            assert value.length == len(fields[key].data)
        else:
            assert value == fields[key].contents()
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = header.tensors[tensor.name]
        assert (mine.offset, mine.bytes) == (tensor.data_offset, tensor.n_bytes)
        assert (mine.type, mine.shape) == (tensor.tensor_type.name.lower(), tuple(tensor.shape[::-1]))


def test_rows_are_the_checkpoints_in_its_own_order(f32: Artifact, tiny: Checkpoint) -> None:
    file = open_model_file(f32)
    assert set(file.tensor_names()) == set(tiny.shapes())
    for name in tiny.shapes():
        original = _original(tiny, name)
        np.testing.assert_array_equal(file.rows(name, 0, len(original)), original)
    # A part that starts and ends inside a head.
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(file.rows(name, 5, 39), _original(tiny, name)[5:39])
    assert file.rows(EMBEDDING, 3, 3).shape == (0, 64)
    with pytest.raises(ValueError, match="rows 0 to 513 of 512"):
        file.rows(EMBEDDING, 0, 513)
    file.close()


def test_bf16_rows_and_the_head_of_an_untied_model(untied: Artifact, tiny_untied: Checkpoint) -> None:
    file = GgufFile(untied)
    for name in tiny_untied.shapes():
        original = _original(tiny_untied, name)
        np.testing.assert_array_equal(file.rows(name, 0, len(original)), original)
    with pytest.raises(VerificationError, match=r"holds output\.weight besides the embedding"):
        file.tie()


def test_quantized_rows_are_within_their_types_bound(
    int4: Artifact, tiny_256: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.llama_cpp.gguf_file._STEP_WEIGHTS", 10 * 256)
    file = GgufFile(int4)
    for record in int4.manifest.tensors:
        original = _original(tiny_256, record.name)
        back = file.rows(record.name, 0, len(original))
        error = np.linalg.norm(back - original) / np.linalg.norm(original)
        assert error <= TYPES[GGUF, record.type].max_error


def test_the_tie_names_its_bytes(int4: Artifact) -> None:
    file = GgufFile(int4)
    info = file.info(EMBEDDING)
    assert info.type == "q6_k" and info.bytes == 512 * 210
    assert f"bytes {info.offset} to {info.offset + info.bytes}" in file.tie()


def test_what_it_tells_a_runtime(int4: Artifact, untied: Artifact, tiny_256: Checkpoint) -> None:
    file: ModelFile = GgufFile(int4)
    assert file.special_ids() == {"bos": 2, "eos": 1, "pad": 0, "unk": 3}
    assert file.chat_template() == tiny_256.tokenizer().chat_template
    assert GgufFile(untied).special_ids() == {"bos": 1, "eos": 2, "pad": None, "unk": 0}


@pytest.mark.parametrize("text", PROBES)
@pytest.mark.parametrize("special", [False, True])
def test_llama_cpp_tokenizes_as_the_checkpoint_does(
    text: str, special: bool, int4: Artifact, untied: Artifact, tiny_256: Checkpoint, tiny_untied: Checkpoint
) -> None:
    for artifact, checkpoint in ((int4, tiny_256), (untied, tiny_untied)):
        file = GgufFile(artifact)
        assert file.tokenize(text, special) == checkpoint.tokenizer().encode(text, special=special)
        file.close()


def _damaged(artifact: Artifact, tmp_path: Path, change: Callable[[bytearray], bytearray]) -> Artifact:
    """A copy of the artifact whose model file went through `change`."""
    folder = shutil.copytree(artifact.path, tmp_path / "damaged")
    path = folder / artifact.manifest.model_file
    path.write_bytes(change(bytearray(path.read_bytes())))
    return Artifact.open(folder)


def _put(at: int, code: str, value: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        struct.pack_into("<" + code, data, at, value)
        return data

    return change


def _after(needle: bytes, skip: int, code: str, value: int) -> Callable[[bytearray], bytearray]:
    """Overwrite a number `skip` bytes behind a text."""

    def change(data: bytearray) -> bytearray:
        struct.pack_into("<" + code, data, data.index(needle) + len(needle) + skip, value)
        return data

    return change


HUGE = 1 << 62
TENSOR = b"token_embd.weight"  # then: dimensions u32, sizes 2 x u64, type u32, offset u64
DAMAGE = {
    "empty": (lambda data: bytearray(), "an empty file"),
    "not GGUF": (_put(0, "I", 0), "not a GGUF file"),
    "another version": (_put(4, "I", 99), "GGUF version 99"),
    "too many tensors": (_put(8, "Q", HUGE), f"{HUGE} tensors, but at most"),
    "too many keys": (_put(16, "Q", HUGE), f"{HUGE} keys, but at most"),
    "a long key": (_put(24, "Q", HUGE), f"{HUGE} bytes of text"),
    "a key beyond the end": (_put(24, "Q", 60_000), "bytes are due, but the file has|is not UTF-8"),
    "a long text": (_after(b"general.architecture", 4, "Q", HUGE), f"{HUGE} bytes of text"),
    "an unknown value type": (_after(b"general.architecture", 0, "I", 77), "unknown value type 77"),
    "a long array of texts": (_after(b"tokenizer.ggml.tokens", 8, "Q", HUGE), f"an array of {HUGE} texts"),
    "a long array of numbers": (_after(b"tokenizer.ggml.scores", 8, "Q", HUGE), "bytes are due"),
    "an array of arrays": (_after(b"tokenizer.ggml.scores", 4, "I", 9), "an array of value type 9"),
    "many dimensions": (_after(TENSOR, 0, "I", 1000), "1000 dimensions of token_embd.weight"),
    "no columns": (_after(TENSOR, 4, "Q", 0), r"shape \[512, 0\]"),
    "broken blocks": (_after(TENSOR, 4, "Q", 255), r"shape \[512, 255\] is no whole number of Q6_K"),
    "many rows": (_after(TENSOR, 12, "Q", HUGE), "cut short: tensor token_embd.weight|overlap"),
    "an unknown tensor type": (_after(TENSOR, 20, "I", 200), "token_embd.weight has the unknown type 200"),
    "an offset beyond the end": (_after(TENSOR, 24, "Q", 1 << 40), "cut short: tensor token_embd.weight"),
    "an odd offset": (_after(TENSOR, 24, "Q", (1 << 40) + 1), "no multiple of 32"),
    "upon another": (_after(b"output_norm.weight", 16, "Q", 64), "overlap at byte 64|no multiple"),
    "cut in the weights": (lambda data: data[:-4000], "cut short: tensor"),
    "cut in the header": (lambda data: data[:3000], "but the file has 3000"),
    "cut in the magic": (lambda data: data[:3], "not a GGUF file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(name: str, int4: Artifact, tmp_path: Path) -> None:
    change, sentence = DAMAGE[name]
    artifact = _damaged(int4, tmp_path, change)
    with pytest.raises(ArtifactError, match=sentence) as raised:
        GgufFile(artifact)
    assert str(artifact.model_path) in str(raised.value)


@pytest.mark.parametrize("seed", range(20))
def test_noise_in_the_header_never_escapes(seed: int, int4: Artifact, tmp_path: Path) -> None:
    def noise(data: bytearray) -> bytearray:
        rng = np.random.default_rng(seed)
        for at in rng.integers(4, 14_000, size=40):
            data[at] = rng.integers(256)
        return data

    artifact = _damaged(int4, tmp_path, noise)
    try:
        read_header(artifact.model_path)
    except ArtifactError as error:
        assert str(artifact.model_path) in str(error)


def test_a_tensor_that_the_manifest_does_not_know(int4: Artifact) -> None:
    fewer = dataclasses.replace(int4.manifest, tensors=int4.manifest.tensors[1:])
    with pytest.raises(
        ArtifactError, match=r"tensor token_embd\.weight is in the file, but not in the manifest"
    ):
        GgufFile(Artifact(int4.path, fewer))


def test_a_tensor_that_is_missing(int4: Artifact) -> None:
    more = dataclasses.replace(int4.manifest.tensors[0], name="model.extra", stored_as="extra.weight")
    manifest = dataclasses.replace(int4.manifest, tensors=(*int4.manifest.tensors, more))
    file = GgufFile(Artifact(int4.path, manifest))
    assert "model.extra" not in file.tensor_names()
    with pytest.raises(ArtifactError, match=r"has no tensor for model\.extra"):
        file.rows("model.extra", 0, 1)


def test_a_closed_file_says_so(int4: Artifact) -> None:
    file = GgufFile(int4)
    file.tokenize("a", False)
    file.close()
    file.close()
    with pytest.raises(ArtifactError, match="is closed"):
        file.rows(EMBEDDING, 0, 1)


@pytest.mark.parametrize("text", PROBES)
def test_a_vocabulary_from_tokenizer_json_merges_in_the_same_order(text: str, nano_json: Artifact) -> None:
    """Without tokenizer.model, the scores that llama.cpp merges by come from the ranks of the merges."""
    oracle = tokenizers.Tokenizer.from_file(str(nano_json.path / "tokenizer.json"))
    file = GgufFile(nano_json)
    expected = oracle.encode(text, add_special_tokens=False).ids
    assert file.tokenize(text, special=True) == expected
    file.close()


@pytest.fixture(scope="module")
def nano_json(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Nano's tokenizer.json, without its tokenizer.model, on random weights of its vocabulary."""
    folder = tmp_path_factory.mktemp("nano_json")
    checkpoint = make_checkpoint(folder / "checkpoint", TINY)
    (checkpoint / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(REPOSITORY / "fox_edge" / "nano" / name, checkpoint / name)
    config = dataclasses.replace(TINY, vocab_size=8192)
    (checkpoint / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(random_tensors(config), checkpoint / "model.safetensors")
    return export_gguf(Checkpoint.open(checkpoint), folder / "out", find_recipe(GGUF, "int8"))
