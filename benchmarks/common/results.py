"""A study's results file: the medians of its rounds, and how it is written. Knows no figure by its name."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


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
    """Write a results file, as it is committed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
