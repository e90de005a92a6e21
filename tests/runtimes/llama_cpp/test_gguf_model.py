"""What a GGUF says of its model holds together, or one sentence says what does not."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from export.gguf import export_gguf
from export.gguf_header import write_header
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError
from fox_edge.gguf_format import read_header
from fox_edge.quant import GGUF, find_recipe
from runtimes.base import SessionOptions
from runtimes.llama_cpp.gguf_file import GgufFile
from runtimes.llama_cpp.gguf_model import read_config
from runtimes.llama_cpp.session import LlamaCppSession, Vocabulary
from tests.helpers import make_checkpoint

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(
        tiny_256, tmp_path_factory.mktemp("model") / "out", find_recipe(GGUF, "int4"), rounding="nearest"
    )


def rewritten(artifact: Artifact, path: Path, change: Change) -> Path:
    """The same model written anew by gguf-py, its keys and tensors edited: {'keys': ..., 'tensors': ...}."""
    reader = gguf.GGUFReader(artifact.model_path)
    keys = {
        key: [field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None]
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.architecture"
    }
    tensors = {t.name: [np.array(t.data), t.tensor_type] for t in reader.tensors}
    change({"keys": keys, "tensors": tensors})
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind, element) in keys.items():
        writer.add_key_value(key, value, kind, sub_type=element)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def message(path: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        read_config(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 400
    return text


def put(key: str, value: Any) -> Change:
    def change(parts: dict[str, Any]) -> None:
        parts["keys"][key][0] = value

    return change


def new(key: str, value: Any, kind: gguf.GGUFValueType) -> Change:
    return lambda parts: parts["keys"].update({key: [value, kind, None]})


def entry(key: str, at: int, value: Any) -> Change:
    """One element of an array gets another value."""

    def change(parts: dict[str, Any]) -> None:
        parts["keys"][f"tokenizer.ggml.{key}"][0][at] = value

    return change


def shorter(key: str) -> Change:
    return lambda parts: parts["keys"][f"tokenizer.ggml.{key}"][0].pop()


def tensor(name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType) -> Change:
    return lambda parts: parts["tensors"].update({name: [data, kind]})


F16, F32, Q8_K = (gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "Q8_K"))
UINT32, FLOAT32, TEXT = (gguf.GGUFValueType[name] for name in ("UINT32", "FLOAT32", "STRING"))
CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "an unknown key": (
        new("llama.expert_count", 8, UINT32),
        "the key 'llama.expert_count' is none of a Fox's",
    ),
    "rope that is scaled": (
        new("llama.rope.scaling.factor", 2.0, FLOAT32),
        "'llama.rope.scaling.factor' is none",
    ),
    "a file of parts": (new("split.count", 3, UINT32), "the key 'split.count' is none of a Fox's"),
    "extra tensors' keys": (
        new("general.tensor_extra.name", "x", TEXT),
        "'general.tensor_extra.name' is none",
    ),
    "a value of another type": (
        new("llama.block_count", "two", TEXT),
        "the value of llama.block_count has type text, but uint32 is due",
    ),
    "no heads": (
        lambda parts: parts["keys"].pop("llama.attention.head_count"),
        "has no llama.attention.head_count",
    ),
    "no vocabulary": (
        lambda parts: parts["keys"].pop("tokenizer.ggml.tokens"),
        "has no tokenizer.ggml.tokens",
    ),
    "no scores": (lambda parts: parts["keys"].pop("tokenizer.ggml.scores"), "has no tokenizer.ggml.scores"),
    "infinite": (put("llama.rope.freq_base", float("inf")), "rope_theta inf: not finite"),
    "values of another size": (
        put("llama.attention.value_length", 32),
        "value_length is 32, but head_dim 64",
    ),
    "half of the head rotated": (
        put("llama.rope.dimension_count", 32),
        "dimension_count is 32, but head_dim 64",
    ),
    "another vocabulary": (put("llama.vocab_size", 511), "llama.vocab_size is 511, but vocab_size 512"),
    "wider": (
        put("llama.embedding_length", 512),
        "token_embd.weight has shape [512, 256], but [512, 512] is due",
    ),
    "norms in f16": (
        tensor("output_norm.weight", np.ones(256, np.float16), F16),
        "tensor output_norm.weight has type f16, in which no Fox is stored",
    ),
    "a type without products": (
        tensor("blk.0.attn_q.weight", np.zeros((256, 292), np.uint8), Q8_K),
        "tensor blk.0.attn_q.weight has type q8_k, in which no Fox is stored",
    ),
    "a bias": (
        tensor("blk.0.attn_q.bias", np.ones(256, np.float32), F32),
        "tensor blk.0.attn_q.bias is none",
    ),
    "no up": (lambda parts: parts["tensors"].pop("blk.1.ffn_up.weight"), "has no tensor blk.1.ffn_up.weight"),
    "another tokenizer": (put("tokenizer.ggml.model", "gpt2"), "tokenizer.ggml.model is 'gpt2', not 'llama'"),
    "fewer pieces": (shorter("tokens"), "llama.vocab_size is 512, but vocab_size 511"),
    "fewer scores": (
        shorter("scores"),
        "tokenizer.ggml.scores holds 511 of float32, but 512 of float32 are due",
    ),
    "fewer kinds": (shorter("token_type"), "tokenizer.ggml.token_type holds 511 of int32"),
    "a score that is none": (
        entry("scores", 40, float("nan")),
        "a score of the vocabulary is no finite number",
    ),
    "an unknown kind": (entry("token_type", 40, 9), "kinds of tokens from 1 to 9, but 1 to 6 are known"),
    "an empty piece": (entry("tokens", 400, ""), "token 400 is empty"),
    "twins": (entry("tokens", 400, "<eos>"), "tokens 1 and 400 have the same text"),
    "twins as C strings": (entry("tokens", 400, "<eos>\0"), "tokens 1 and 400 have the same text"),
    "a byte that is none": (entry("token_type", 400, 6), "token 400 stands for a byte, but reads b'"),
    "no file type": (put("general.file_type", 1025), "general.file_type is 1025"),
    "bos outside": (
        put("tokenizer.ggml.bos_token_id", 512),
        "the bos token is 512, but the vocabulary has 512",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_one_sentence(name: str, artifact: Artifact, tmp_path: Path) -> None:
    change, sentence = CONTRADICTIONS[name]
    text = message(rewritten(artifact, tmp_path / "model.gguf", change))
    assert sentence in text


def test_rewriting_alone_changes_nothing(artifact: Artifact, tiny_256: Checkpoint, tmp_path: Path) -> None:
    path = rewritten(artifact, tmp_path / "model.gguf", lambda parts: None)
    found = read_config(path)
    assert found == read_config(artifact.model_path)
    rounded = float(np.float32(tiny_256.config.rms_norm_eps))
    assert found == dataclasses.replace(tiny_256.config, rms_norm_eps=rounded)


def test_a_missing_byte(artifact: Artifact, tmp_path: Path) -> None:
    def change(parts: dict[str, Any]) -> None:
        at = parts["keys"]["tokenizer.ggml.tokens"][0].index("<0x7F>")
        entry("tokens", at, "odd piece")(parts)
        entry("token_type", at, 1)(parts)

    text = message(rewritten(artifact, tmp_path / "model.gguf", change))
    assert "the vocabulary has no piece for byte 127" in text


def test_a_piece_that_is_no_utf_8(artifact: Artifact, tmp_path: Path) -> None:
    data = bytearray(artifact.model_path.read_bytes())
    at = data.index(struct.pack("<Q", 15) + b"<start_of_turn>") + 8
    data[at + 3] = 0xFF
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert "is not UTF-8" in message(path)


def test_more_layers_than_llama_cpp_has(tiny: Checkpoint, tmp_path: Path) -> None:
    """It would abort; a header says it without weights."""
    config = dataclasses.replace(tiny.config, num_layers=600)
    path = tmp_path / "model.gguf"
    many = Checkpoint.open(tiny.path)
    many.config = config
    write_header(path, many, find_recipe(GGUF, "f32"), [])
    assert "600 layers, but llama.cpp has at most 512" in message(path)


def test_the_manifest_and_the_file_disagree_on_a_shape(artifact: Artifact) -> None:
    first = artifact.manifest.tensors[0]
    tensors = (dataclasses.replace(first, shape=first.shape[::-1]), *artifact.manifest.tensors[1:])
    other = Artifact(artifact.path, dataclasses.replace(artifact.manifest, tensors=tensors))
    with pytest.raises(
        ArtifactError, match=r"token_embd\.weight has shape \[512, 256\], but the manifest says"
    ):
        GgufFile(other)


@pytest.mark.parametrize("use", [Vocabulary, read_header])
def test_what_passes_opens(use: Callable[[Path], Any], artifact: Artifact) -> None:
    use(artifact.model_path)


@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 2},
        {"head_dim": 6, "num_kv_heads": 4},
        {"head_dim": 10, "num_heads": 7, "num_kv_heads": 7},
        {"hidden_size": 3, "intermediate_size": 5},
        {"num_layers": 1, "max_positions": 7},
        {"head_dim": 514, "num_heads": 1},
    ],
    ids=str,
)
def test_odd_shapes_run(shape: dict[str, int], tmp_path: Path) -> None:
    """Shapes that the checks let through must not end llama.cpp either."""
    plain = FoxConfig(512, 64, 96, 2, 4, 1, 16, 256)
    folder = make_checkpoint(tmp_path / "checkpoint", dataclasses.replace(plain, **shape))
    odd = export_gguf(Checkpoint.open(folder), tmp_path / "out", find_recipe(GGUF, "f32"))
    with LlamaCppSession(odd, SessionOptions(threads=1)) as session:
        assert np.isfinite(session.prefill([2, 5, 6, 7])).all()
