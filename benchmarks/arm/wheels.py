"""The runtimes' own ARM wheels, from PyPI, in the versions that constraints.txt names.

Knows pip and which packages each format's runtime takes; installs nothing in this machine's Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arm.torch_lib import without_gpu, without_processes
from benchmarks.arm.userland import GLIBC_MINOR, python_version, run
from fox_edge.partial import PartialFolder
from fox_edge.progress import say

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"

# Wheels that all need, and those of each format's runtime; whole lists, so that nothing else is installed.
_COMMON = ("numpy", "sentencepiece", "tokenizers", "jinja2", "markupsafe", "typing_extensions")
WHEELS = {
    "gguf": (
        *(*_COMMON, "gguf", "diskcache", "pyyaml", "tqdm"),
        *("requests", "certifi", "charset-normalizer", "idna", "urllib3"),
    ),
    "onnx": (*_COMMON, "onnx", "onnxruntime", "flatbuffers", "protobuf", "packaging", "ml_dtypes"),
    # The bindings alone, which want PyTorch loaded; the rest of the package, which exports, is not imported.
    "pte": (*_COMMON, "executorch", "torch"),
}


def wheels(work: Path, root: Path, format: str) -> Path:
    """A folder with the packages that a format's runtime needs, for ARM; raises FoxEdgeError."""
    site = work / f"site-{format}"
    if site.exists():
        return site
    say(f"fetching ARM wheels for {format}")
    with PartialFolder(site) as partial:
        install(partial.path, python_version(root), WHEELS[format])
        if (lib := partial.path / "torch" / "lib").is_dir():
            without_gpu(lib, root)
            without_processes(lib.parent)
        partial.put_in_place()
    return site


def install(target: Path, version: str, names: Sequence[str]) -> None:
    """Let pip put wheels for ARM into a folder; raises FoxEdgeError with pip's last words."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC_MINOR + 1)]
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
        *("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={version}"),
        *(*platforms, "--platform=manylinux2014_aarch64", f"--target={target}", "-c", CONSTRAINTS, *names),
    )
