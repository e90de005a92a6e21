"""What a GGUF file says of its model, held against itself: dimensions, tensors, vocabulary.

llama.cpp ends the whole process, or leaves its memory, over some contradictions; here each is one sentence,
before llama.cpp sees the file. Only keys that are known are let through: any other could make llama.cpp
read the same weights as another model. Knows the llama architecture's metadata; not the container
(fox_edge/gguf_format.py), nor how anything is computed.
"""

from __future__ import annotations

import math
import mmap
import re
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError, CheckpointError
from fox_edge.gguf_format import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    TYPE_WORDS,
    UINT32,
    ArrayInfo,
    Header,
    array_numbers,
    array_texts,
    open_mapped,
    parse_header,
    stored_name,
)
from fox_edge.quant import GGUF, TYPES

# llama.cpp's own limit, beyond which it aborts.
MAX_LAYERS = 512
# Its enum's highest value: "guessed".
MAX_FILE_TYPE = 1024

# FoxConfig's field -> its key among the metadata.
_SHAPE_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_positions": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_REAL_KEYS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
# Written beside them; each must repeat what the others say.
_REPEATED_KEYS = {
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
_TOKEN = "tokenizer.ggml."
_TOKEN_IDS = ("bos", "eos", "eot", "unknown", "padding")
_TOKENS, _SCORES, _KINDS = _TOKEN + "tokens", _TOKEN + "scores", _TOKEN + "token_type"
# key -> GGUF type, of every key under llama. and tokenizer. that a Fox has.
_KNOWN: dict[str, int] = {
    **{f"llama.{key}": FLOAT32 if key in _REAL_KEYS else UINT32 for key in _SHAPE_KEYS.values()},
    **{f"llama.{key}": UINT32 for key in _REPEATED_KEYS},
    **{f"{_TOKEN}{role}_token_id": UINT32 for role in _TOKEN_IDS},
    **{
        f"{_TOKEN}{key}": BOOL
        for key in ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix")
    },
    **{f"{_TOKEN}{key}": STRING for key in ("model", "pre")},
    **dict.fromkeys((_TOKENS, _SCORES, _KINDS), ARRAY),
    "tokenizer.chat_template": STRING,
    "general.architecture": STRING,
    "general.name": STRING,
    "general.alignment": UINT32,
    "general.file_type": UINT32,
    "general.quantization_version": UINT32,
}
# What says where a model comes from, how it was made and how to sample: llama.cpp computes nothing from it.
_FREE_KEYS = re.compile(r"(general\.(?!tensor_extra)|quantize\.|fox_edge\.)[A-Za-z0-9_.]+")
_ELEMENTS = {_TOKENS: STRING, _SCORES: FLOAT32, _KINDS: INT32}
_NORMAL, _BYTE = 1, 6
_BYTE_PIECE = re.compile(rb"<0x[0-9A-F]{2}>")


def read_config(path: Path) -> FoxConfig:
    """The model's dimensions, after every check of this file.

    Raises ArtifactError naming the file and the number.
    """
    with open_mapped(path) as data:
        return check_model(path, parse_header(path, data), data)


def check_model(path: Path, header: Header, data: mmap.mmap) -> FoxConfig:
    """`read_config` of a mapped file whose header was read."""
    metadata = header.metadata
    if metadata.get("general.architecture") != "llama":
        raise ArtifactError(f"{path}: architecture {metadata.get('general.architecture')!r}, not llama")
    _check_keys(path, header)
    config = _config(path, header)
    _check_tensors(path, header, config)
    _check_vocabulary(path, metadata, config, data)
    return config


def _check_keys(path: Path, header: Header) -> None:
    """Every key is known, and its value of the type that llama.cpp reads."""
    for key, kind in header.kinds.items():
        due = _KNOWN.get(key)
        if due is None and not _FREE_KEYS.fullmatch(key):
            raise ArtifactError(f"{path}: the key '{key}' is none of a Fox's")
        if due is not None and kind != due:
            raise ArtifactError(
                f"{path}: the value of {key} has type {TYPE_WORDS.get(kind, kind)}, "
                f"but {TYPE_WORDS[due]} is due"
            )
    if header.metadata.get("general.file_type", 0) > MAX_FILE_TYPE:
        raise ArtifactError(f"{path}: general.file_type is {header.metadata['general.file_type']}")


def _config(path: Path, header: Header) -> FoxConfig:
    metadata = header.metadata
    fields = {field: metadata.get(f"llama.{key}") for field, key in _SHAPE_KEYS.items()}
    missing = [f"llama.{key}" for field, key in _SHAPE_KEYS.items() if fields[field] is None]
    if missing or _TOKENS not in metadata:
        raise ArtifactError(f"{path}: has no {missing[0] if missing else _TOKENS}")
    try:
        config = FoxConfig(
            vocab_size=metadata[_TOKENS].length,
            tied="output.weight" not in header.tensors,
            **fields,  # type: ignore[arg-type]
        )
    except CheckpointError as error:
        raise ArtifactError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    if not math.isfinite(config.rms_norm_eps) or not math.isfinite(config.rope_theta):
        raise ArtifactError(
            f"{path}: rms_norm_eps {config.rms_norm_eps}, rope_theta {config.rope_theta}: not finite"
        )
    for key, field in _REPEATED_KEYS.items():
        said, due = metadata.get(f"llama.{key}"), getattr(config, field)
        if said is not None and said != due:
            raise ArtifactError(f"{path}: llama.{key} is {said}, but {field} {due}")
    if config.num_layers > MAX_LAYERS:
        raise ArtifactError(f"{path}: {config.num_layers} layers, but llama.cpp has at most {MAX_LAYERS}")
    return config


def _check_tensors(path: Path, header: Header, config: FoxConfig) -> None:
    """The tensors are the model's, each of its shape and of a type that the runtime multiplies with."""
    layers = sum(name.endswith(".attn_norm.weight") for name in header.tensors)
    if layers != config.num_layers:
        raise ArtifactError(f"{path}: {config.num_layers} layers, but the weights of {layers}")
    due = {stored_name(name): shape for name, shape in config.tensor_shapes().items()}
    for name, info in header.tensors.items():
        if name not in due:
            raise ArtifactError(f"{path}: tensor {name} is none of a Fox's")
        if info.shape != due[name]:
            raise ArtifactError(
                f"{path}: tensor {name} has shape {list(info.shape)}, but {list(due[name])} is due"
            )
        # llama.cpp adds and multiplies vectors in float32 only, and aborts at any other type.
        if (GGUF, info.type) not in TYPES or (len(info.shape) == 1 and info.type != "f32"):
            raise ArtifactError(f"{path}: tensor {name} has type {info.type}, in which no Fox is stored")
    missing = next((name for name in due if name not in header.tensors), None)
    if missing is not None:
        raise ArtifactError(f"{path}: has no tensor {missing}")


def _check_vocabulary(path: Path, metadata: Mapping[str, Any], config: FoxConfig, data: mmap.mmap) -> None:
    """One distinct text, finite score and known kind per row of the embedding, and every byte's piece."""
    model = metadata.get(_TOKEN + "model")
    if model != "llama":
        raise ArtifactError(f"{path}: tokenizer.ggml.model is {model!r}, not 'llama'")
    for key, element in _ELEMENTS.items():
        info = metadata.get(key)
        if not isinstance(info, ArrayInfo):
            raise ArtifactError(f"{path}: has no {key}")
        if info.type != element or info.length != config.vocab_size:
            raise ArtifactError(
                f"{path}: {key} holds {info.length} of {TYPE_WORDS.get(info.type, info.type)}, "
                f"but {config.vocab_size} of {TYPE_WORDS[element]} are due"
            )
    if not np.isfinite(array_numbers(data, metadata[_SCORES])).all():
        raise ArtifactError(f"{path}: a score of the vocabulary is no finite number")
    kinds = array_numbers(data, metadata[_KINDS])
    if kinds.min() < _NORMAL or kinds.max() > _BYTE:
        raise ArtifactError(
            f"{path}: kinds of tokens from {kinds.min()} to {kinds.max()}, but {_NORMAL} to {_BYTE} are known"
        )
    _check_pieces(path, array_texts(data, metadata[_TOKENS]), kinds.tolist())
    for role in _TOKEN_IDS:
        token = metadata.get(f"{_TOKEN}{role}_token_id")
        if token is not None and token >= config.vocab_size:
            raise ArtifactError(
                f"{path}: the {role} token is {token}, but the vocabulary has {config.vocab_size}"
            )


def _check_pieces(path: Path, pieces: Iterable[bytes], kinds: list[int]) -> None:
    hashes, short = array("q"), set()  # not the texts themselves: Fox's would take 40 MB
    for token, piece in enumerate(pieces):
        text = piece.split(b"\0", 1)[0]  # as a C string ends
        if not text:
            raise ArtifactError(f"{path}: token {token} is empty")
        if kinds[token] == _BYTE and not _BYTE_PIECE.fullmatch(text):
            raise ArtifactError(f"{path}: token {token} stands for a byte, but reads {text[:20]!r}")
        if not piece.isascii():
            _check_utf_8(path, token, piece)
        if len(text) in (1, 6):  # all that stand for bytes, and some more
            short.add(text)
        hashes.append(hash(text))
    _, first = np.unique(np.frombuffer(hashes, np.int64), return_index=True)
    if len(first) != len(hashes):
        twin = int(np.setdiff1d(np.arange(len(hashes)), first)[0])
        before = hashes.index(hashes[twin])
        raise ArtifactError(f"{path}: tokens {before} and {twin} have the same text")
    # What no other piece covers is cut into bytes: llama.cpp aborts at one without a piece.
    for byte in range(256):
        if b"<0x%02X>" % byte not in short and bytes([byte]) not in short:
            raise ArtifactError(f"{path}: the vocabulary has no piece for byte {byte}")


def _check_utf_8(path: Path, token: int, piece: bytes) -> None:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(f"{path}: token {token} is not UTF-8") from None
