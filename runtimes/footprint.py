"""What a process that opens a model will take, told by the runtime that would open it.

The runtime states what a session needs (its `need`); here come the interpreter with its libraries and the
tokenizer, and the sum. Nothing is loaded but the runtime's own package. Knows runtimes by their names alone.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import ContextOverflowError
from fox_edge.inspection import megabytes
from runtimes.base import (
    FOREIGN_ONNX,
    RUNTIMES,
    TORCH_RUNTIME,
    Runtime,
    SessionOptions,
    is_foreign,
    load,
    open_model,
)
from runtimes.kv_types import TORCH, default_kv
from runtimes.memory import MemoryNeed, available_bytes, resident_bytes

if TYPE_CHECKING:
    from fox_edge.checkpoint import Checkpoint
    from runtimes.onnx.foreign import ForeignOnnx

# A tokenizer's library and its tables per piece of the vocabulary, measured (benchmarks/memory.py).
TOKENIZER_BYTES, TOKENIZER_PIECE_BYTES = 3_500_000, 220


def footprint(target: str, options: SessionOptions) -> dict[str, Any]:
    """Bytes by what takes them, for an artifact's, an ONNX model's or a checkpoint's path, or 'nano'.

    At `options.context` tokens (None: as many as the model has), all filled. `process_bytes` is what this
    process holds once the runtime is imported: call it before anything big is loaded. Raises
    ContextOverflowError for a context that the model does not have, FoxEdgeError for a choice that the
    runtime does not have, MissingPackageError.
    """
    runtime = runtime_of(Path(target))
    opened = load(runtime.session)
    importlib.import_module("fox_edge.tokenizer")
    process, available = resident_bytes(), available_bytes()
    model, about = _open(target)
    most = about.positions
    context = most if options.context is None else options.context
    if context > most:
        raise ContextOverflowError(
            f"{target}: a context of {context} was asked for, but the model has {most}"
        )
    need: MemoryNeed = opened.need(model, replace(options, context=context))
    tokenizer = TOKENIZER_BYTES + TOKENIZER_PIECE_BYTES * about.pieces
    return {
        "context": context,
        "runtime": runtime.name,
        "kv": options.kv or about.kv,
        "weights_bytes": need.weights,
        "kv_bytes": need.cache(context),
        "buffers_bytes": need.scratch(context),
        "tokenizer_bytes": tokenizer,
        "process_bytes": process,
        "total_bytes": need.total(context) + tokenizer + process,
        "available_bytes": available,
        "largest_context": None if available is None else need.fitting(available - tokenizer, most),
    }


def runtime_of(path: Path) -> Runtime:
    """Name and session class of the runtime that opens what a user's path names."""
    if (path / MANIFEST).is_file():
        return RUNTIMES[Artifact.open(path).manifest.format]
    return FOREIGN_ONNX if is_foreign(path) else TORCH_RUNTIME


class _About(NamedTuple):
    """What is asked of every kind of model; `pieces` of vocabulary are in its tokenizers' tables."""

    positions: int
    pieces: int
    kv: str


def _open(target: str) -> tuple[Artifact | ForeignOnnx | Checkpoint, _About]:
    path = Path(target)
    if not (path / MANIFEST).is_file() and not is_foreign(path):
        from fox_edge.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(target)
        config = checkpoint.config
        # Opening a checkpoint reads its tokenizer too, to hold it against the configuration.
        return checkpoint, _About(config.max_positions, 2 * config.vocab_size, default_kv(TORCH))
    model = open_model(path)
    if isinstance(model, Artifact):
        config = FoxConfig.read(path / "config.json")
        manifest = model.manifest
        return model, _About(manifest.context, config.vocab_size, default_kv(manifest.format))
    graph = model.interface
    return model, _About(model.context, graph.vocab_size, np.dtype(graph.kv_type).name)


def footprint_text(memory: dict[str, Any]) -> list[str]:
    """The footprint as lines for a person."""
    parts = (
        ("weights", "weights_bytes"),
        (f"KV cache ({memory['kv']})", "kv_bytes"),
        ("buffers", "buffers_bytes"),
        ("tokenizer", "tokenizer_bytes"),
        ("process", "process_bytes"),
    )
    terms = " + ".join(f"{name} {megabytes(memory[key])}" for name, key in parts)
    lines = [
        f"memory at {memory['context']} tokens in {memory['runtime']}: {terms} = "
        f"{megabytes(memory['total_bytes'])}"
    ]
    if memory["available_bytes"] is not None:
        most = memory["largest_context"]
        fits = f"a context of up to {most} tokens fits" if most else "no context fits"
        lines.append(f"{megabytes(memory['available_bytes'])} are available here and now: {fits}")
    return lines
