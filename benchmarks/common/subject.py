"""What can be measured or questioned: an artifact, another tool's ONNX folder, or a checkpoint in PyTorch.

Turns a user's word ('out/int4', 'torch:nano') into something with a name, a size and a session. Knows
where weights are read at every token; not how anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fox_edge.artifact import Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import EMBEDDING, ONNX
from runtimes.base import (
    FOREIGN_ONNX,
    TORCH_PREFIX,
    TORCH_RUNTIME,
    Runtime,
    Session,
    SessionOptions,
    is_artifact,
    is_foreign,
    load,
    open_in,
    runtime_of_format,
    split_prefix,
)
from runtimes.kv_types import KV_TYPES, TORCH, artifact_kv, kv_bytes_per_position

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

_BF16_BYTES = 2


@dataclass(frozen=True)
class Subject:
    """One thing to measure. `bytes`: on disk, all files; `weight_bytes`: what its weights take in memory.

    `unread_bytes` of the weights are not read at every token: all rows but one of an embedding that is no
    head. `config`, and with it `parameters`, is None where no configuration tells.
    """

    spec: str  # as the user named it
    target: str  # the same without the word that chooses a runtime
    runtime: str
    format: str
    quant: str
    bytes: int
    weight_bytes: int
    unread_bytes: int
    kv_bytes_per_position: int
    context: int  # the most positions that it has
    config: FoxConfig | None
    folder: Path  # where the tokenizer is
    opened_by: Runtime
    source: Any = field(repr=False, compare=False)

    @property
    def parameters(self) -> int | None:
        """Weights of the model; a tied matrix counts once."""
        return None if self.config is None else self.config.num_parameters()

    @property
    def bits_per_weight(self) -> float | None:
        """Storage per parameter, over the whole model."""
        return None if self.parameters is None else 8 * self.weight_bytes / self.parameters

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it carries."""
        from fox_edge.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.folder)

    def bytes_per_token(self, positions: int, together: int = 1) -> int:
        """Bytes that decoding one token must read, with `positions` tokens in the KV cache.

        Every weight once for all users whose tokens come of one pass, `together`. A tied matrix is read
        whole, as the head; an untied embedding only gives one row.
        """
        read = self.weight_bytes - self.unread_bytes
        return -(-read // together) + self.kv_bytes_per_position * positions

    @property
    def session_class(self) -> str:
        """ "module:class", made from (source, SessionOptions)."""
        return self.opened_by.session

    def prepare(self) -> None:
        """Import its runtime, so that opening a session is not charged for that.

        Raises MissingPackageError naming the extra.
        """
        load(self.session_class)

    def open_session(self, options: SessionOptions) -> Session:
        """Open it in its runtime."""
        return open_in(self.opened_by, self.source, options)


def open_subject(spec: str | Path, kv: str | None = None) -> Subject:
    """Find out what a user's word means; reads no weights. `kv`: what its KV cache shall store.

    Raises FoxEdgeError, CheckpointError or ArtifactError for something that is not there.
    """
    spec = str(spec)
    runtime, target = split_prefix(spec)
    path = Path(target)
    if runtime is None and not path.exists():
        raise FoxEdgeError(
            f"{spec}: no such artifact (a checkpoint's BF16 model is named {TORCH_PREFIX}CHECKPOINT)"
        )
    if runtime is None and is_foreign(path):
        runtime = FOREIGN_ONNX
    opens = "artifact" if runtime is None else runtime.opens
    if opens == "model":
        opens = "artifact" if is_artifact(path) else "checkpoint"
    return _READERS[opens](spec, target, runtime, kv)


def _artifact(spec: str, target: str, runtime: Runtime | None, kv: str | None) -> Subject:
    """A folder with a manifest, in the runtime asked for, else in that of its format."""
    path = Path(target)
    artifact = Artifact.open(path)
    manifest, config = artifact.manifest, FoxConfig.read(path / "config.json")
    runtime = runtime or runtime_of_format(manifest.format)
    stores = runtime.kv or manifest.format
    if kv not in KV_TYPES[stores]:
        kv = None  # its session will refuse it
    if stores == manifest.format:
        kv = kv or artifact_kv(manifest)
    embedding = sum(t.bytes for t in manifest.tensors if t.name == EMBEDDING)
    weights, embedding = _held(runtime, artifact, (manifest.weight_bytes, embedding))
    return Subject(
        spec=spec,
        target=target,
        runtime=runtime.name,
        format=manifest.format,
        quant=manifest.quant,
        bytes=artifact.total_bytes(),
        weight_bytes=weights,
        unread_bytes=_unread(config, embedding),
        kv_bytes_per_position=kv_bytes_per_position(config, stores, kv),
        context=manifest.positions,
        config=config,
        folder=path,
        opened_by=runtime,
        source=artifact,
    )


def _foreign(spec: str, target: str, runtime: Runtime | None, kv: str | None) -> Subject:
    """Another tool's ONNX model; its cache stores what its graph says."""
    from runtimes.onnx.foreign import ForeignOnnx

    foreign = ForeignOnnx.open(Path(target))
    runtime = runtime or FOREIGN_ONNX
    return Subject(
        spec=spec,
        target=target,
        runtime=runtime.name,
        format=ONNX,
        quant=foreign.quant,
        bytes=foreign.total_bytes(),
        weight_bytes=foreign.weight_bytes,
        unread_bytes=foreign.unread_bytes,
        kv_bytes_per_position=foreign.interface.kv_bytes_per_position,
        context=foreign.context,
        config=foreign.config,
        folder=foreign.folder,
        opened_by=runtime,
        source=foreign,
    )


def _checkpoint(spec: str, target: str, runtime: Runtime | None, kv: str | None) -> Subject:
    """A checkpoint, in bfloat16 or in what its runtime makes of it, and its cache in bfloat16."""
    from fox_edge.checkpoint import Checkpoint

    runtime, checkpoint = runtime or TORCH_RUNTIME, Checkpoint.open(target)
    config = checkpoint.config
    stored = sum(checkpoint.tensor(name).nbytes for name in checkpoint.shapes())
    beside = [checkpoint.path / "config.json", *checkpoint.tokenizer_files()]
    plain = (_BF16_BYTES * config.num_parameters(), _BF16_BYTES * config.vocab_size * config.hidden_size)
    weights, embedding = _held(runtime, checkpoint, plain)
    return Subject(
        spec=spec,
        target=target,
        runtime=runtime.name,
        format=TORCH,
        quant=runtime.quant,
        bytes=stored + sum(path.stat().st_size for path in beside),
        weight_bytes=weights,
        unread_bytes=_unread(config, embedding),
        kv_bytes_per_position=kv_bytes_per_position(config, TORCH),
        context=config.max_positions,
        config=config,
        folder=checkpoint.path,
        opened_by=runtime,
        source=checkpoint,
    )


def _held(runtime: Runtime, source: Any, stored: tuple[int, int]) -> tuple[int, int]:
    """Bytes in memory of all weights and of the embedding: as stored, unless the runtime converts them."""
    if not runtime.converts:
        return stored
    weights, embedding = load(runtime.session).held_bytes(source)
    return int(weights), int(embedding)


# What a runtime opens -> how it is described: (as the user named it, without the prefix, runtime, KV type).
_READERS: dict[str, Callable[[str, str, Runtime | None, str | None], Subject]] = {
    "artifact": _artifact,
    "foreign": _foreign,
    "checkpoint": _checkpoint,
}


def _unread(config: FoxConfig, embedding_bytes: int) -> int:
    """Bytes of an embedding that a token does not touch, unless it is the head too."""
    return 0 if config.tied else embedding_bytes - embedding_bytes // config.vocab_size
