"""Three small plots as inline SVG: quality against size, share of the ceiling, memory.

Knows coordinates and colours (CSS classes that the page defines, so that plots follow light and dark);
not where figures come from. Drawn narrow, so that they stay readable on a phone. Everything is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Row = Mapping[str, Any]

WIDTH = 460
_CHARACTER = 7.1  # an average character of the 13-pixel labels, pixels
# Where a label is tried, pixels above or below its point: first beside it, then further and further off.
_LABEL_SHIFTS = (0, -16, 16, -32, 32, -48, 48, -64, 64)
_BAR, _BAR_STEP = 14, 42
_HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" class="hatch-paper"/>'
    '<rect width="2.5" height="6" class="hatch-line"/></pattern></defs>'
)
_LABEL_HEIGHT = 15


def quality_plot(rows: Sequence[Row]) -> str:
    """Mean KL (log) over size on disk (from zero); '' when no row has both."""
    points = [r for r in rows if _positive(r, "bytes") and _positive(r, "mean_kl_nats")]
    if not points:
        return ""
    height, left, right, top, bottom = 320, 58, 18, 14, 46
    x_ticks = nice_ticks(max(r["bytes"] for r in points) / 1e6)
    low, high = _decades([r["mean_kl_nats"] for r in points])

    def x(megabytes: float) -> float:
        return left + (WIDTH - left - right) * megabytes / x_ticks[-1]

    def y(kl: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(kl)) / (high - low)

    parts = [
        _line(left, y(10.0**d), WIDTH - right, y(10.0**d), "grid")
        + _text(left - 8, y(10.0**d) + 4, _power(d), "tick", "end")
        for d in range(low, high + 1)
    ]
    parts += [_text(x(t), height - bottom + 18, f"{t:g}", "tick", "middle") for t in x_ticks]
    parts.append(_text(WIDTH - right, height - 6, "size on disk, MB", "axis", "end"))
    parts.append(_text(left + 6, top + 12, "mean KL to the reference, nats", "axis"))
    places = [(x(r["bytes"] / 1e6), y(r["mean_kl_nats"])) for r in points]
    parts += [_mark(px, py, r) for (px, py), r in zip(places, points, strict=True)]
    parts += _labels(places, [str(r["name"]) for r in points])
    return _svg(height, "Mean KL divergence against size on disk", parts)


def share_plot(rows: Sequence[Row]) -> str:
    """Bars of decode speed as a share of the memory ceiling; '' when no row has one."""
    bars = [
        _Bar(
            str(r["name"]),
            (float(r["roofline_percent"]),),
            f"{r['roofline_percent']:.1f} %"
            + (f" · {r['decode_tokens_per_s']:,.0f} tok/s" if r.get("decode_tokens_per_s") else ""),
            (_class(r),),
        )
        for r in rows
        if _positive(r, "roofline_percent")
    ]
    top = max((sum(b.values) for b in bars), default=0.0)
    return _bars(bars, max(100.0, top), lambda v: f"{v:g} %", "Decode speed as a share of the memory ceiling")


def memory_plot(rows: Sequence[Row]) -> str:
    """Bars of resident memory while running, own and file-backed; '' when no row has it."""
    bars = []
    for r in rows:
        if not _positive(r, "peak_rss_bytes"):
            continue
        own, file, peak = r.get("anonymous_rss_bytes"), r.get("file_rss_bytes"), r["peak_rss_bytes"]
        name, note = str(r["name"]), f"peak {peak / 1e6:,.0f} MB"
        if own is not None and file is not None:
            bars.append(_Bar(name, (own / 1e6, file / 1e6), note, (_class(r), _class(r) + " light")))
        else:
            bars.append(_Bar(name, (peak / 1e6,), note, (_class(r),)))
    top = max((sum(b.values) for b in bars), default=0.0)
    return _bars(bars, top, lambda v: f"{v:,.0f} MB", "Resident memory while running")


@dataclass(frozen=True)
class _Bar:
    """A name above, stacked values, a note behind the end."""

    name: str
    values: tuple[float, ...]
    note: str
    classes: tuple[str, ...]


def _bars(bars: Sequence[_Bar], top: float, tick: Callable[[float], str], title: str) -> str:
    """Horizontal bars; each name stands above its bar, so that long names need no margin."""
    if not bars:
        return ""
    ticks = nice_ticks(top)
    left, right, head = 2, 24, 8
    height = head + _BAR_STEP * len(bars) + 24
    hatch = _HATCH if any("published" in bar.classes for bar in bars) else ""

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * value / ticks[-1]

    bottom = head + _BAR_STEP * len(bars)
    parts = [
        _line(x(t), head, x(t), bottom, "grid") + _text(x(t), bottom + 16, tick(t), "tick", "middle")
        for t in ticks[1:]
    ]
    for n, bar in enumerate(bars):
        y, at = head + n * _BAR_STEP, left + 0.0
        parts.append(_text(left, y + 14, bar.name, "label"))
        parts.append(_text(WIDTH - right, y + 14, bar.note, "label strong", "end"))
        for value, kind in zip(bar.values, bar.classes, strict=True):
            width = max(1.0, x(value) - left)
            parts.append(
                f'<rect x="{at:.1f}" y="{y + 20}" width="{width:.1f}" height="{_BAR}" class="{kind}"/>'
            )
            at += width
    return _svg(height, title, [hatch, *parts])


def nice_ticks(top: float, about: int = 5) -> list[float]:
    """From zero to at least `top`, in steps of 1, 2 or 5 times a power of ten."""
    if not top > 0:
        return [0.0, 1.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(n * step, 10) for n in range(math.ceil(top / step * 0.999) + 1)]


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values, with some room above and below."""
    low = math.floor(math.log10(min(values)) - 0.1)
    return low, max(low + 1, math.ceil(math.log10(max(values)) + 0.2))


def _power(exponent: int) -> str:
    """'0.01', or '10⁻⁵' where zeros would have to be counted."""
    if exponent >= -2:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _labels(places: Sequence[tuple[float, float]], names: Sequence[str]) -> list[str]:
    """Names beside their points, each at the first place that is free."""
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in places]
    parts = []
    for (px, py), name in zip(places, names, strict=True):
        width = _CHARACTER * len(name)
        options = [
            (tx, py + 4 + dy) for dy in _LABEL_SHIFTS for tx in (px + 10, px - 10 - width, px - width / 2)
        ]
        boxes = [(tx, ty - 11, tx + width, ty - 11 + _LABEL_HEIGHT) for tx, ty in options]
        free = (
            n
            for n, box in enumerate(boxes)
            if box[0] >= 60 and box[2] <= WIDTH - 2 and not any(_overlap(box, other) for other in taken)
        )
        best = next(free, 0)
        taken.append(boxes[best])
        parts.append(_text(*options[best], name, "label"))
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _class(row: Row) -> str:
    """The CSS class that colours a row; what is not ours is hatched whatever it is."""
    if row.get("ours") is False:
        return "published"
    return f"is-{row['format']}" if row.get("format") in ("gguf", "onnx", "torch") else "is-other"


def _mark(x: float, y: float, row: Row) -> str:
    """A circle for GGUF, a square for ONNX, a diamond for the rest: colour is not the only difference."""
    kind, turn = _class(row), ""
    if row.get("format") == "gguf":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{kind}"/>'
    if row.get("format") != "onnx":
        turn = f' transform="rotate(45 {x:.1f} {y:.1f})"'
    return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" class="{kind}"{turn}/>'


def _positive(row: Row, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
