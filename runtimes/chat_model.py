"""What a user's word names for a chat: an artifact, another tool's ONNX model, or a checkpoint in PyTorch.

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
    Session,
    SessionOptions,
    load,
    open_model,
    open_session,
    runtime_name,
)
from runtimes.lookup import speculating
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
    folder: Path
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
    if spec.startswith(TORCH_PREFIX):
        return _checkpoint(spec.removeprefix(TORCH_PREFIX))
    if not Path(spec).exists():
        raise ArtifactError(
            f"{spec}: no such artifact (a checkpoint's own model, in PyTorch, is {TORCH_PREFIX}CHECKPOINT)"
        )
    model = open_model(Path(spec))
    if not isinstance(model, Artifact):
        return ChatModel(
            f"{model.path.name}, onnx {model.quant} by {model.producer}",
            FOREIGN_ONNX[0],
            model.folder,
            ("another tool's export, not verified (fox-edge verify)",),
            lambda options: open_session(model, options),
        )
    manifest = model.manifest
    verified = (manifest.verification or {}).get("passed")
    return ChatModel(
        f"{manifest.checkpoint}, {manifest.format} {manifest.quant}, {model.total_bytes() / 1e6:,.1f} MB",
        runtime_name(manifest.format),
        model.path,
        () if verified else ("this artifact was never verified",),
        lambda options: open_session(model, options),
    )


def _checkpoint(name: str) -> ChatModel:
    from fox_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(name)
    return ChatModel(
        f"{checkpoint.name}, BF16",
        "torch",
        checkpoint.path,
        tuple(checkpoint.notes),
        lambda options: speculating(load("runtimes.torch:TorchSession")(checkpoint, options), options),
    )
