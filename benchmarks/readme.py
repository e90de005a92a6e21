"""The tables of the README and the docs, made from the results files: no number in them is typed by hand.

    python -m benchmarks.readme        rewrites the tables of all pages; a test checks that nothing changes

A table stands between `<!-- NAME table: FILE -->` and `<!-- end -->`; what it shows is readme_tables.py's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.readme_tables import TABLES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) table: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, root: Path = ROOT) -> str:
    """The text with every table made anew from its results file."""

    def fill(block: re.Match[str]) -> str:
        results = json.loads((root / block["file"]).read_text(encoding="utf-8"))
        return f"{block[1]}{TABLES[block['name']](results)}\n{block[4]}"

    return _BLOCK.sub(fill, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
