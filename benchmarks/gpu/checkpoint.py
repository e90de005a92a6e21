"""A random checkpoint of a shape, in a scratch folder: speed and memory do not ask what the weights are.

Made by a process of its own, so that nothing of it stays in memory. Knows files; measures its own time alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fox_edge.new import new_checkpoint

_SEED = 0


def checkpoint_in(work: Path, shape: str) -> Path:
    """Where the checkpoint of a shape is, in a scratch folder."""
    return work / f"checkpoint-{shape}"


def checkpoint_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{folder, shape} -> what writing it took. It is there whole or not at all: one that is there is kept."""
    folder, start = Path(job["folder"]), time.perf_counter()
    made = not folder.exists()
    if made:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new_checkpoint(folder, job["shape"], _SEED, progress)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"made": made, "bytes": size, "seconds": time.perf_counter() - start}
