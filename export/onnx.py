"""A checkpoint becomes an ONNX artifact: `model.onnx` (the graph) and `model.onnx_data` (the weights).

Places are planned first (onnx_layout.py), then the graph is built (onnx_graph.py), then the weights stream
into their places (rounding.py, onnx_weights.py); no float copy of the model ever exists. Knows the order of
these steps and what the manifest says of them; not operators, nor arithmetic, nor what verification checks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from export.common import (
    Progress,
    Verify,
    copy_side_files,
    finish,
    make_manifest,
    needed_bytes,
    tensor_bytes,
    versions,
)
from export.guidance import guidance
from export.onnx_clients import OPTIMUM, client_notes, write_client_files
from export.onnx_graph import build_graph
from export.onnx_layout import Layout, plan
from export.onnx_weights import OnnxTarget
from export.rounding import write_weights
from fox_edge.artifact import Artifact, ArtifactWriter, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import RecipeError
from fox_edge.processors import available_cores
from fox_edge.quant import ONNX, Assignment, Recipe

MODEL_FILE = "model.onnx"
# The name under which Optimum and transformers.js look for a model's weights.
DATA_FILE = "model.onnx_data"


def export_onnx(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    replace: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    verify: Verify | None = None,
    compat: Collection[str] = (),
    rounding: str | None = None,
    calibrate: Path | None = None,
    imatrix: Path | None = None,
) -> Artifact:
    """Write the artifact folder `target`; `verify` looks at it before it gets its name.

    `rounding` is one of quant.ROUNDINGS (None: the recipe's, else the best that is worth it for its types);
    `calibrate` is a UTF-8 file with text like the model's users' (None: the built-in text), `imatrix` an
    importance matrix of the checkpoint, which takes the text's place.
    `compat` names clients of onnx_clients.COMPAT that get a graph which costs others something.
    `progress(done, total)` counts the work. Raises RecipeError, CheckpointError
    (a NaN weight), ArtifactError (the target), VerificationError; then nothing is left behind.
    """
    if recipe.format != ONNX:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.format}, but an ONNX export was asked for")
    config = checkpoint.config
    if config.head_dim % 16:
        raise RecipeError(
            f"head_dim is {config.head_dim}, but ONNX Runtime's attention takes multiples of 16 only"
        )
    assignments = recipe.resolve(checkpoint.shapes())
    layout = plan(config, assignments)
    guide = guidance(checkpoint, recipe, assignments, rounding=rounding, calibrate=calibrate, imatrix=imatrix)
    with ArtifactWriter(target, replace) as writer:
        writer.need(needed_bytes(checkpoint, assignments) + layout.table_bytes)
        padded = OPTIMUM in compat
        model = build_graph(config, layout, DATA_FILE, padded=padded)
        (writer.folder / MODEL_FILE).write_bytes(model.SerializeToString())
        made_by = versions("onnx", "torch", "numpy")
        write_weights(
            writer.folder / DATA_FILE,
            target,
            checkpoint,
            guide,
            {"types": {name: given.type.name for name, given in assignments.items()}, "versions": made_by},
            prepare=lambda path: path.touch(),
            target=lambda handle: OnnxTarget(handle, checkpoint, layout),
            threads=threads or available_cores(),
            progress=progress,
        )
        copy_side_files(writer, checkpoint)
        write_client_files(writer.folder, config, checkpoint.tokenizer(), layout, DATA_FILE, padded=padded)
        manifest = make_manifest(
            checkpoint,
            recipe,
            model_file=MODEL_FILE,
            tensors=_records(checkpoint, layout, assignments),
            checkpoint_sha256=checkpoint.digest(),
            versions=made_by,
            notes=client_notes(writer.folder, compat),
            rounding=guide.to_json(),
        )
        return finish(writer, checkpoint, manifest, verify)


def _records(
    checkpoint: Checkpoint, layout: Layout, assignments: dict[str, Assignment]
) -> Iterator[TensorRecord]:
    """One record per checkpoint tensor; the rows of a stack count their own share of its bytes."""
    for name, shape in checkpoint.shapes().items():
        given = assignments[name]
        stored = name if len(shape) == 1 else layout.matrix_of(name).stored_as(name)
        scales = layout.column_scales.get(name)
        size = tensor_bytes(name, shape, given) + (scales.nbytes if scales else 0)
        yield TensorRecord(name, stored, shape, given.type.name, size, given.reason)
