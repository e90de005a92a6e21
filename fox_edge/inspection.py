"""What is in a checkpoint or an artifact, and what is tied.

Reads headers and manifests only, never weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fox_edge.artifact import MANIFEST, Artifact


def inspect(target: str) -> dict[str, Any]:
    """Contents of a checkpoint ('nano', folder, hub id) or an artifact folder.

    Keys: parameters bytes tied tensors[].name .shape .type .bytes. What memory it takes is for the runtimes
    to say (runtimes/footprint.py).
    """
    path = Path(target)
    return _artifact(path) if (path / MANIFEST).is_file() else _checkpoint(target)


def _artifact(path: Path) -> dict[str, Any]:
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    verification = manifest.verification or {}
    return {
        "target": str(path),
        "format": manifest.format,
        "quant": manifest.quant,
        "parameters": manifest.parameters,
        "bytes": artifact.total_bytes(),
        "bits_per_weight": manifest.bits_per_weight,
        "tied": manifest.tied,
        "verified": verification.get("passed"),
        "mean_kl_nats": verification.get("mean_kl_nats"),
        "notes": list(manifest.notes),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.bytes, "reason": t.reason}
            for t in manifest.tensors
        ],
    }


def _checkpoint(target: str) -> dict[str, Any]:
    from fox_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(target)
    tensors = []
    for name, shape in checkpoint.shapes().items():
        dtype = checkpoint.dtype(name)
        kind = str(dtype).removeprefix("torch.")
        tensors.append(
            {"name": name, "shape": list(shape), "type": kind, "bytes": math.prod(shape) * dtype.itemsize}
        )
    size = sum(t["bytes"] for t in tensors)
    parameters = checkpoint.config.num_parameters()
    return {
        "target": target,
        "format": "checkpoint",
        "quant": None,
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / parameters,
        "tied": checkpoint.config.tied,
        "notes": list(checkpoint.notes),
        "tensors": tensors,
    }


def inspect_text(result: dict[str, Any]) -> str:
    """The result as lines for a person: a summary, then types by their share of the bytes."""
    lines = [
        f"{result['target']}: {result['format']}" + (f" {result['quant']}" if result["quant"] else ""),
        _size_line(result),
        "embedding and head are " + ("one matrix (tied)" if result["tied"] else "two matrices (not tied)"),
    ]
    if "verified" in result:
        lines.append("verified against its checkpoint" if result["verified"] else "NOT verified")
    lines += [f"note: {note}" for note in result["notes"]]
    lines += ["", *_tensor_lines(result["tensors"])]
    return "\n".join(lines)


def _size_line(result: dict[str, Any]) -> str:
    """Parameters, bytes and their ratio; the bytes alone where nothing tells the parameters."""
    if result["parameters"] is None:
        return f"{megabytes(result['bytes'])}, of an unknown number of parameters"
    return (
        f"{result['parameters']:,} parameters, {megabytes(result['bytes'])}, "
        f"{result['bits_per_weight']:.2f} bits per weight"
    )


def _tensor_lines(tensors: list[dict[str, Any]]) -> list[str]:
    """Tensors of the same kind in every layer share a line."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for t in tensors:
        name = ".".join("*" if part.isdigit() else part for part in t["name"].split("."))
        groups.setdefault((name, t["type"], tuple(t["shape"])), []).append(t["bytes"])
    return [
        f"  {len(sizes):>4} x {name:<48} "
        f"{' x '.join(map(str, shape)):<14} {kind:<9} {megabytes(sum(sizes)):>10}"
        for (name, kind, shape), sizes in groups.items()
    ]


def megabytes(size_bytes: int) -> str:
    """Bytes as MB (10^6), with a decimal below 100."""
    size = size_bytes / 1e6
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.1f} MB"
