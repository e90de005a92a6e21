"""What can be measured or questioned: an artifact in its runtime, or a checkpoint in PyTorch.

Turns a user's word ('out/int4', 'torch:nano') into something with a name, a size and a session. Knows
where weights are read at every token; not how anything is timed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fox_edge.artifact import Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.inspection import kv_bytes
from fox_edge.quant import EMBEDDING
from runtimes.base import RUNTIMES, Session, SessionOptions, load, open_session, runtime_name

if TYPE_CHECKING:
    from fox_edge.checkpoint import Checkpoint
    from fox_edge.tokenizer import Tokenizer

TORCH_PREFIX = "torch:"
_BF16_BYTES = 2


@dataclass(frozen=True)
class Subject:
    """One thing to measure. `bytes`: on disk, all files; `weight_bytes`: what its weights take in memory."""

    spec: str  # as the user named it
    runtime: str
    format: str
    quant: str
    bytes: int
    weight_bytes: int
    embedding_bytes: int
    config: FoxConfig
    folder: Path  # where config and tokenizer are
    checkpoint: Checkpoint | None = field(default=None, repr=False, compare=False)

    @property
    def bits_per_weight(self) -> float:
        """Storage per parameter, over the whole model."""
        return 8 * self.weight_bytes / self.config.num_parameters()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it carries."""
        from fox_edge.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.folder)

    def bytes_per_token(self, positions: int) -> int:
        """Bytes that decoding one token at batch 1 must read, with `positions` tokens in the KV cache.

        Every weight once. A tied matrix is read whole, as the head; an untied embedding only gives one row.
        """
        c = self.config
        unread = 0 if c.tied else self.embedding_bytes - self.embedding_bytes // c.vocab_size
        return self.weight_bytes - unread + kv_bytes(c, self.format, positions)

    def prepare(self) -> None:
        """Import its runtime, so that opening a session is not charged for that.

        Raises MissingPackageError naming the extra.
        """
        load("runtimes.torch:TorchSession" if self.format == "torch" else RUNTIMES[self.format][1])

    def open_session(self, options: SessionOptions) -> Session:
        """Open it in its runtime; a checkpoint opens in bfloat16 on the CPU."""
        if self.checkpoint is None:
            return open_session(Artifact.open(self.folder), options)
        from runtimes.torch import TorchSession

        return TorchSession(self.checkpoint, options)


def open_subject(spec: str | Path) -> Subject:
    """Find out what a user's word means; reads no weights.

    Raises FoxEdgeError, CheckpointError or ArtifactError for something that is not there.
    """
    spec = str(spec)
    if spec.startswith(TORCH_PREFIX):
        return _checkpoint(spec)
    path = Path(spec)
    if not path.exists():
        raise FoxEdgeError(
            f"{spec}: no such artifact (a checkpoint's BF16 model is named {TORCH_PREFIX}CHECKPOINT)"
        )
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    return Subject(
        spec=spec,
        runtime=runtime_name(manifest.format),
        format=manifest.format,
        quant=manifest.quant,
        bytes=artifact.total_bytes(),
        weight_bytes=manifest.weight_bytes,
        embedding_bytes=sum(t.bytes for t in manifest.tensors if t.name == EMBEDDING),
        config=FoxConfig.read(path / "config.json"),
        folder=path,
    )


def _checkpoint(spec: str) -> Subject:
    from fox_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(spec.removeprefix(TORCH_PREFIX))
    config = checkpoint.config
    stored = sum(checkpoint.tensor(name).nbytes for name in checkpoint.shapes())
    beside = [checkpoint.path / "config.json", *checkpoint.tokenizer_files()]
    return Subject(
        spec=spec,
        runtime="torch",
        format="torch",
        quant="bf16",
        bytes=stored + sum(path.stat().st_size for path in beside),
        weight_bytes=_BF16_BYTES * config.num_parameters(),
        embedding_bytes=_BF16_BYTES * config.vocab_size * config.hidden_size,
        config=config,
        folder=checkpoint.path,
        checkpoint=checkpoint,
    )
