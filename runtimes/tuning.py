"""Choices that were measured to suit this machine, kept beside an artifact, read back with care.

`fox-edge tune` (benchmarks/latency/tune.py) measures and writes them; whoever opens a session for a user asks
here. A record is for one machine, one library version and one model file; several lie side by side. Whoever
can write to the folder could have written one: only known choices within bounds are taken, and choices alone
never reach further than the same choices on the command line. Knows records and options; measures nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores
from fox_edge.quant import GGUF, ONNX, PTE
from runtimes.artifact_cache import cache_folder, key_of, read_record, write_record
from runtimes.base import CUDA, SessionOptions
from runtimes.kv_types import KV_TYPES

PREFERENCES = ("balance", "prompt", "decode", "memory")
_SCHEMA = 1
_PACKAGES = {GGUF: "llama-cpp-python", ONNX: "onnxruntime", PTE: "executorch"}
_SWITCHES = ("flash_attention", "repack", "mmap")
_COUNTS = ("threads", "prompt_threads")
_CHOICES = {ONNX: ("kv", "threads"), PTE: ("threads",)}  # llama.cpp has all of them
# Choices that hang together: naming one on the command line sets all of its group aside.
_GROUPS = (("kv", "flash_attention"), _COUNTS)
_CPUINFO = Path("/proc/cpuinfo")


def with_tuning(artifact: Artifact, options: SessionOptions) -> tuple[SessionOptions, str | None]:
    """The options with what was tuned for this machine where nothing was said, and a remark for the user.

    Nothing is used when `options.cache` is off, nor on a graphics card: what was tuned is a processor's.
    """
    path = record_path(artifact)
    if not options.cache or options.device == CUDA or path is None or not path.exists():
        return options, None
    fields = read_record(path)
    choices = None if fields is None else checked(fields.get("choices"), artifact.manifest.format)
    preference = (fields or {}).get("prefer")
    if choices is None or preference not in PREFERENCES:
        return options, f"{path} is not what fox-edge tune wrote: not used"
    said = {name for name in choices if getattr(options, name) is not None}
    for group in _GROUPS:
        if any(getattr(options, name) is not None for name in group):
            said.update(group)
    used = {name: value for name, value in choices.items() if name not in said}
    if not used:
        return options, None
    return replace(options, **used), f"tuned for {preference} here: {words(used)} (--no-cache: without)"


def store(
    artifact: Artifact, choices: Mapping[str, Any], prefer: str, measured: list[dict[str, Any]]
) -> Path:
    """Keep choices for this machine; returns the file. Raises FoxEdgeError where that is not possible."""
    path = record_path(artifact)
    if path is None:
        raise FoxEdgeError(f"{artifact.path}: what is kept beside an artifact would lie behind a link")
    try:
        path.parent.mkdir(exist_ok=True)
        write_record(path, {"prefer": prefer, "choices": dict(choices), "measured": measured})
    except OSError as error:
        raise FoxEdgeError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def record_path(artifact: Artifact) -> Path | None:
    """Where this machine's choices for this model lie, there or not; None where nothing may be kept."""
    folder = cache_folder(artifact.path)
    return folder and folder / f"tuned-{key_of(made_for(artifact))}.json"


def made_for(artifact: Artifact) -> dict[str, Any]:
    """Everything that a measured choice depends on: processor, memory, library, model files."""
    manifest = artifact.manifest
    package = _PACKAGES[manifest.format]
    version = None
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version(package)
    return {
        "schema": _SCHEMA,
        "cpu": _cpu(),
        "cores": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "library": [package, version],
        "files": {name: digest for name, digest in manifest.files.items() if _is_model(name, artifact)},
    }


def checked(choices: object, format: str) -> dict[str, Any] | None:
    """Choices of a record, each known and within bounds; None when one is not."""
    if not isinstance(choices, dict):
        return None
    for name, value in choices.items():
        if name == "kv":
            fine = isinstance(value, str) and value in KV_TYPES[format]
        elif name in _COUNTS:
            fine = type(value) is int and 1 <= value <= available_cores()
        else:
            fine = name in _SWITCHES and type(value) is bool
        # ONNX Runtime has no more than threads and the cache's type, ExecuTorch threads alone.
        if not fine or name not in _CHOICES.get(format, choices):
            return None
    return dict(choices)


def words(choices: Mapping[str, Any]) -> str:
    """Choices as a person reads them: 'repack off, threads 4'; 'as it comes' for none."""
    said = (
        f"{name.replace('_', ' ')} {('off', 'on')[value] if isinstance(value, bool) else value}"
        for name, value in choices.items()
    )
    return ", ".join(said) or "as it comes"


def _is_model(name: str, artifact: Artifact) -> bool:
    """Whether weights or the graph are in a file of the artifact."""
    return name == artifact.manifest.model_file or name.startswith("model.")


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
