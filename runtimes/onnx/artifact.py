"""The way to an artifact's graph: its manifest and its files held against each other before anything loads.

Hashing gigabytes at every start would cost more than loading them, so a start checks what can be read off the
graph and the sizes of files; `fox-edge verify` checks every byte. Knows the manifest and the graph's tables;
not what runs it.
"""

from __future__ import annotations

from pathlib import Path

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ArtifactError
from runtimes.onnx.external import External, onnx, read_graph

# GroupQueryAttention's table of cosines, one row per position.
_ATTENTION, _COSINES = "GroupQueryAttention", 7
_INPUTS = ("input_ids", "attention_mask", "logits_to_keep")


def read_artifact_graph(artifact: Artifact) -> onnx.ModelProto:
    """The artifact's model without its weights.

    Raises ArtifactError for a damaged graph, a data file that is longer than its tensors, or a manifest that
    names another graph than its own, or promises more positions than the graph has.
    """
    model = read_graph(artifact.model_path)
    missing = [name for name in _INPUTS if name not in {value.name for value in model.graph.input}]
    if missing:
        raise ArtifactError(
            f"{artifact.path / MANIFEST}: names '{artifact.manifest.model_file}' as the model, but that "
            f"graph has no input '{missing[0]}'"
        )
    _check_ends(model, artifact.path, artifact.model_path)
    positions = _positions(model)
    if positions is not None and artifact.manifest.context > positions:
        raise ArtifactError(
            f"{artifact.path / MANIFEST}: promises a context of {artifact.manifest.context}, but the graph "
            f"has tables for {positions} positions"
        )
    return model


def _check_ends(model: onnx.ModelProto, folder: Path, model_path: Path) -> None:
    """Every data file ends with its last tensor: with a byte too many, weights may be off their place."""
    ends: dict[Path, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            at = External.of(tensor, folder)
            ends[at.path] = max(ends.get(at.path, 0), at.offset + at.length)
    for path, end in ends.items():
        size = path.stat().st_size
        if path != model_path and size != end:
            raise ArtifactError(
                f"{path}: has {size} bytes, but its last tensor ends at {end}: {size - end} do not belong "
                "there"
            )


def _positions(model: onnx.ModelProto) -> int | None:
    """Rows of the shortest table of cosines; None in a graph without any."""
    names = {
        node.input[_COSINES]
        for node in model.graph.node
        if node.op_type == _ATTENTION and len(node.input) > _COSINES
    }
    return min((t.dims[0] for t in model.graph.initializer if t.name in names and t.dims), default=None)
