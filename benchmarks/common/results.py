"""What results say of their making, and a study's results file. Knows no figure by its name."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fox_edge.partial import write_whole


def command_text(*words: object) -> str:
    """A command of fox-edge's as a reader types it, to get the same results."""
    return shlex.join(["fox-edge", *map(str, words)])


def study_command(study: str, words: Sequence[str] | None = None) -> str:
    """What a study was started by, this process's own words if not told; of a path only its name.

    Readers have folders of their own.
    """
    said = sys.argv[1:] if words is None else words
    names = [Path(word).name if "/" in word and "://" not in word else word for word in said]
    return shlex.join(["python", "-m", f"benchmarks.{study}", *names])


def medians(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several rounds -> one row per artifact with the median of every number."""
    merged = []
    for same in zip(*rounds, strict=True):
        row = dict(same[0])
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                row[key] = statistics.median(r[key] for r in same)
        merged.append(row | {"rounds": len(same)})
    return merged


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a results file as it is committed, whole: a study that is killed leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(results, indent=1) + "\n")
