"""What a user's word names for a chat: an artifact, another tool's ONNX model, or a checkpoint.

Finds its tokenizer, its own wishes for sampling, and how it is opened; knows no conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fox_edge.artifact import Artifact
from fox_edge.config import read_json_object
from fox_edge.errors import ArtifactError, CheckpointError, FoxEdgeError
from fox_edge.tokenizer import Tokenizer
from runtimes.base import (
    FOREIGN_ONNX,
    TORCH_PREFIX,
    Runtime,
    Session,
    SessionOptions,
    is_artifact,
    open_in,
    open_model,
    open_session,
    runtime_name,
    split_prefix,
)
from runtimes.sampling import GREEDY, Sampling

# generation_config.json's names for what we call otherwise, and all that is taken from there.
_THEIRS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class ChatModel:
    """A model that is there, not opened yet. `notes` are remarks for the user, one sentence each."""

    name: str  # what it is, in a few words
    runtime: str
    format: str
    quant: str
    folder: Path
    artifact: Artifact | None  # None for what is none of ours
    notes: tuple[str, ...]
    open: Callable[[SessionOptions], Session] = field(repr=False)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it carries."""
        return Tokenizer.from_folder(self.folder)

    def sampling(self) -> tuple[Sampling, str | None]:
        """How it wants to be sampled: greedy, unless its generation_config.json says do_sample.

        The second is a remark, where the file's wish cannot be fulfilled.
        """
        try:
            fields = read_json_object(self.folder / "generation_config.json")
        except CheckpointError:
            return GREEDY, None
        if fields.get("do_sample") is not True:
            return GREEDY, None
        wishes: dict[str, Any] = {"temperature": 1.0}
        wishes |= {ours: fields[theirs] for theirs, ours in _THEIRS.items() if fields.get(theirs) is not None}
        try:
            if not all(type(value) in (int, float) for value in wishes.values()):
                raise FoxEdgeError("its values are not all numbers")
            wishes = {name: float(value) for name, value in wishes.items()}
            wishes["top_k"] = int(wishes.get("top_k", 0))
            return Sampling(**wishes), None
        except (FoxEdgeError, OverflowError, ValueError) as error:
            return GREEDY, f"generation_config.json asks for sampling, but {error}: greedy"


def find_chat_model(spec: str) -> ChatModel:
    """Find out what the word names; reads no weights. Raises FoxEdgeError for something that is not there."""
    runtime, target = split_prefix(spec)
    if runtime is not None:
        if runtime.opens == "model" and is_artifact(Path(target)):
            return _artifact(Artifact.open(Path(target)), runtime)
        return _checkpoint(target, runtime)
    if not Path(spec).exists():
        raise ArtifactError(
            f"{spec}: no such artifact (a checkpoint's own model, in PyTorch, is {TORCH_PREFIX}CHECKPOINT)"
        )
    model = open_model(Path(spec))
    if not isinstance(model, Artifact):
        return ChatModel(
            f"{model.path.name}, onnx {model.quant} by {model.producer}",
            FOREIGN_ONNX.name,
            "onnx",
            model.quant,
            model.folder,
            None,
            ("another tool's export, not verified (fox-edge verify)",),
            lambda options: open_session(model, options),
        )
    return _artifact(model)


def _artifact(artifact: Artifact, runtime: Runtime | None = None) -> ChatModel:
    """An artifact, in the runtime asked for, else in that of its format."""
    manifest = artifact.manifest
    verified = (manifest.verification or {}).get("passed")
    return ChatModel(
        f"{manifest.checkpoint}, {manifest.format} {manifest.quant}, {artifact.total_bytes() / 1e6:,.1f} MB",
        runtime.name if runtime else runtime_name(manifest.format),
        manifest.format,
        manifest.quant,
        artifact.path,
        artifact,
        () if verified else ("this artifact was never verified",),
        lambda options: open_in(runtime, artifact, options) if runtime else open_session(artifact, options),
    )


def _checkpoint(name: str, runtime: Runtime) -> ChatModel:
    from fox_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(name)
    return ChatModel(
        f"{checkpoint.name}, {runtime.quant.upper()}",
        runtime.name,
        "checkpoint",
        runtime.quant,
        checkpoint.path,
        None,
        tuple(checkpoint.notes),
        lambda options: open_in(runtime, checkpoint, options),
    )
