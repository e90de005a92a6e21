"""Pieces of a drawing as inline SVG: lines, texts, marks, ticks, labels that keep clear of each other, bars.

Knows coordinates and class names (the page's style sheet colours them, so that drawings follow light and
dark); not what is drawn. Drawn narrow, so that they stay readable on a phone. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 400
_CHARACTER = 7.4  # a wide character of the labels, units of the drawing
_LABEL_HEIGHT = 15
_LABEL_MOST = 150  # a longer name is cut: there must be a place for it on one side of its point
# Where a label is tried, units above or below its point: first beside it, then further and further off.
_LABEL_SHIFTS = (0, -15, 15, -30, 30, -45, 45, -60, 60, -75, 75, -90, 90)
_BAR, _BAR_STEP = 13, 40
HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" class="hatch-paper"/>'
    '<rect width="2.5" height="6" class="hatch-line"/></pattern></defs>'
)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """Words on a base line."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" class="{kind}"/>'


def whisker(x1: float, x2: float, y: float, kind: str = "whisker") -> str:
    """An interval along a bar, with a short stroke at either end."""
    ends = "".join(line(x, y - 4, x, y + 4, kind) for x in (x1, x2))
    return line(x1, y, x2, y, kind) + ends


def mark(x: float, y: float, shape: str, kind: str) -> str:
    """A 'circle', a 'square', a 'triangle' or a 'diamond': colour is never the only difference."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{kind}"/>'
    if shape == "triangle":
        corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y + 5:.1f} {x - 6:.1f},{y + 5:.1f}"
        return f'<polygon points="{corners}" class="{kind}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" class="{kind}"{turn}/>'


def drawing(height: float, title: str, parts: Sequence[str]) -> str:
    """The whole drawing, named for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def nice_ticks(top: float, about: int = 5) -> list[float]:
    """From zero to at least `top`, in steps of 1, 2 or 5 times a power of ten."""
    if not top > 0:
        return [0.0, 1.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(n * step, 10) for n in range(math.ceil(top / step * 0.999) + 1)]


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all values, with some room above and below."""
    low = math.floor(math.log10(min(values)) - 0.1)
    return low, max(low + 1, math.ceil(math.log10(max(values)) + 0.2))


def power(exponent: int) -> str:
    """'0.01', or '10⁻⁵' where zeros would have to be counted."""
    if exponent >= -2:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def shortened(words: str, room: float) -> str:
    """The words, cut in the middle where they take more than `room` units: both ends tell paths apart."""
    most = max(4, int(room / _CHARACTER))
    if len(words) <= most:
        return words
    front = (most - 1) // 2
    return f"{words[:front]}…{words[len(words) - (most - 1 - front) :]}"


def width_of(words: str) -> float:
    """About how wide a label is, units."""
    return _CHARACTER * len(words)


def labels(places: Sequence[tuple[float, float]], names: Sequence[str], left: float) -> list[str]:
    """Names beside their points, each at the first place that is free, none further left than `left`."""
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in places]
    parts = []
    for (px, py), full in zip(places, names, strict=True):
        name = shortened(full, _LABEL_MOST)
        wide = width_of(name)
        options = [
            (tx, py + 4 + dy) for dy in _LABEL_SHIFTS for tx in (px + 10, px - 10 - wide, px - wide / 2)
        ]
        boxes = [(tx, ty - 11, tx + wide, ty - 11 + _LABEL_HEIGHT) for tx, ty in options]
        inside = [n for n, b in enumerate(boxes) if b[0] >= left and b[2] <= WIDTH - 2 and b[1] >= 0]
        free = (n for n in inside if not any(_overlap(boxes[n], other) for other in taken))
        best = next(free, inside[0] if inside else 0)
        taken.append(boxes[best])
        tx, ty = options[best]
        if abs(ty - 4 - py) > 20:  # so far off that a thread must say whose name it is
            parts.append(line(px, py, min(max(px, tx), tx + wide), ty - 4, "thread"))
        parts.append(text(tx, ty, name, "label"))
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class Bar:
    """A name above, stacked values, a note at the right; perhaps an interval, and a track behind it all."""

    name: str
    values: tuple[float, ...]
    note: str
    classes: tuple[str, ...]
    interval: tuple[float, float] | None = None
    track: float | None = None


@dataclass(frozen=True)
class Scale:
    """A horizontal axis from zero: its ticks, how they are written, and lines that stand out on it."""

    ticks: Sequence[float]
    tick: Callable[[float], str]
    marks: Sequence[tuple[float, str]] = field(default=())
    left: float = 2.0
    right: float = 24.0

    def x(self, value: float) -> float:
        """Where a value is."""
        return self.left + (WIDTH - self.left - self.right) * value / self.ticks[-1]

    def draw(self, top: float, bottom: float) -> list[str]:
        """The ruled ground between two heights, with the ticks below it."""
        parts = []
        for t in self.ticks[1:]:
            x, words = self.x(t), self.tick(t)
            over = x + width_of(words) / 2 > WIDTH
            parts.append(line(x, top, x, bottom, "grid"))
            parts.append(text(WIDTH if over else x, bottom + 15, words, "tick", "end" if over else "middle"))
        return parts


def bars(rows: Sequence[Bar], scale: Scale, title: str) -> str:
    """Horizontal bars; each name stands above its bar, so that long names need no margin. '' without rows."""
    if not rows:
        return ""
    head = 8 + 15 * len(scale.marks)
    bottom = head + _BAR_STEP * len(rows)
    parts = [HATCH] if any("published" in k or "projected" in k for r in rows for k in r.classes) else []
    parts += scale.draw(head, bottom)
    for n, (value, name) in enumerate(sorted(scale.marks)):
        x, y = scale.x(value), 11 + 15 * n
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(line(x, y - 9, x, bottom, "cap"))
        parts.append(
            text(x + (-5 if anchor == "end" else 5), y, shortened(name, WIDTH / 2 - 10), "cap-name", anchor)
        )
    for n, row in enumerate(rows):
        parts += _bar(row, head + n * _BAR_STEP, scale)
    return drawing(bottom + 22, title, parts)


def _bar(row: Bar, y: float, scale: Scale) -> list[str]:
    room = WIDTH - scale.left - scale.right - width_of(row.note) - 10
    parts = [
        text(scale.left, y + 14, shortened(row.name, room), "label"),
        text(WIDTH - scale.right, y + 14, row.note, "label strong", "end"),
    ]
    at, top = scale.left, y + 19
    if row.track is not None:
        parts.append(box(at, top, scale.x(row.track) - at, _BAR, "track"))
    for value, kind in zip(row.values, row.classes, strict=True):
        width = max(1.0, scale.x(value) - scale.left)
        parts.append(box(at, top, width, _BAR, kind))
        at += width
    if row.interval is not None:
        low, high = (min(max(v, 0.0), scale.ticks[-1]) for v in row.interval)
        parts.append(whisker(scale.x(low), scale.x(high), top + _BAR / 2))
    return parts
