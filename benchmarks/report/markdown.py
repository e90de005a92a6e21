"""The report as Markdown, fit for a README or an issue: advice, tables, projections, conditions.

Knows how Markdown is written, and that a name in a table may hold anything: what could end a cell, begin a
tag or make a link is escaped. Knows no more of the figures than figures.py says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.markdown import markdown
from benchmarks.common.table import Column, rate
from benchmarks.report.figures import COLUMNS, HEADINGS, baseline_note, condition_facts, interval_text, shown

Row = Mapping[str, Any]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!@&])")


def report_markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    blocks = [
        f"# {_e(title(report))}",
        _advice(report),
        _table(report),
        _failures(report["rows"]),
        _e(baseline_note(report["baseline"])) + ".",
        _accuracy(report["rows"]),
        _projections(report),
        _conditions(report),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """What the report is of."""
    return f"{report.get('checkpoint') or 'Artifacts'}, exported and measured"


def _advice(report: Mapping[str, Any]) -> str:
    advice = report.get("advice") or ()
    lines = [f"- **{_e(a['profile'])}**: {_e(a['sentence'])}" for a in advice]
    return "\n".join(["## What to ship", "", *lines]) if lines else ""


def _table(report: Mapping[str, Any]) -> str:
    """Every figure, the interval behind it; the published row last, in italics."""
    head = [HEADINGS.get(c.heading, c.heading) for c in COLUMNS]
    rows = [[_cell(c, r) for c in COLUMNS] for r in shown(report["rows"]) if not r.get("error")]
    base = {**report["baseline"], "bits_per_weight": 16, "baseline_speed": 1.0}
    name = ("not ours: " if base.get("ours") is False else "baseline: ") + str(base.get("name"))
    over = "over " if base.get("decode_is_at_least") else ""
    cells = [f"{over if c.key == 'decode_tokens_per_s' else ''}{c.cell(base)}" for c in COLUMNS[1:]]
    rows.append([f"*{_e(cell)}*" if cell != "–" else "" for cell in [name, *cells]])
    return "## Figures\n\n" + markdown(head, rows)


def _cell(column: Column, row: Row) -> str:
    text, between = column.cell(row), interval_text(column, row)
    return _e(f"{text} ({between})" if between else text)


def _failures(rows: Sequence[Row]) -> str:
    return "\n".join(f"- **{_e(r['name'])}** failed: {_e(r['error'])}" for r in rows if r.get("error"))


def _accuracy(rows: Sequence[Row]) -> str:
    """Each task's grades, with what the paired test says."""
    lines = []
    for row in rows:
        for asked in row.get("tasks") or ():
            if asked.get("accuracy_percent") is None:
                lines.append([_e(row["name"]), _e(asked.get("task")), _e(asked.get("error") or "–"), "", ""])
                continue
            between = asked.get("ci95_percent")
            paired = asked.get("paired") or {}
            p = paired.get("p", asked.get("paired_p"))
            verdict = f"{paired['verdict']} (p {p:.2g})" if paired.get("verdict") and p is not None else ""
            lines.append(
                [
                    _e(row["name"]),
                    _e(asked.get("task")),
                    _right(asked),
                    f"{between[0]:.0f} to {between[1]:.0f} %" if between else "",
                    _e(verdict or ("" if p is None else f"p {p:.2g}")),
                ]
            )
    if not lines:
        return ""
    return "## Answers\n\n" + markdown(("model", "task", "right", "95 % interval", "paired"), lines)


def _right(asked: Row) -> str:
    if asked.get("n") and asked.get("correct") is not None:
        return f"{asked['correct']:,} of {asked['n']:,}"
    return f"{asked['accuracy_percent']:.1f} %"


def _projections(report: Mapping[str, Any]) -> str:
    """Computed speeds, in a table of their own: none of them was measured."""
    profiles = [str(p["name"]) for p in report.get("profiles") or ()]
    rows = []
    for row in report["rows"]:
        speeds = {p["profile"]: p.get("decode_tokens_per_s") for p in row.get("projections") or ()}
        if any(speeds.get(p) for p in profiles):
            rows.append([_e(row["name"]), *(rate(v) if (v := speeds.get(p)) else "" for p in profiles)])
    if not rows:
        return ""
    return (
        "## Projected, not measured\n\nTokens per second that a device's published bandwidth allows at the "
        "share of the ceiling that was reached here.\n\n" + markdown(["model", *map(_e, profiles)], rows)
    )


def _conditions(report: Mapping[str, Any]) -> str:
    lines = [f"- {heading}: {_e(said)}" for heading, said in condition_facts(report).items()]
    lines.append(f"- Created: {_e(report['created'])}")
    commands = list(report.get("commands") or ()) or [report.get("command") or ""]
    shell = "\n".join(filter(None, commands))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shell)), default=0))
    block = [f"{fence}\n{shell}\n{fence}"] if shell else []
    return "\n\n".join(["## Conditions", "\n".join(lines), *block])


def _e(value: object) -> str:
    """Text that stays text: on one line, and nothing in it is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))
