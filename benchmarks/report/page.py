"""The report as one HTML page: what to ship first, then the figures, the plots, and how it was measured.

Knows elements and class names. The page stands alone: style and drawings are in it, nothing is asked from
outside (its content policy forbids it), nothing runs. Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.common.table import Column
from benchmarks.report.advice import need
from benchmarks.report.figures import (
    COLUMNS,
    HEADINGS,
    baseline_note,
    condition_facts,
    interval_text,
    one_each,
    shown,
)
from benchmarks.report.findings import findings
from benchmarks.report.plots import (
    accuracy_plot,
    caps,
    ceiling_plot,
    curve_plot,
    front_plot,
    latency_plot,
    memory_plot,
    projection_plot,
)
from benchmarks.report.style import CSS

Row = Mapping[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def report_html(report: Mapping[str, Any]) -> str:
    """The whole page, self-contained."""
    heading = f"{report.get('checkpoint') or 'Artifacts'}, exported and measured"
    body = [
        _header(report, heading),
        _advice(report),
        "".join(f"<p class='finding'>{_e(line)}</p>" for line in findings(report["rows"])),
        _table(report),
        _plots(report),
        _devices(report),
        _answers(report),
        _conditions(report),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\">"
        f"<link rel='icon' href='data:,'><title>fox-edge: {_e(heading)}</title>"
        f"<style>{CSS}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _header(report: Mapping[str, Any], heading: str) -> str:
    machine, conditions = report["machine"], report.get("conditions") or {}
    created = str(report["created"]).replace("T", " ").replace("+00:00", " UTC")
    lines = [
        f"<header><p class='kicker'>fox-edge</p><h1>{_e(heading)}</h1>",
        f"<p class='sub'>{_e(machine.get('cpu'))}, {_e(machine.get('cores'))} cores · {_e(created)}</p>",
    ]
    if conditions.get("noisy"):
        percent = conditions.get("noise_percent")
        by = f" Equal pieces of work took times {percent:.0f} % apart." if percent is not None else ""
        lines.append(
            f"<p class='warning'>This machine was noisy while it measured.{by} Artifacts that cannot be told "
            "apart share a rank.</p>"
        )
    return "".join([*lines, "</header>"])


def _advice(report: Mapping[str, Any]) -> str:
    """A card per device: the artifact to ship, and the sentence that says why."""
    profiles = {p["name"]: p for p in report.get("profiles") or ()}
    formats = {r["artifact"]: r for r in one_each(report["rows"])}
    cards = []
    for said in report.get("advice") or ():
        profile, row = profiles.get(said["profile"], {}), formats.get(said.get("artifact"), {})
        kind = f"is-{row['format']}" if row.get("format") in ("gguf", "onnx", "pte") else "is-other"
        name = said.get("name") or "none"
        cards.append(
            f"<article class='card {kind if said.get('artifact') else 'none'}'>"
            f"<p class='device'>{_e(_device(said['profile']))}<span>{_e(_offer(profile))}</span></p>"
            f"<p class='stands'>{_e(profile.get('device') or '')}</p>"
            f"<h3>{_e(name)}</h3><p class='why'>{_e(said['sentence'])}</p></article>"
        )
    return (
        f"<section><h2>What to ship</h2><div class='cards'>{''.join(cards)}</div></section>" if cards else ""
    )


def _device(profile: str) -> str:
    return "this machine" if profile == "this" else profile


def _offer(profile: Row) -> str:
    """What a device gives a model."""
    parts = []
    if profile.get("memory_bytes"):
        parts.append(f"{profile['memory_bytes'] / 1e6:,.0f} MB")
    if profile.get("threads"):
        parts.append(f"{profile['threads']} threads")
    if profile.get("context"):
        parts.append(f"context {profile['context']:,}")
    return ", ".join(parts)


# --- the table -------------------------------------------------------------------------------------------


def _table(report: Mapping[str, Any]) -> str:
    head = "".join(f"<th scope='col'>{_e(HEADINGS.get(c.heading, c.heading))}</th>" for c in COLUMNS)
    lines = [_table_row(row) for row in shown(report["rows"])]
    published = report["baseline"]
    lines.append(_table_row({**published, "bits_per_weight": 16, "baseline_speed": 1.0}))
    note = baseline_note(published)
    context = ""
    if published.get("ours") is False:
        context = (
            " It is the published row of another machine and the full-sized model: context for the others, "
            "not a race with them."
        )
    shared = " “=”: ranks that this run cannot tell apart." if _any_shared(report["rows"]) else ""
    return (
        "<section><h2>Every figure</h2><div class='scroll' tabindex='0' role='region' "
        f"aria-label='Every figure'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f"<p class='note'>Small: 95 % intervals (older results: the extremes of the runs).{shared}</p>"
        f"<p class='note'>{_e(note[0].upper() + note[1:])}.{context}</p></section>"
    )


def _any_shared(rows: Sequence[Row]) -> bool:
    return any(row.get("rank_shared_with") for row in rows)


def _table_row(row: Row) -> str:
    name = _e(row.get("name")) + ("<span class='badge'>not ours</span>" if row.get("ours") is False else "")
    if row.get("error"):
        return (
            f"<tr class='failed'><th scope='row'>{name}</th>"
            f"<td colspan='{len(COLUMNS) - 1}'><p>{_e(row['error'])}</p></td></tr>"
        )
    cells = "".join(f"<td>{_cell(column, row)}</td>" for column in COLUMNS[1:])
    kind = "published" if row.get("ours") is False else ""
    return f"<tr class='{kind}'><th scope='row'>{name}</th>{cells}</tr>"


# Figures whose interval is in the tooltip alone, so that the table fits a desktop.
_QUIET = ("load_s", "time_to_first_token_s", "peak_rss_bytes")


def _cell(column: Column, row: Row) -> str:
    """A figure with its interval below; what else a reader may want to know is in its tooltip."""
    text = column.cell(row)
    if column.key == "decode_tokens_per_s" and row.get("decode_is_at_least"):
        text = f"over {text}"
    between, title = interval_text(column, row), _tooltip(column, row)
    if column.key in _QUIET:
        title, between = title or between, ""
    small = f"<small>{_e(between)}</small>" if between else ""
    return (f"<span title='{_e(title)}'>{_e(text)}</span>" if title else _e(text)) + small


def _tooltip(column: Column, row: Row) -> str:
    if column.key == "peak_rss_bytes" and row.get("memory_is"):
        return str(row["memory_is"])
    if column.key == "rank_said" and row.get("rank_shared_with"):
        return f"not told apart from {', '.join(row['rank_shared_with'])}"
    if column.key == "accuracy_percent" and row.get("n") and row.get("correct") is not None:
        return f"{row['correct']} of {row['n']}"
    return ""


# --- plots -----------------------------------------------------------------------------------------------


def _plots(report: Mapping[str, Any]) -> str:
    rows, published, profiles = report["rows"], report["baseline"], report.get("profiles") or ()
    tasks = list(dict.fromkeys(t["task"] for r in rows for t in r.get("tasks") or () if t.get("task")))
    each = one_each(rows)
    figures = [
        ("Quality for size", front_plot(each), _FRONT),
        ("Speed against the ceiling", ceiling_plot([*rows, published]), _CEILING),
        ("Memory while running", memory_plot(rows, profiles), _MEMORY + _far_caps(rows, profiles)),
        ("Time per token", latency_plot(rows), _LATENCY),
        *((f"Answers right: {task}", accuracy_plot(each, task), _ACCURACY) for task in tasks),
        ("Divergence along the context", curve_plot(each), _CURVE),
    ]
    drawn = "".join(_figure(*figure) for figure in figures if figure[1])
    return f"<section><h2>The figures drawn</h2><div class='plots'>{drawn}</div></section>" if drawn else ""


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<figure><h3>{_e(title)}</h3>{svg}<figcaption>{_e(caption)}</figcaption></figure>"


_FRONT = (
    "What a byte buys. Lower is closer to the float32 reference, further left is smaller. On the line: "
    "nothing here is smaller and closer at once; in the shade: something is. Strokes: 95 % intervals."
)
_CEILING = (
    "Decode speed over what reading all weights and the KV cache once per token allows at this machine's "
    "measured bandwidth (a cache's, where the model fits one). Strokes: 95 % intervals. Hatched: the "
    "published row against its own machine's bandwidth."
)
_MEMORY = (
    "Resident memory after decoding: solid is the process's own, light are pages of files, which the "
    "system may take back. Libraries are counted in."
)
_LATENCY = (
    "The mark is the median token; the line runs to the 95th and, thinner, to the 99th percentile: what a "
    "reader feels as a stutter."
)
_ACCURACY = (
    "Strokes: 95 % intervals of the share. The words are the paired test's, on the same questions, against "
    "the reference (dashed)."
)
_CURVE = "Mean KL at the places of the context, from its beginning to its end."


def _far_caps(rows: Sequence[Row], profiles: Sequence[Row]) -> str:
    """The caps that lie beyond the drawing, in words."""
    _, far = caps(rows, profiles)
    if not far:
        return ""
    said = ", ".join(f"{p['name']} {p['memory_bytes'] / 1e6:,.0f} MB" for p in far)
    return f" Caps far beyond the right edge: {said}."


def _devices(report: Mapping[str, Any]) -> str:
    """What every artifact needs and would do on every device: reckoned, and kept apart from measurements."""
    rows, profiles = one_each(report["rows"]), report.get("profiles") or ()
    fits = _fit_table(report)
    drawn = []
    for profile in profiles:
        svg = projection_plot(rows, profile["name"])
        rate = profile.get("bandwidth_bytes_per_s")
        width = f"{rate / 1e9:,.0f} GB/s" if rate else "its bandwidth"
        caption = f"Computed from {width}. {profile.get('source') or ''}".strip()
        if svg:
            drawn.append(_figure(f"{profile['name']}, decode, tok/s", svg, caption))
    projected = ""
    if drawn:
        projected = (
            "<h2>Projected, not measured</h2><p class='note'>What each device's published bandwidth allows "
            "at the share of the ceiling reached here. No such device was at hand: nothing hatched is "
            f"a measurement.</p><div class='plots'>{''.join(drawn)}</div>"
        )
    return f"<section>{fits}{projected}</section>" if fits or projected else ""


def _fit_table(report: Mapping[str, Any]) -> str:
    """Megabytes that each artifact needs at each profile's context, and whether they are there."""
    profiles = [p for p in report.get("profiles") or () if p.get("memory_bytes")]
    lines = []
    for row in one_each(report["rows"]):
        cells = []
        for profile in profiles:
            needed = need(row, profile, report["settings"]).bytes
            if needed is None:
                cells.append("<td>–</td>")
                continue
            over = needed - profile["memory_bytes"]
            word = f"{over / 1e6:,.0f} MB too much" if over > 0 else "fits"
            kind = "over" if over > 0 else "fits"
            cells.append(f"<td class='{kind}'>{needed / 1e6:,.0f}<small>{word}</small></td>")
        lines.append(f"<tr><th scope='row'>{_e(row.get('name'))}</th>{''.join(cells)}</tr>")
    if not profiles or all("<td class" not in line for line in lines):
        return ""
    head = "".join(
        f"<th scope='col'>{_e(_device(p['name']))}<small>of {p['memory_bytes'] / 1e6:,.0f} MB</small></th>"
        for p in profiles
    )
    return (
        "<h2>Does it fit?</h2><div class='scroll' tabindex='0' role='region' aria-label='Does it fit?'>"
        f"<table class='fit'><thead><tr><th scope='col'>needs, MB</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div><p class='note'>At each profile's context: what was "
        "measured here, or reckoned for that context where that is more.</p>"
    )


# --- answers and conditions ------------------------------------------------------------------------------


def _answers(report: Mapping[str, Any]) -> str:
    answers = [(row["name"], row["answer"]) for row in report["rows"] if row.get("answer")]
    if not answers or not report.get("question"):
        return ""
    said = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(text)}</dd></div>" for name, text in answers)
    return (
        f"<section><h2>The same question to each</h2><blockquote>{_e(report['question'])}</blockquote>"
        f"<dl class='answers'>{said}</dl></section>"
    )


def _conditions(report: Mapping[str, Any]) -> str:
    """Machine, versions, settings and commands: where the figures come from."""
    lines = "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in condition_facts(report).items())
    commands = list(report.get("commands") or ()) or [report.get("command") or ""]
    shell = "\n".join(filter(None, commands))
    block = f"<h3>Commands</h3><pre tabindex='0'>{_e(shell)}</pre>" if shell else ""
    return f"<section><h2>How it was measured</h2><dl class='facts'>{lines}</dl>{block}</section>"


def _e(value: object) -> str:
    return escape(str(value), quote=True)
