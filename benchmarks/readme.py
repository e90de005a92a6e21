"""The tables of the README and the docs, made from the results files: no number in them is typed by hand.

    python -m benchmarks.readme        rewrites the tables of all pages; a test checks that nothing changes

A table stands between `<!-- NAME table: FILE -->` and `<!-- end -->`; what it shows is in
readme_exports.py and readme_runs.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import readme_exports as exports
from benchmarks import readme_runs as runs
from benchmarks.arm.verdicts import arm_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) table: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "demo": runs.demo_table,
    "report": runs.report_table,
    "accuracy": exports.accuracy_table,
    "full-shape": exports.full_shape_table,
    "rounding": exports.rounding_table,
    "gguf-rounding": exports.gguf_rounding_table,
    "onnx-shape": exports.onnx_shape_table,
    "pte-shape": exports.pte_shape_table,
    "memory": runs.memory_table,
    "speculation": runs.speculation_table,
    "perplexity-peer": exports.perplexity_peer_table,
    "fidelity-cost": exports.fidelity_cost_table,
    "overhead": runs.overhead_table,
    "repeats": runs.repeats_table,
    "prefix-gain": runs.prefix_gain_table,
    "serve": runs.serve_table,
    "gpu": runs.gpu_table,
    "browser": runs.browser_table,
    "arm": arm_table,
}


def with_tables(text: str, root: Path = ROOT) -> str:
    """The text with every table made anew from its results file."""

    def fill(block: re.Match[str]) -> str:
        results = json.loads((root / block["file"]).read_text(encoding="utf-8"))
        return f"{block[1]}{TABLES[block['name']](results)}\n{block[4]}"

    return _BLOCK.sub(fill, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
