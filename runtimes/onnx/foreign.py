"""ONNX folders that other tools wrote, like Optimum or onnxruntime-genai's builder: what is in them.

They have no manifest. A description is made from the graph and from config.json or genai_config.json: how the
model is fed, what its weights take, whether embedding and head are one copy. Knows graphs and configuration
files; runs nothing (foreign_session.py does), and cannot know what only a manifest tells: digests, and
which constant is which tensor of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fox_edge.config import MAX_DIMENSION, MAX_LAYERS, FoxConfig, read_json_object
from fox_edge.errors import ArtifactError, CheckpointError, VerificationError
from fox_edge.quant import ONNX
from runtimes.onnx.external import External, onnx, read_graph
from runtimes.onnx.tie import GraphIndex, Reader, Tie, find_tie
from runtimes.side_files import CONFIG, GENAI_CONFIG

_KEEP = ("logits_to_keep", "num_logits_to_keep")
_KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", *_KEEP}
_FLOATS: dict[int, type[np.generic]] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
}
# Operators whose constants are tables computed from the configuration, not weights.
_TABLE_READERS = {"GroupQueryAttention", "RotaryEmbedding", "MultiHeadAttention"}
_SHARED_CACHE = "GroupQueryAttention"
# Operators that round all of their input by its one largest magnitude.
_JOINT_SCALES = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}


@dataclass(frozen=True)
class Weight:
    """A constant of the graph. `bytes` is 0 for a further name of bytes that were counted before.

    `is_matrix`: it belongs to a matrix that is multiplied with or looked up in, if only as its scales.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    is_matrix: bool


@dataclass(frozen=True)
class Interface:
    """How a graph wants to be fed.

    `cache`: names of past and present, one pair for the keys and one for the values of every layer. `shared`:
    the two may be one buffer as long as the context, updated in place; else present is a new, longer tensor.
    `last_only`: whatever comes in, only the last position's logits come out. `joint_scales`: activations are
    rounded with one scale for all tokens that are fed at once, so that the logits depend on their number.
    """

    inputs: frozenset[str]
    cache: tuple[tuple[str, str], ...]
    kv_heads: int
    head_dim: int
    kv_type: type[np.generic]
    logits_type: type[np.generic]
    vocab_size: int
    shared: bool
    last_only: bool
    joint_scales: bool
    keep: str | None
    keep_rank: int = 0

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes that one position takes in all of the cache."""
        return len(self.cache) * self.kv_heads * self.head_dim * np.dtype(self.kv_type).itemsize


@dataclass(frozen=True)
class ForeignOnnx:
    """An ONNX model that fox-edge did not write."""

    path: Path  # as the user named it
    model_path: Path
    folder: Path  # of the tokenizer and the configuration
    producer: str
    context: int
    interface: Interface
    weights: tuple[Weight, ...]
    tie: Tie | None = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> ForeignOnnx:
        """Describe the model file, or the only one of a folder; reads no weights.

        Raises ArtifactError naming the file and what is wrong with it.
        """
        model_path = _model_file(path)
        folder = _side_files(model_path)
        settings = _Settings.read(folder)
        model = read_graph(model_path)
        index = GraphIndex(model.graph)
        try:
            tie = find_tie(index, model_path.parent)
        except VerificationError:
            tie = None
        return cls(
            path=path,
            model_path=model_path,
            folder=folder,
            producer=f"{model.producer_name} {model.producer_version}".strip() or "an unnamed tool",
            context=settings.context,
            interface=_interface(index, model_path, settings),
            weights=tuple(_weights(index, model_path.parent)),
            tie=tie,
        )

    def inspect(self) -> dict[str, Any]:
        """The same keys as `fox_edge.inspection.inspect`; constants have the graph's own names."""
        tie = "no embedding or no head was found in the graph" if self.tie is None else self.tie.sentence()
        return {
            "target": str(self.path),
            "format": ONNX,
            "quant": self.quant,
            "parameters": self.parameters,
            "bytes": self.total_bytes(),
            "bits_per_weight": None if self.parameters is None else 8 * self.weight_bytes / self.parameters,
            "tied": self.tie is not None and self.tie.one_copy,
            "verified": None,
            "notes": [f"written by {self.producer}, without a manifest", tie],
            "tensors": [
                {"name": w.name, "shape": list(w.shape), "type": w.type, "bytes": w.bytes, "reason": None}
                for w in self.weights
            ],
        }

    @property
    def config(self) -> FoxConfig | None:
        """The model that config.json describes; None without one, or of another architecture."""
        try:
            return FoxConfig.read(self.folder / CONFIG)
        except CheckpointError:
            return None

    @property
    def parameters(self) -> int | None:
        """Weights of that model."""
        config = self.config
        return None if config is None else config.num_parameters()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each range of a file once."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def unread_bytes(self) -> int:
        """Bytes of the embedding that a token does not touch: all rows but one, unless it is the head too."""
        if self.tie is None or self.tie.one_copy:
            return 0
        return self.tie.embedding_bytes - self.tie.embedding_bytes // self.interface.vocab_size

    @property
    def quant(self) -> str:
        """The types of the matrices, those of most bytes first; what holds less than 1 % is left out."""
        sizes: dict[str, int] = {}
        for weight in self.weights:
            if weight.is_matrix:
                sizes[weight.type] = sizes.get(weight.type, 0) + weight.bytes
        least = sum(sizes.values()) / 100
        kinds = sorted((kind for kind in sizes if sizes[kind] >= least), key=lambda kind: -sizes[kind])
        return "+".join(kinds) or "?"

    def total_bytes(self) -> int:
        """Bytes of the model's files and of those beside them, without other models' graphs."""
        files = {
            p for folder in (self.folder, self.model_path.parent) for p in folder.iterdir() if p.is_file()
        }
        return sum(p.stat().st_size for p in files if p.suffix != ".onnx" or p == self.model_path)


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found)
        raise ArtifactError(f"{path}: holds {len(found)} ONNX models ({names}); name the file that is meant")
    return found[0]


def _side_files(model_path: Path) -> Path:
    """The model's own folder; the one above where models lie in a folder `onnx` of a repository."""
    folder = model_path.parent
    if folder.name == "onnx" and not (folder / CONFIG).exists() and (folder.parent / CONFIG).is_file():
        return folder.parent
    return folder


@dataclass(frozen=True)
class _Settings:
    """What graphs leave open, from the configuration files."""

    context: int
    head_dim: int
    kv_heads: int

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        try:
            if (folder / CONFIG).is_file():
                return cls._of(folder / CONFIG, read_json_object(folder / CONFIG), "max_position_embeddings")
            fields = read_json_object(folder / GENAI_CONFIG).get("model")
        except CheckpointError as error:
            if not (folder / CONFIG).is_file() and not (folder / GENAI_CONFIG).is_file():
                raise ArtifactError(f"{folder}: has no {CONFIG} and no {GENAI_CONFIG}") from None
            raise ArtifactError(str(error)) from None
        if not isinstance(fields, dict) or not isinstance(fields.get("decoder"), dict):
            raise ArtifactError(f"{folder / GENAI_CONFIG}: describes no decoder")
        return cls._of(folder / GENAI_CONFIG, {**fields, **fields["decoder"]}, "context_length")

    @classmethod
    def _of(cls, where: Path, fields: dict[str, Any], context: str) -> _Settings:
        heads = fields.get("num_attention_heads")
        width = fields.get("head_dim", fields.get("head_size"))
        if width is None and isinstance(heads, int) and heads > 0:
            width = _whole(where, fields, "hidden_size") // heads
        fields = {**fields, "head_dim": width}
        if fields.get("num_key_value_heads") is None:
            fields["num_key_value_heads"] = heads
        return cls(*(_whole(where, fields, name) for name in (context, "head_dim", "num_key_value_heads")))


def _whole(where: Path, fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_DIMENSION:
        raise ArtifactError(
            f"{where}: {name} is {value!r}, but must be a whole number from 1 to {MAX_DIMENSION}"
        )
    return value


# --- how the graph is fed --------------------------------------------------------------------------------


def _interface(index: GraphIndex, where: Path, settings: _Settings) -> Interface:
    """Read the graph's inputs and outputs; raises ArtifactError for one that is no text decoder's."""
    graph = index.graph
    inputs = {v.name: v for v in graph.input if v.name not in index.initializers or v.name in _KEEP}
    outputs = {v.name: v for v in graph.output}
    cache = _cache(inputs, outputs, where)
    past = [name for name, _ in cache]
    dims, rows = _dims(inputs[past[0]], 4, where), _dims(outputs["logits"], 3, where)
    sizes = {
        "kv_heads": dims[1] or settings.kv_heads,
        "head_dim": dims[3] or settings.head_dim,
        "vocab_size": rows[2] or _rows_of_embedding(index),
    }
    for name in sizes:
        _whole(where, sizes, name)
    for name in _KNOWN_INPUTS & set(inputs):
        _element_type(inputs[name], {onnx.TensorProto.INT64: np.int64}, where)
    keep = next((name for name in _KEEP if name in inputs), None)
    return Interface(
        inputs=frozenset(inputs),
        cache=cache,
        kv_type=_element_type(inputs[past[0]], _FLOATS, where),
        logits_type=_element_type(outputs["logits"], _FLOATS, where),
        shared={n.op_type for n in graph.node if not set(past).isdisjoint(n.input)} == {_SHARED_CACHE},
        last_only=rows[1] == 1,
        joint_scales=any(node.op_type in _JOINT_SCALES for node in graph.node),
        keep=keep,
        keep_rank=len(inputs[keep].type.tensor_type.shape.dim) if keep else 0,
        **sizes,
    )


def _cache(inputs: dict[str, Any], outputs: dict[str, Any], where: Path) -> tuple[tuple[str, str], ...]:
    """Names of past and present; every other input must be one that we know how to fill."""
    past = [name for name in inputs if name.startswith("past_key_values.")]
    unknown = sorted(set(inputs) - _KNOWN_INPUTS - set(past))
    if unknown or "input_ids" not in inputs or "logits" not in outputs:
        raise ArtifactError(
            f"{where}: is no text decoder as Optimum and onnxruntime-genai write them: "
            + (f"it has the input '{unknown[0]}'" if unknown else "input_ids or logits are missing")
        )
    if len(past) > 2 * MAX_LAYERS:
        raise ArtifactError(f"{where}: {len(past) // 2} layers, but at most {MAX_LAYERS} are read")
    cache = tuple((name, "present" + name.removeprefix("past_key_values")) for name in past)
    missing = [present for _, present in cache if present not in outputs]
    if not cache or missing:
        raise ArtifactError(
            f"{where}: keeps no keys and values from one token to the next "
            + (f"(no output '{missing[0]}')" if missing else "(Optimum: --task text-generation-with-past)")
        )
    return cache


def _dims(value: onnx.ValueInfoProto, rank: int, where: Path) -> list[int]:
    """The dimensions of an input or output; 0 for one that is only a name."""
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if len(dims) != rank:
        raise ArtifactError(f"{where}: '{value.name}' has {len(dims)} dimensions, but {rank} are due")
    return dims


def _element_type(
    value: onnx.ValueInfoProto, known: dict[int, type[np.generic]], where: Path
) -> type[np.generic]:
    kind = value.type.tensor_type.elem_type
    if kind not in known:
        names = " or ".join(np.dtype(element).name for element in known.values())
        raise ArtifactError(f"{where}: '{value.name}' has element type {kind}, but {names} is due")
    return known[kind]


def _rows_of_embedding(index: GraphIndex) -> int:
    """The vocabulary's size where the logits do not declare it: the embedding's rows."""
    embedding = index.embedding()
    return int(embedding.tensors[0].dims[0]) if embedding else 0


# --- what the weights take --------------------------------------------------------------------------------


def _weights(index: GraphIndex, folder: Path) -> Iterator[Weight]:
    """Every constant that is read, with its type; small ones, and tables for rotation, are left out."""
    tables = {i for node in index.graph.node if node.op_type in _TABLE_READERS for i in node.input}
    read = {name for node in index.graph.node for name in node.input} - tables
    kinds = _matrix_types(index)
    counted: set[External] = set()
    for tensor in index.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL or tensor.name not in read:
            continue
        at = External.of(tensor, folder)
        size = 0 if at in counted else at.length
        counted.add(at)
        kind = kinds.get(tensor.name, _element(tensor))
        yield Weight(tensor.name, tuple(tensor.dims), kind, size, tensor.name in kinds)


def _matrix_types(index: GraphIndex) -> dict[str, str]:
    """The type of each constant of each matrix: its scales and zero points count to the matrix."""
    readers = [reader for node in index.graph.node if (reader := index.product(node))]
    embedding = index.embedding()
    found: dict[str, str] = {}
    for reader in [embedding, *readers] if embedding else readers:
        kind = _type_name(reader)
        found |= {tensor.name: kind for tensor in reader.tensors}
    return found


def _type_name(reader: Reader) -> str:
    """As our own table of types calls it where the operator is the one that the table is about."""
    numbers = {a.name: a.i for a in reader.node.attribute}
    if reader.node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
        return _element(reader.tensors[0])
    points = "a" if len(reader.tensors) > 2 else "s"
    return f"q{numbers.get('bits', 4)}{points}{numbers.get('block_size', 128)}"


def _element(tensor: onnx.TensorProto) -> str:
    name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
