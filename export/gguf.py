"""Checkpoint in, GGUF artifact out: one pass from safetensors to the final file, no intermediate model.

Every tensor's place in the file is known beforehand, so a few threads each take a chunk of rows, quantize
it with ggml's own C code and write it where it belongs; memory stays at a few chunks per thread. Knows the
order of the file and llama.cpp's row order for q and k; names and metadata are gguf_header's, blocks ggml's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from export.common import (
    Progress,
    Verify,
    copy_side_files,
    finish,
    make_manifest,
    needed_bytes,
    one_torch_thread,
    tensor_bytes,
    versions,
    write_at,
)
from export.ggml import library, quantize
from export.gguf_header import TensorPlace, pad, write_header
from export.modelfile import MODELFILE, modelfile
from fox_edge.artifact import Artifact, ArtifactWriter, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import CheckpointError, RecipeError
from fox_edge.gguf_format import stored_name
from fox_edge.processors import available_cores
from fox_edge.quant import GGUF, TYPES, Assignment, Recipe

# Float32 rows that one thread holds at once.
CHUNK_BYTES = 16 << 20
# More would not be faster than the disk, and each holds a chunk.
MAX_THREADS = 16
# How many chunks of a tensor are read before its pages go back to the system.
RELEASE_EVERY = 8
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of one tensor; `last` ones let go of the pages read so far."""

    place: TensorPlace
    start: int
    stop: int
    last: bool


def export_gguf(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    replace: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    verify: Verify | None = None,
) -> Artifact:
    """Write the artifact folder `target`: GGUF file, configuration, tokenizer, card, manifest.

    `threads` quantize side by side (default: one per core, at most MAX_THREADS); `progress` is told the
    bytes done and in all, of the checkpoint's weights. Raises FoxEdgeError's children in one sentence; then
    nothing is left behind.
    """
    if recipe.format != GGUF:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.format}, but this is an export to {GGUF}")
    library()  # a missing package is told before any work
    assignments = recipe.resolve(checkpoint.shapes())
    places = plan(checkpoint, assignments)
    with ArtifactWriter(target, replace) as writer, _background(checkpoint) as digest:
        writer.need(needed_bytes(checkpoint, assignments))
        copy_side_files(writer, checkpoint)
        path = writer.folder / model_file_name(checkpoint, recipe)
        (writer.folder / MODELFILE).write_text(modelfile(checkpoint, path.name), encoding="utf-8")
        start = write_header(path, checkpoint, recipe, places)
        write_tensors(path, start, checkpoint, places, threads or default_threads(), progress)
        manifest = make_manifest(
            checkpoint,
            recipe,
            model_file=path.name,
            tensors=[
                TensorRecord(p.name, p.stored_as, p.shape, p.type, p.bytes, assignments[p.name].reason)
                for p in places
            ],
            checkpoint_sha256=digest.result(),
            versions=versions("gguf", "llama-cpp-python", "torch"),
        )
        return finish(writer, checkpoint, manifest, verify)


def default_threads() -> int:
    """Cores that this process may use, at most MAX_THREADS."""
    return min(available_cores(), MAX_THREADS)


def model_file_name(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """'<checkpoint>-<quant>.gguf', in characters that a manifest allows."""
    name = f"{checkpoint.name.rstrip('/').rsplit('/', 1)[-1]}-{recipe.name}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") + ".gguf"


def plan(checkpoint: Checkpoint, assignments: Mapping[str, Assignment]) -> list[TensorPlace]:
    """Where each tensor goes, in the checkpoint's order, each at GGUF's alignment."""
    places, offset = [], 0
    for name, shape in checkpoint.shapes().items():
        given = assignments[name]
        size = tensor_bytes(name, shape, given)
        places.append(TensorPlace(name, stored_name(name), shape, given.type.name, size, offset))
        offset = pad(offset + size)
    return places


def write_tensors(
    path: Path,
    start: int,
    checkpoint: Checkpoint,
    places: list[TensorPlace],
    threads: int,
    progress: Progress | None,
) -> None:
    """Quantize and write every tensor behind the header, chunks of rows side by side."""
    chunks = [chunk for place in places for chunk in cut(place, checkpoint.config)]
    sizes = [_stored_bytes(checkpoint, chunk) for chunk in chunks]
    done, total = 0, sum(sizes)
    handle = os.open(path, os.O_WRONLY)
    try:
        # Reserves nothing, but gives the padding behind the last tensor its zeros.
        os.ftruncate(handle, start + pad(places[-1].offset + places[-1].bytes))
        with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(_write_chunk, handle, start, checkpoint, chunk) for chunk in chunks]
            try:
                for future, size in zip(futures, sizes, strict=True):
                    future.result()
                    done += size
                    if progress is not None:
                        progress(done, total)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        os.close(handle)


def cut(place: TensorPlace, config: FoxConfig) -> Iterator[Chunk]:
    """Chunks of whole rows, and of whole heads for q and k; a vector is one row."""
    rows = place.shape[0] if len(place.shape) == 2 else 1
    unit = config.head_dim if is_rotated(place.name) else 1
    step = max(1, CHUNK_BYTES // (4 * place.shape[-1] * unit)) * unit
    for number, first in enumerate(range(0, rows, step)):
        stop = min(first + step, rows)
        yield Chunk(place, first, stop, stop == rows or number % RELEASE_EVERY == RELEASE_EVERY - 1)


def is_rotated(name: str) -> bool:
    """Whether llama.cpp applies rope to what this tensor produces."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def interleave_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads (n * head_dim, C), from Hugging Face's order to llama.cpp's.

    Hugging Face turns row i of a head together with row i + head_dim/2, llama.cpp rows 2i and 2i + 1.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return halves.transpose(1, 2).reshape(rows.shape)


def _write_chunk(handle: int, start: int, checkpoint: Checkpoint, chunk: Chunk) -> None:
    """Read, reorder, quantize and write one chunk; runs in a thread of the pool."""
    place, kind = chunk.place, TYPES[GGUF, chunk.place.type]
    rows = checkpoint.float_rows(place.name, chunk.start, chunk.stop).reshape(-1, place.shape[-1])
    if kind.name == "f16" and (largest := float(rows.abs().max())) > _FLOAT16_MAX:
        raise CheckpointError(f"{place.name}: a weight of {largest:g} does not fit f16; choose bf16 or f32")
    if is_rotated(place.name):
        rows = interleave_heads(rows, checkpoint.config.head_dim)
    blocks = quantize(kind, rows.numpy(), tensor=place.name)
    del rows
    if chunk.last:
        checkpoint.release(place.name)
    write_at(handle, blocks.reshape(-1).data, start + place.offset + chunk.start * blocks.shape[1])


def _stored_bytes(checkpoint: Checkpoint, chunk: Chunk) -> int:
    """Bytes that a chunk takes in the checkpoint."""
    return (chunk.stop - chunk.start) * chunk.place.shape[-1] * checkpoint.dtype(chunk.place.name).itemsize


@contextmanager
def _background(checkpoint: Checkpoint) -> Iterator[Future[str]]:
    """Hash the checkpoint while it is being quantized; hashlib lets go of the interpreter lock."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(checkpoint.digest)
