"""Tables in Markdown: cells, figures, and below them the machine that they were measured on.

Knows how a table is written; what could be markup in a cell is the caller's. Does not know what is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is words, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def measured(head: Sequence[str], rows: Iterable[Sequence[str]], results: Mapping[str, Any]) -> str:
    """A table, and the machine that it was measured on."""
    return f"{markdown(head, rows)}\n\n{machine_line(results['machine'])}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """What it was measured on, and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = machine["memory_bytes"] / 2**30
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB"
    return f"{hardware}; Python {machine['python']}, {versions}."


def mb(size: int | float) -> str:
    """Bytes as megabytes, with as many digits as tell something."""
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"
