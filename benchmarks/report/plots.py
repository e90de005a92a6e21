"""The figures of the report: the front of size and divergence, speed, memory, accuracy, latency, projections.

Knows which figure of a row goes where and what may stand beside what (nothing projected among things
measured); not where figures come from. Each returns '' where no row has what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.svg import (
    WIDTH,
    Bar,
    Scale,
    bars,
    decades,
    drawing,
    labels,
    line,
    mark,
    nice_ticks,
    power,
    shortened,
    text,
    whisker,
    width_of,
)

Row = Mapping[str, Any]

_Z95 = 1.959963984540054
_SHAPES = {"gguf": "circle", "onnx": "square", "pte": "triangle"}
# A profile's cap is drawn where it is at most this many times the longest bar; else it is put in words.
_CAP_IN_SIGHT = 2.5


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in bytes and mean KL at once, smallest first."""
    front: list[Row] = []
    for row in sorted(_points(rows), key=lambda r: (r["bytes"], r["mean_kl_nats"])):
        if not front or row["mean_kl_nats"] < front[-1]["mean_kl_nats"]:
            front.append(row)
    return front


def front_plot(rows: Sequence[Row]) -> str:
    """Mean KL (log) over size on disk (from zero), the Pareto front as a line, what it beats shaded."""
    points = _points(rows)
    if not points:
        return ""
    height, left, right, top, bottom = 330, 40, 16, 26, 44
    x_ticks = nice_ticks(max(r["bytes"] for r in points) / 1e6, 4)
    bounds = [_kl_interval(r) for r in points]
    low, high = decades([v for b in bounds for v in b])

    def x(row: Row) -> float:
        return left + (WIDTH - left - right) * row["bytes"] / 1e6 / x_ticks[-1]

    def y(kl: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(kl)) / (high - low)

    parts = []
    stairs = _stairs([(x(r), y(r["mean_kl_nats"])) for r in pareto(points)], top, WIDTH - right)
    parts.append(f'<polygon points="{stairs} {WIDTH - right:.1f},{top:.1f}" class="beaten"/>')
    parts += [
        line(left, y(10.0**d), WIDTH - right, y(10.0**d), "grid")
        + text(left - 6, y(10.0**d) + 4, power(d), "tick", "end")
        for d in range(low, high + 1)
    ]
    for t in x_ticks:
        at = left + (WIDTH - left - right) * t / x_ticks[-1]
        parts.append(text(at, height - bottom + 17, f"{t:,g}", "tick", "middle"))
    parts.append(f'<polyline points="{stairs}" class="front"/>')
    parts.append(text(WIDTH - right, height - 6, "size on disk, MB", "axis", "end"))
    parts.append(text(2, 12, "mean KL to the reference, nats", "axis"))
    for row, (least, most) in zip(points, bounds, strict=True):
        parts.append(line(x(row), y(least), x(row), y(most), "whisker"))
    places = [(x(r), y(r["mean_kl_nats"])) for r in points]
    parts += [mark(px, py, _shape(r), _class(r)) for (px, py), r in zip(places, points, strict=True)]
    parts += labels(places, [str(r["name"]) for r in points], left + 4)
    return drawing(height, "Mean KL divergence against size on disk, with the Pareto front", parts)


def _stairs(corners: Sequence[tuple[float, float]], top: float, right: float) -> str:
    """Down at each point of the front, level to the next: what lies above and right of it is beaten."""
    path, (_, y) = [(corners[0][0], top)], corners[0]
    for px, py in corners:
        path += [(px, y), (px, py)]
        y = py
    path.append((right, y))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in dict.fromkeys(path))


def ceiling_plot(rows: Sequence[Row]) -> str:
    """Decode speed as a share of each row's own ceiling, the interval of its rounds on it."""
    drawn = []
    for row in rows:
        if not _positive(row, "roofline_percent"):
            continue
        share, speed = float(row["roofline_percent"]), row.get("decode_tokens_per_s")
        note = f"{share:.1f} %"
        if speed:
            ceiling = row.get("ceiling_tokens_per_s") or 100 * speed / share
            over = "over " if row.get("decode_is_at_least") else ""
            note = f"{over}{speed:,.{_digits(speed)}f} of {ceiling:,.0f} tok/s · {share:.0f} %"
        between = _interval(row, "decode_tokens_per_s")
        shares = None
        if between and speed:
            shares = (between[0] * share / speed, between[1] * share / speed)
        drawn.append(Bar(str(row["name"]), (share,), note, (_class(row),), shares, 100.0))
    top = max([100.0, *(bar.values[0] for bar in drawn)])
    scale = Scale(nice_ticks(top), lambda v: f"{v:g} %")
    return bars(drawn, scale, "Decode speed as a share of the memory ceiling")


def memory_plot(rows: Sequence[Row], profiles: Sequence[Row] = ()) -> str:
    """Memory while running in its parts, against the profiles' caps that are in sight."""
    drawn = []
    for row in rows:
        if _positive(row, "peak_rss_bytes"):
            values, classes = _memory_parts(row)
            note = f"peak {row['peak_rss_bytes'] / 1e6:,.0f} MB"
            drawn.append(Bar(str(row["name"]), values, note, classes))
    if not drawn:
        return ""
    shown, _ = caps(rows, profiles)
    marks = [(p["memory_bytes"] / 1e6, f"{p['name']}: {p['memory_bytes'] / 1e6:,.0f} MB") for p in shown]
    top = max([sum(bar.values) for bar in drawn] + [at for at, _ in marks])
    scale = Scale(nice_ticks(top, 4), lambda v: f"{v:,.0f} MB", marks)
    return bars(drawn, scale, "Resident memory while running")


def caps(rows: Sequence[Row], profiles: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The profiles whose cap can be drawn beside these rows' bars, and those whose cap is far off."""
    longest = max((r["peak_rss_bytes"] for r in rows if _positive(r, "peak_rss_bytes")), default=0)
    known = [p for p in profiles if _positive(p, "memory_bytes")]
    near = [p for p in known if p["memory_bytes"] <= _CAP_IN_SIGHT * longest]
    return near, [p for p in known if p not in near]


def _memory_parts(row: Row) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Megabytes of each part and its class: own and file-backed pages where known, else the peak."""
    own, file = row.get("anonymous_rss_bytes"), row.get("file_rss_bytes")
    kind = _class(row)
    if own is not None and file is not None:
        return (own / 1e6, file / 1e6), (kind, kind + " light")
    return (row["peak_rss_bytes"] / 1e6,), (kind,)


def accuracy_plot(rows: Sequence[Row], task: str) -> str:
    """Right answers of one task as points with their 95 % intervals; a line at the reference's."""
    found = [(r, t) for r in rows for t in r.get("tasks") or () if t.get("task") == task]
    found = [(r, t) for r, t in found if t.get("accuracy_percent") is not None]
    if not found:
        return ""
    head, step = 6, 34
    bottom = head + step * len(found)
    scale = Scale((0, 20, 40, 60, 80, 100), lambda v: f"{v:g} %")
    parts = scale.draw(head, bottom)
    reference = next((t for r, t in found if r.get("format") == "torch"), None)
    if reference:
        x = scale.x(reference["accuracy_percent"])
        parts.append(line(x, head, x, bottom, "reference"))
    for n, (row, asked) in enumerate(found):
        y = head + n * step
        note = f"{asked['accuracy_percent']:.0f} %" + _verdict_note(asked)
        room = WIDTH - scale.left - scale.right - width_of(note) - 10
        parts.append(text(scale.left, y + 12, shortened(str(row["name"]), room), "label"))
        parts.append(text(WIDTH - scale.right, y + 12, note, "label strong", "end"))
        if asked.get("ci95_percent"):
            low, high = asked["ci95_percent"]
            parts.append(whisker(scale.x(low), scale.x(high), y + 23, f"whisker {_stroke(row)}"))
        parts.append(mark(scale.x(asked["accuracy_percent"]), y + 23, _shape(row), _class(row)))
    return drawing(bottom + 20, f"Right answers of {task} with 95 % intervals", parts)


def _verdict_note(asked: Mapping[str, Any]) -> str:
    verdict = (asked.get("paired") or {}).get("verdict")
    return f" · {verdict}" if verdict else ""


def latency_plot(rows: Sequence[Row]) -> str:
    """Milliseconds per token: the median as a mark, then the 95th and 99th percentile along a line."""
    keys = ("token_p50_s", "token_p95_s", "token_p99_s")
    found = [r for r in rows if all(_positive(r, key) for key in keys)]
    if not found:
        return ""
    head, step = 6, 34
    bottom = head + step * len(found)
    ticks = nice_ticks(max(r["token_p99_s"] for r in found) * 1e3)
    scale = Scale(ticks, lambda v: f"{v:g} ms", left=8.0)
    parts = scale.draw(head, bottom)
    for n, row in enumerate(found):
        y = head + n * step
        middle, often, rarely = (scale.x(row[key] * 1e3) for key in keys)
        note = " / ".join(f"{row[key] * 1e3:.{_digits(row[key] * 1e3)}f}" for key in keys) + " ms"
        room = WIDTH - 2 - scale.right - width_of(note) - 10
        parts.append(text(2, y + 12, shortened(str(row["name"]), room), "label"))
        parts.append(text(WIDTH - scale.right, y + 12, note, "label strong", "end"))
        stroke = _stroke(row)
        parts.append(line(middle, y + 23, often, y + 23, f"range {stroke}"))
        parts.append(line(often, y + 23, rarely, y + 23, f"range thin {stroke}"))
        parts.append(line(rarely, y + 19, rarely, y + 27, f"whisker {stroke}"))
        parts.append(mark(middle, y + 23, _shape(row), _class(row)))
    return drawing(bottom + 20, "Time per token: median, 95th and 99th percentile", parts)


def projection_plot(rows: Sequence[Row], profile: str) -> str:
    """Computed decode speeds on one device, all hatched: never beside anything measured."""
    drawn = []
    for row in rows:
        for projected in row.get("projections") or ():
            if projected.get("profile") == profile and _positive(projected, "decode_tokens_per_s"):
                speed = float(projected["decode_tokens_per_s"])
                note = f"about {speed:,.{_digits(speed)}f} tok/s"
                drawn.append(Bar(str(row["name"]), (speed,), note, ("projected",)))
    if not drawn:
        return ""
    scale = Scale(nice_ticks(max(bar.values[0] for bar in drawn)), lambda v: f"{v:g}")
    return bars(drawn, scale, f"Projected decode speed on {profile}, tokens per second, not measured")


def curve_plot(rows: Sequence[Row]) -> str:
    """Mean KL (log) along the context, one line per row, its name at the line's end."""
    found = [(r, c) for r in rows if len(c := _curve(r)) > 1]
    if not found:
        return ""
    height, left, right, top, bottom = 300, 40, 16, 26, 44
    low, high = decades([kl for _, curve in found for _, kl in curve])
    ticks = nice_ticks(max(at for _, curve in found for at, _ in curve), 4)

    def place(at: float, kl: float) -> tuple[float, float]:
        share = (high - math.log10(kl)) / (high - low)
        return left + (WIDTH - left - right) * at / ticks[-1], top + (height - top - bottom) * share

    parts = []
    for d in range(low, high + 1):
        _, y = place(0, 10.0**d)
        parts.append(line(left, y, WIDTH - right, y, "grid") + text(left - 6, y + 4, power(d), "tick", "end"))
    for t in ticks:
        x, _ = place(t, 10.0**low)
        parts.append(text(x, height - bottom + 17, f"{t:,g}", "tick", "middle"))
    parts.append(text(WIDTH - right, height - 6, "position in the context, tokens", "axis", "end"))
    parts.append(text(2, 12, "mean KL to the reference, nats", "axis"))
    ends = []
    for row, curve in found:
        points = [place(at, kl) for at, kl in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="curve {_stroke(row)}"/>')
        parts.append(mark(*points[-1], _shape(row), _class(row)))
        ends.append(points[-1])
    parts += labels(ends, [str(r["name"]) for r, _ in found], left + 4)
    return drawing(height, "Mean KL divergence along the context", parts)


def _curve(row: Row) -> list[tuple[float, float]]:
    """The middles of the curve's pieces and their mean KL, where it has a logarithm."""
    pieces = row.get("curve") or ()
    return [((p["from"] + p["to"]) / 2, p["mean_kl_nats"]) for p in pieces if p["mean_kl_nats"] > 0]


def _points(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if _positive(r, "bytes") and _positive(r, "mean_kl_nats")]


def _kl_interval(row: Row) -> tuple[float, float]:
    """95 % interval of the mean KL, kept above zero for the logarithm."""
    mean = float(row["mean_kl_nats"])
    half = _Z95 * float(row.get("mean_kl_se_nats") or 0.0)
    return max(mean - half, mean / 10), mean + half


def _interval(row: Row, key: str) -> tuple[float, float] | None:
    found = (row.get("interval") or {}).get(key) or (row.get("spread") or {}).get(key)
    return (float(found[0]), float(found[1])) if found and found[1] > found[0] else None


def _digits(value: float) -> int:
    """Decimals that a figure of this size bears."""
    return 0 if value >= 100 else 1 if value >= 10 else 2


def _class(row: Row) -> str:
    """The CSS class that colours a row; what is not ours is hatched whatever it is."""
    if row.get("ours") is False:
        return "published"
    return f"is-{row['format']}" if row.get("format") in ("gguf", "onnx", "pte", "torch") else "is-other"


def _stroke(row: Row) -> str:
    return _class(row).replace("is-", "line-")


def _shape(row: Row) -> str:
    return _SHAPES.get(str(row.get("format")), "diamond")


def _positive(row: Row, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
