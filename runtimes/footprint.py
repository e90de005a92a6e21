"""What a process that opens a model will take, told by the runtime that would open it.

The runtime states what a session needs (its `need`); here come the interpreter with its libraries and the
tokenizer, and the sum. On a GPU the session's part alone is summed, against the GPU's memory. Nothing is
loaded but the runtime's own package. Knows runtimes by their names alone.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fox_edge.artifact import Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError
from fox_edge.inspection import megabytes
from runtimes.base import (
    FOREIGN_ONNX,
    RUNTIMES,
    TORCH_RUNTIME,
    Runtime,
    SessionOptions,
    is_artifact,
    is_foreign,
    load,
    open_model,
    split_prefix,
)
from runtimes.kv_types import TORCH, artifact_kv, default_kv
from runtimes.memory import MemoryNeed, available_bytes, resident_bytes

if TYPE_CHECKING:
    from fox_edge.checkpoint import Checkpoint
    from runtimes.onnx.foreign import ForeignOnnx

# A tokenizer's library and its tables per piece of the vocabulary, measured (benchmarks/memory.py).
TOKENIZER_BYTES, TOKENIZER_PIECE_BYTES = 3_500_000, 220


def footprint(target: str, options: SessionOptions) -> dict[str, Any]:
    """Bytes by what takes them, for an artifact's, an ONNX model's or a checkpoint's path, or 'nano'.

    A prefix (torch:, cuda:) chooses the runtime. `on_device`: the total is of a GPU's memory, tokenizer and
    process are beside it in this machine's; `room` says what is free there, or why there is no GPU.

    At `options.context` tokens (None: as many as the model has), all filled. `process_bytes` is what this
    process holds once the runtime is imported: call it before anything big is loaded. Raises
    ContextOverflowError for a context that the model does not have, FoxEdgeError for a choice that the
    runtime does not have, MissingPackageError.
    """
    asked, target = split_prefix(target)
    runtime = asked or runtime_of(Path(target))
    opened = load(runtime.session)
    importlib.import_module("fox_edge.tokenizer")
    process, available = resident_bytes(), available_bytes()
    model, about = _open(target, runtime)
    most = about.positions
    context = most if options.context is None else options.context
    if context > most:
        raise ContextOverflowError(
            f"{target}: a context of {context} was asked for, but it goes up to {most}"
        )
    need: MemoryNeed = opened.need(model, replace(options, context=context))
    tokenizer = TOKENIZER_BYTES + TOKENIZER_PIECE_BYTES * about.pieces
    room = opened.room(options) if hasattr(opened, "room") else None
    if room is not None:
        available = None if isinstance(room, str) else room.available
    beside = tokenizer if room is None else 0  # in the memory that is left for the session
    return {
        "context": context,
        "runtime": runtime.name,
        "kv": options.kv or about.kv,
        "weights_bytes": need.weights,
        "kv_bytes": need.cache(context),
        "buffers_bytes": need.scratch(context),
        "tokenizer_bytes": tokenizer,
        "process_bytes": process,
        "on_device": room is not None,
        "room": room if room is None or isinstance(room, str) else room.words,
        "total_bytes": need.total(context) + (0 if room is not None else tokenizer + process),
        "available_bytes": available,
        "largest_context": None if available is None else need.fitting(available - beside, most),
    }


def runtime_of(path: Path) -> Runtime:
    """Name and session class of the runtime that opens what a user's path names."""
    if is_artifact(path):
        return RUNTIMES[Artifact.open(path).manifest.format]
    return FOREIGN_ONNX if is_foreign(path) else TORCH_RUNTIME


class _About(NamedTuple):
    """What is asked of every kind of model; `pieces` of vocabulary are in its tokenizers' tables."""

    positions: int
    pieces: int
    kv: str


def _open(target: str, runtime: Runtime) -> tuple[Artifact | ForeignOnnx | Checkpoint, _About]:
    path, kv = Path(target), runtime.kv and default_kv(runtime.kv)
    ours = runtime.opens in ("artifact", "model") and is_artifact(path)
    if not ours and runtime.opens != "foreign":
        from fox_edge.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(target)
        config = checkpoint.config
        # Opening a checkpoint reads its tokenizer too, to hold it against the configuration.
        return checkpoint, _About(config.max_positions, 2 * config.vocab_size, default_kv(TORCH))
    model = open_model(path)
    if isinstance(model, Artifact):
        config = FoxConfig.read(path / "config.json")
        manifest = model.manifest
        return model, _About(manifest.positions, config.vocab_size, kv or artifact_kv(manifest))
    graph = model.interface
    return model, _About(model.context, graph.vocab_size, np.dtype(graph.kv_type).name)


def footprint_text(memory: dict[str, Any]) -> list[str]:
    """The footprint as lines for a person."""
    session = {
        "weights": "weights_bytes",
        f"KV cache ({memory['kv']})": "kv_bytes",
        "buffers": "buffers_bytes",
    }
    beside = {"tokenizer": "tokenizer_bytes", "process": "process_bytes"}
    parts = session if memory["on_device"] else session | beside
    where = "memory of the GPU" if memory["on_device"] else "memory"
    lines = [
        f"{where} at {memory['context']} tokens in {memory['runtime']}: {_terms(memory, parts)} = "
        f"{megabytes(memory['total_bytes'])}"
    ]
    if memory["on_device"]:
        lines.append(f"beside it, of this machine's: {_terms(memory, beside)}")
    if memory["available_bytes"] is not None:
        most = memory["largest_context"]
        fits = f"a context of up to {most} tokens fits" if most else "no context fits"
        room = memory["room"] or f"{megabytes(memory['available_bytes'])} are available here and now"
        lines.append(f"{room}: {fits}")
    elif memory["on_device"]:
        lines.append(f"it cannot be opened here: {memory['room']}")
    return lines


def _terms(memory: dict[str, Any], parts: dict[str, str]) -> str:
    return " + ".join(f"{name} {megabytes(memory[key])}" for name, key in parts.items())
