"""Checkpoint in, GGUF artifact out: one pass from safetensors to the final file, no intermediate model.

Every tensor's place in the file is known beforehand, so rows are rounded and written in whatever order the
rounding wants (rounding.py); memory stays at a few pieces of a matrix. Knows the order of the file and
llama.cpp's row order for q and k; names and metadata are gguf_header's, blocks ggml's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.common import (
    Progress,
    Verify,
    copy_side_files,
    finish,
    make_manifest,
    needed_bytes,
    tensor_bytes,
    versions,
    write_at,
)
from export.compensate import Compensation
from export.ggml import library, quantize
from export.ggml_grids import dequantize, quantize_compensated
from export.gguf_header import TensorPlace, pad, write_header
from export.guidance import guidance
from export.modelfile import MODELFILE, modelfile
from export.rounding import COMPENSATED_ROWS, Guide, write_weights
from fox_edge.artifact import Artifact, ArtifactWriter, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import CheckpointError, RecipeError
from fox_edge.gguf_format import stored_name
from fox_edge.processors import available_cores
from fox_edge.quant import GGUF, TYPES, Assignment, Recipe

# Weights per task: a few megabytes of float32 rows, long enough that starting it does not count.
TASK_WEIGHTS = 1 << 20
# More would not be faster than the disk, and each holds a task's rows.
MAX_THREADS = 16
_FLOAT16_MAX = 65504.0


def export_gguf(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    replace: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    verify: Verify | None = None,
    rounding: str | None = None,
    calibrate: Path | None = None,
    imatrix: Path | None = None,
) -> Artifact:
    """Write the artifact folder `target`: GGUF file, configuration, tokenizer, card, manifest.

    `rounding` is one of quant.ROUNDINGS (None: the recipe's, else the best that is worth it for its types);
    `calibrate` is a UTF-8 file with text like the model's users' (None: the built-in text), `imatrix` an
    importance matrix of the checkpoint, which takes the text's place. `threads` round side by side (default:
    one per core, at most MAX_THREADS); `progress(done, total)` counts the work. Raises FoxEdgeError's
    children in one sentence; then nothing is left behind.
    """
    if recipe.format != GGUF:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.format}, but this is an export to {GGUF}")
    library()  # a missing package is told before any work
    assignments = recipe.resolve(checkpoint.shapes())
    places = plan(checkpoint, assignments)
    guide = guidance(checkpoint, recipe, assignments, rounding=rounding, calibrate=calibrate, imatrix=imatrix)
    made_by = versions("gguf", "llama-cpp-python", "torch")
    with ArtifactWriter(target, replace) as writer, _background(checkpoint) as digest:
        writer.need(needed_bytes(checkpoint, assignments))
        copy_side_files(writer, checkpoint)
        path = writer.folder / model_file_name(checkpoint, recipe)
        (writer.folder / MODELFILE).write_text(modelfile(checkpoint, path.name), encoding="utf-8")
        write_weights(
            path,
            target,
            checkpoint,
            guide,
            {"types": {place.name: place.type for place in places}, "versions": made_by},
            prepare=lambda file: begin(file, checkpoint, recipe, places),
            target=lambda handle: GgufTarget(handle, checkpoint, places),
            threads=threads or default_threads(),
            progress=progress,
        )
        manifest = make_manifest(
            checkpoint,
            recipe,
            model_file=path.name,
            tensors=[
                TensorRecord(p.name, p.stored_as, p.shape, p.type, p.bytes, assignments[p.name].reason)
                for p in places
            ],
            checkpoint_sha256=digest.result(),
            versions=made_by,
            rounding=guide.to_json(),
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


def begin(path: Path, checkpoint: Checkpoint, recipe: Recipe, places: list[TensorPlace]) -> None:
    """Create the file: its header, and room for the weights, which are zeros until they are written."""
    start = write_header(path, checkpoint, recipe, places)
    os.truncate(path, start + _weight_bytes(places))


def _weight_bytes(places: list[TensorPlace]) -> int:
    """Bytes from the first weight to the end of the file."""
    return pad(places[-1].offset + places[-1].bytes)


class GgufTarget:
    """The file of an export, begun; see `rounding.Target`."""

    def __init__(self, handle: int, checkpoint: Checkpoint, places: list[TensorPlace]) -> None:
        self.handle, self.head_dim = handle, checkpoint.config.head_dim
        self.places = {place.name: place for place in places}
        self.start = os.fstat(handle).st_size - _weight_bytes(places)

    def is_rounded(self, name: str) -> bool:
        """Whether a tensor is stored as integers."""
        return TYPES[GGUF, self.places[name].type].bits > 0

    def task_rows(self, name: str, guide: Guide) -> int:
        """Rows of one task: whole heads of q and k."""
        rows = TASK_WEIGHTS // self.places[name].shape[-1]
        if isinstance(guide, Compensation):
            rows = max(rows, COMPENSATED_ROWS)
        unit = self.head_dim if is_rotated(name) else 1
        return max(1, rows // unit) * unit

    def column_scales(self, name: str) -> Tensor | None:
        """None: llama.cpp's graph has no place for them."""
        return None

    def put(self, name: str, start: int, rows: Tensor, guide: Guide, keep: Tensor | None) -> Tensor | None:
        """Round and write rows (n, C); returns those that are to be kept as they can be read back."""
        place = self.places[name]
        kind = TYPES[GGUF, place.type]
        rows = rows.reshape(-1, place.shape[-1])
        if kind.name == "f16" and (largest := float(rows.abs().max())) > _FLOAT16_MAX:
            raise CheckpointError(f"{name}: a weight of {largest:g} does not fit f16; choose bf16 or f32")
        if isinstance(guide, Compensation):
            blocks = quantize_compensated(kind, rows, guide, name)
        else:
            blocks = quantize(kind, rows.numpy(), None if guide is None else guide.numpy(), name)
        stored = (
            interleave_heads(torch.from_numpy(blocks), self.head_dim).numpy() if is_rotated(name) else blocks
        )
        write_at(self.handle, stored.reshape(-1).data, self.start + place.offset + start * blocks.shape[1])
        return None if keep is None else dequantize(kind, np.ascontiguousarray(blocks[keep.numpy()]))


def is_rotated(name: str) -> bool:
    """Whether llama.cpp applies rope to what this tensor produces."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def interleave_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads (n * head_dim, C), from Hugging Face's order to llama.cpp's.

    Hugging Face turns row i of a head together with row i + head_dim/2, llama.cpp rows 2i and 2i + 1.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return halves.transpose(1, 2).reshape(rows.shape)


@contextmanager
def _background(checkpoint: Checkpoint) -> Iterator[Future[str]]:
    """Hash the checkpoint while it is being quantized; hashlib lets go of the interpreter lock."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(checkpoint.digest)
