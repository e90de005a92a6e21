"""The row that every result is compared with: the published BF16 baseline, or a measured one from a file.

The published one is data with its provenance; nothing in it was measured by this project. Knows where a row
comes from and how far others are from it; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import check_schema, read_json
from fox_edge.errors import FoxEdgeError

# Section 3 of the report: vLLM with BF16 weights on one H100, several users at once. "Over 200" output tokens
# per second is what one user sees; the memory is the GPU's.
# The share of the ceiling is our arithmetic: 200 tokens/s x 3,330,543,616 bytes over the H100's 3.35 TB/s.
H100: dict[str, Any] = {
    "name": "Fox-1 1.6B BF16, H100",
    "ours": False,
    "model": "Fox-1-1.6B",
    "hardware": "one NVIDIA H100",
    "runtime": "vLLM",
    "format": "safetensors",
    "quant": "bf16",
    "prompt_tokens": 234,
    "output_tokens": 512,
    "decode_tokens_per_s": 200,
    "decode_is_at_least": True,
    "roofline_percent": 100 * 200 * 3_330_543_616 / 3.35e12,
    "peak_rss_bytes": 3_703_000_000,
    "memory_is": "GPU memory",
    "gsm8k_5_shot_percent": 36.39,
    "source": "Fox-1 technical report, section 3 (speed, memory) and table 6 (GSM8K)",
}
# Figures of a row that are held against the baseline's.
RATIOS = ("decode_tokens_per_s", "peak_rss_bytes")
_NAMES = 12  # that are listed
_LONGEST = 200  # characters of a stranger's text
_MOST = 1e18  # above any figure of a machine


def baseline(file: str | Path | None = None) -> dict[str, Any]:
    """The published row, or a measured one from FILE: what `bench --json` printed, or a report.json.

    FILE#ARTIFACT names one of several measured rows. Raises FoxEdgeError for a file that has no such row.
    """
    return dict(H100) if file is None else _measured(str(file))


def ratio(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    """A row's figures over the baseline's; null where one of the two is not known.

    A model on a card holds its memory there, as the published one does.
    """
    found: dict[str, float | None] = {}
    for key in RATIOS:
        value, other = row.get(key), base.get(key)
        if key == "peak_rss_bytes" and row.get("peak_device_bytes") is not None:
            value = row["peak_device_bytes"]
        found[key] = value / other if value is not None and other else None
    return found


def baseline_text(base: Mapping[str, Any]) -> str:
    """The baseline in one line: what it is, its figures, where they are from."""
    memory = "" if base["peak_rss_bytes"] is None else f", {base['peak_rss_bytes'] / 1e6:,.0f} MB of "
    memory += "" if base["peak_rss_bytes"] is None else base["memory_is"]
    least = "over " if base["decode_is_at_least"] else ""
    kind = "measured before" if base["ours"] else "not ours"
    return (
        f"{kind}: {base['name']}: {least}{base['decode_tokens_per_s']:,.6g} tok/s per user{memory} "
        f"({base['source']})"
    )


def _measured(spec: str) -> dict[str, Any]:
    """One row of a file that an earlier run wrote, in the published row's keys."""
    path, wanted = _split(spec)
    fields = check_schema(read_json(path), path)
    rows = _rows(fields, path)
    row = _choose(rows, wanted, path)
    machine, settings = (_object(fields.get(key)) for key in ("machine", "settings"))
    decode, peak = (_figure(row, key, path) for key in RATIOS)
    if decode is None:
        raise FoxEdgeError(f"{path}: the row {_name(row)} has no decode_tokens_per_s, so it is no baseline")
    created = fields.get("created")
    return {
        "name": _name(row),
        "ours": True,
        "model": _text(fields.get("checkpoint") or _name(row)),
        "hardware": _text(machine.get("cpu") or "a machine that is not told"),
        **{key: _text(row.get(key) or "?") for key in ("runtime", "format", "quant")},
        "prompt_tokens": _count(settings.get("prompt_tokens")),
        "output_tokens": _count(settings.get("decode_tokens")),
        "decode_tokens_per_s": decode,
        "decode_is_at_least": False,
        "roofline_percent": _figure(row, "roofline_percent", path),
        "peak_rss_bytes": peak,
        "memory_is": "resident memory",
        "source": path.name + (f", {_text(created)}" if created else ""),
    }


def _split(spec: str) -> tuple[Path, str | None]:
    """A file and the row asked for; a file whose name has a # in it is a file."""
    if "#" not in spec or Path(spec).exists():
        return Path(spec), None
    name, _, wanted = spec.rpartition("#")
    return Path(name), wanted


def _rows(fields: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The rows that were measured: `results` of a benchmark, or `rows` of a report."""
    rows = fields.get("results", fields.get("rows"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FoxEdgeError(
            f"{path}: has no list of results; a baseline is what bench --json or --report wrote"
        )
    whole = [row for row in rows if not row.get("error")]
    if not whole:
        raise FoxEdgeError(f"{path}: none of its {len(rows)} results was measured")
    return whole


def _choose(rows: Sequence[dict[str, Any]], wanted: str | None, path: Path) -> dict[str, Any]:
    """The row asked for, or the only one."""
    chosen = [row for row in rows if wanted is None or wanted in (row.get("artifact"), row.get("name"))]
    if len(chosen) == 1:
        return chosen[0]
    known = list(dict.fromkeys(_name(row) for row in rows))
    names = ", ".join(known[:_NAMES]) + (f" and {len(known) - _NAMES} more" if len(known) > _NAMES else "")
    if wanted is None:
        raise FoxEdgeError(f"{path}: has {len(rows)} results; say which one with {path}#NAME: {names}")
    count = "no result" if not chosen else f"{len(chosen)} results"
    raise FoxEdgeError(f"{path}: {count} of the name '{wanted}'; there are {names}")


def _name(row: Mapping[str, Any]) -> str:
    return _text(row.get("name") or row.get("artifact") or "without a name")


def _figure(row: Mapping[str, Any], key: str, path: Path) -> float | None:
    """A figure of a row, None where it has none; raises FoxEdgeError for one that is not above 0."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
        raise FoxEdgeError(
            f"{path}: {key} of {_name(row)} is {value!r:.50}, but must be a number from 0 to {_MOST:g}"
        )
    return value


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A stranger's text as one line that a terminal can show."""
    return "".join(char if char.isprintable() else "?" for char in str(value)[:_LONGEST])


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < _MOST else None
