"""The report: one record of everything found, as report.json, a table for the terminal, and one HTML page.

The record (`schema` 1):

    schema, created (ISO 8601, UTC), checkpoint, machine {cpu cores memory_bytes os python versions},
    settings {prompt_tokens decode_tokens repeats threads context}, bandwidth [{buffer_bytes bytes_per_s
    method}], baseline (baseline.py's row), commands [str], question (str or null),
    rows [{name artifact format runtime quant bytes bits_per_weight load_s time_to_first_token_s
           prompt_tokens_per_s decode_tokens_per_s peak_rss_bytes anonymous_rss_bytes file_rss_bytes
           bytes_per_token roofline_percent spread mean_kl_nats p99_kl_nats top1_agreement_percent
           accuracy_percent ci95_percent correct n paired_p answer error}]

Any figure of a row may be missing or null: it shows as a dash. Knows how to join and to show; measures
nothing. Everything that goes into the page is escaped, and the page asks nothing from outside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.page import CSS
from benchmarks.plots import memory_plot, quality_plot, share_plot
from benchmarks.table import Column, render
from fox_edge.errors import FoxEdgeError

SCHEMA = 1
_FIDELITY = ("mean_kl_nats", "p99_kl_nats", "top1_agreement_percent")
_ACCURACY = ("accuracy_percent", "ci95_percent", "correct", "n", "paired_p")

COLUMNS = (
    Column("model", "name"),
    Column("MB", "bytes", "{:,.1f}", 1e-6),
    Column("bits/w", "bits_per_weight", "{:.2f}"),
    Column("load s", "load_s", "{:.2f}"),
    Column("first ms", "time_to_first_token_s", "{:,.0f}", 1e3),
    Column("prompt/s", "prompt_tokens_per_s", "{:,.0f}"),
    Column("decode/s", "decode_tokens_per_s", "{:,.0f}"),
    Column("peak MB", "peak_rss_bytes", "{:,.0f}", 1e-6),
    Column("mean KL", "mean_kl_nats", "{:.2g}"),
    Column("top-1 %", "top1_agreement_percent", "{:.1f}"),
    Column("right %", "accuracy_percent", "{:.0f}"),
)
_HEADINGS = {
    "MB": "size, MB",
    "bits/w": "bits per weight",
    "load s": "load, s",
    "first ms": "first token, ms",
    "prompt/s": "prompt, tok/s",
    "decode/s": "decode, tok/s",
    "peak MB": "peak memory, MB",
    "mean KL": "mean KL, nats",
    "top-1 %": "top-1 agreement, %",
    "right %": "answers right, %",
}


def make_report(
    bench: Mapping[str, Any],
    *,
    checkpoint: str,
    names: Mapping[str, str] | None = None,
    fidelity: Mapping[str, Mapping[str, Any]] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    answers: Mapping[str, str] | None = None,
    question: str | None = None,
    commands: Sequence[str] = (),
) -> dict[str, Any]:
    """Join what was found of each artifact, by the name that `bench` has it under.

    `names` are for showing; `fidelity` holds `Fidelity.to_json`s or verification reports, `evaluation` is
    evaluate's result, `answers` what each artifact said to `question`.
    """
    accuracy = {r["artifact"]: r for r in (evaluation or {}).get("results", ())}
    rows = []
    for result in bench["results"]:
        key = result["artifact"]
        found, graded = (fidelity or {}).get(key, {}), accuracy.get(key, {})
        row = {"name": (names or {}).get(key, key), **result}
        row |= {k: found[k] for k in _FIDELITY if k in found}
        row |= {k: graded[k] for k in _ACCURACY if k in graded}
        rows.append({**row, "answer": (answers or {}).get(key)})
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": checkpoint,
        **{key: bench[key] for key in ("machine", "settings", "bandwidth", "baseline")},
        "task": (evaluation or {}).get("task"),
        "rows": rows,
        "question": question,
        "commands": list(commands),
    }


def write_report(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into a folder; raises FoxEdgeError when it cannot be written."""
    data, page = folder / "report.json", folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page.write_text(report_html(report), encoding="utf-8")
    except OSError as error:
        raise FoxEdgeError(f"{folder}: the report cannot be written ({error.strerror})") from None
    return data, page


def report_text(report: Mapping[str, Any]) -> str:
    """The table for a terminal, at most 120 columns wide, the published row last and marked."""
    lines = [render(COLUMNS, [*report["rows"], {**report["baseline"], "name": "not ours: H100, BF16"}])]
    lines += [f"{row['name']}: {row['error']}" for row in report["rows"] if row.get("error")]
    return "\n".join([*lines, _baseline_note(report["baseline"])])


def _baseline_note(row: Mapping[str, Any]) -> str:
    memory = f"{row['peak_rss_bytes'] / 1e6:,.0f} MB of {row['memory_is']}"
    return (
        f"not ours: {row['model']} on {row['hardware']} with {row['runtime']}, over "
        f"{row['decode_tokens_per_s']} tok/s per user in {memory}; {row['source']}"
    )


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures say, in a few sentences, each artifact beside the PyTorch reference."""
    reference = next((r for r in rows if r.get("format") == "torch" and not r.get("error")), None)
    exports = [r for r in rows if r.get("format") != "torch" and not r.get("error")]
    if reference is None or not exports:
        return []
    smallest = min(exports, key=lambda r: r["bytes"])
    fastest = max(exports, key=lambda r: r.get("decode_tokens_per_s") or 0)
    said = [
        f"Smallest: {smallest['name']}, {100 * smallest['bytes'] / reference['bytes']:.0f} % "
        "of the BF16 checkpoint's bytes."
    ]
    if fastest.get("decode_tokens_per_s") and reference.get("decode_tokens_per_s"):
        ratio = fastest["decode_tokens_per_s"] / reference["decode_tokens_per_s"]
        said.append(f"Fastest at decoding: {fastest['name']}, {ratio:.1f} times the BF16 PyTorch model.")
    closest = [r for r in exports if r.get("mean_kl_nats") is not None]
    if closest:
        best = min(closest, key=lambda r: r["mean_kl_nats"])
        said.append(
            f"Closest to the reference: {best['name']}, mean KL {best['mean_kl_nats']:.2g} nats, the same "
            f"first choice at {best['top1_agreement_percent']:.1f} % of the positions."
        )
    return said


# --- the page ----------------------------------------------------------------------------------------------


def report_html(report: Mapping[str, Any]) -> str:
    """The whole page, self-contained."""
    rows, published = report["rows"], report["baseline"]
    note = _baseline_note(published)
    body = [
        f"<header><p class='kicker'>fox-edge</p><h1>{_e(report['checkpoint'])}, exported and measured</h1>",
        f"<p class='sub'>{_e(report['machine']['cpu'])}, {report['machine']['cores']} cores · "
        f"{_e(report['created'].replace('T', ' ').replace('+00:00', ' UTC'))}</p></header>",
        "".join(f"<p class='finding'>{_e(line)}</p>" for line in findings(rows)),
        _table(rows, published),
        f"<p class='note'>{_e(note[0].upper() + note[1:])}. It is the published row of another machine "
        "and the full-sized model: context for the others, not a race with them.</p>",
        _plots(rows, published),
        _answers(report),
        _conditions(report),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<link rel='icon' href='data:,'><title>fox-edge: {_e(report['checkpoint'])}</title>"
        f"<style>{CSS}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]], published: Mapping[str, Any]) -> str:
    head = "".join(f"<th scope='col'>{_e(_HEADINGS.get(c.heading, c.heading))}</th>" for c in COLUMNS)
    lines = [_table_row(row) for row in rows]
    lines.append(_table_row({**published, "bits_per_weight": 16}))
    return (
        f"<div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _table_row(row: Mapping[str, Any]) -> str:
    name = _e(row["name"]) + ("<span class='badge'>not ours</span>" if row.get("ours") is False else "")
    if row.get("error"):
        return (
            f"<tr class='failed'><th scope='row'>{name}</th>"
            f"<td colspan='{len(COLUMNS) - 1}'>{_e(row['error'])}</td></tr>"
        )
    cells = "".join(f"<td>{_cell(column, row)}</td>" for column in COLUMNS[1:])
    kind = "published" if row.get("ours") is False else ""
    return f"<tr class='{kind}'><th scope='row'>{name}</th>{cells}</tr>"


def _cell(column: Column, row: Mapping[str, Any]) -> str:
    """A figure, with what a reader may want to know of it in its tooltip."""
    text = column.cell(row)
    if column.key == "decode_tokens_per_s" and row.get("decode_is_at_least"):
        text = f"over {text}"
    spread = (row.get("spread") or {}).get(column.key)
    title = row["memory_is"] if column.key == "peak_rss_bytes" and row.get("memory_is") else ""
    if spread:
        low, high = (column.cell({column.key: value}) for value in spread)
        title = f"{low} to {high} over the runs"
    if column.key == "accuracy_percent" and row.get("n"):
        title = f"{row['correct']} of {row['n']}"
        if row.get("ci95_percent"):
            title += "; 95 % interval {:.0f} to {:.0f} %".format(*row["ci95_percent"])
    return f"<span title='{_e(title)}'>{_e(text)}</span>" if title else _e(text)


def _plots(rows: Sequence[Mapping[str, Any]], published: Mapping[str, Any]) -> str:
    figures = (
        (
            "Quality for size",
            quality_plot(rows),
            "What a byte buys. Lower is closer to the float32 reference, further left is smaller.",
        ),
        (
            "Speed against the ceiling",
            share_plot([*rows, published]),
            "Decode speed over what reading all weights once per token allows at this machine's measured "
            "bandwidth (a cache's, where the model fits one). Small models are held up by the work around "
            "the arithmetic. Hatched: the published row against the H100's 3.35 TB/s, one of several users.",
        ),
        (
            "Memory while running",
            memory_plot(rows),
            "Resident memory after decoding: solid is the process's own, light are pages of files, which "
            "the system may take back. Libraries are counted in.",
        ),
    )
    shown = [
        f"<figure><h3>{_e(title)}</h3>{svg}<figcaption>{_e(text)}</figcaption></figure>"
        for title, svg, text in figures
        if svg
    ]
    return f"<section class='plots'>{''.join(shown)}</section>" if shown else ""


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
    described, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in described["versions"].items())
    bandwidth = "; ".join(
        f"{b['bytes_per_s'] / 1e9:,.0f} GB/s from {b['buffer_bytes'] >> 20:,} MiB ({b['method']})"
        for b in report["bandwidth"]
    )
    facts = {
        "Machine": f"{described['cpu']}, {described['cores']} cores, "
        f"{described['memory_bytes'] / 1e9:,.0f} GB, {described['os']}",
        "Read bandwidth": bandwidth,
        "Runs": f"medians of {settings['repeats']} fresh processes each, prompts of "
        f"{settings['prompt_tokens']} tokens, {settings['decode_tokens']} decoded",
        "Versions": f"Python {described['python']}, {versions}",
    }
    if report.get("task"):
        facts["Answers right"] = f"{report['task']}, greedy"
    lines = "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in facts.items())
    commands = _e("\n".join(report.get("commands") or ()))
    shown = f"<h3>Commands</h3><pre>{commands}</pre>" if commands else ""
    return f"<section><h2>How it was measured</h2><dl class='facts'>{lines}</dl>{shown}</section>"


def _e(value: object) -> str:
    return escape(str(value), quote=True)
