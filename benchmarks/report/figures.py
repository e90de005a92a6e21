"""How the figures of a report are said: columns, intervals, the published row, the conditions, in words.

What the terminal, the Markdown and the page have in common. Knows rows and units; no markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from benchmarks.common.table import Column, rate
from benchmarks.devices.card import card_text
from benchmarks.latency.conditions_text import noise_text, surroundings

Row = Mapping[str, Any]

_Z95 = 1.959963984540054

COLUMNS = (
    Column("model", "name"),
    Column("MB", "bytes", "{:,.1f}", 1e-6),
    Column("bits/w", "bits_per_weight", "{:.2f}"),
    Column("load s", "load_s", "{:.2f}"),
    Column("first ms", "time_to_first_token_s", "{:,.0f}", 1e3),
    Column("prompt/s", "prompt_tokens_per_s", "{:,.0f}"),
    Column("decode/s", "decode_tokens_per_s", "{:,.1f}"),
    Column("rank", "rank_said"),
    Column("% of ceiling", "roofline_percent", "{:.1f}"),
    Column("x H100", "baseline_speed", "{:.2f}"),
    Column("peak MB", "peak_rss_bytes", "{:,.0f}", 1e-6),
    Column("mean KL", "mean_kl_nats", "{:.2g}"),
    Column("top-1 %", "top1_agreement_percent", "{:.1f}"),
    Column("right %", "accuracy_percent", "{:.0f}"),
)
HEADINGS = {
    "MB": "size, MB",
    "bits/w": "bits per weight",
    "load s": "load, s",
    "first ms": "first token, ms",
    "prompt/s": "prompt, tok/s",
    "decode/s": "decode, tok/s",
    "rank": "rank by decode",
    "% of ceiling": "share of ceiling, %",
    "x H100": "decode, × baseline",
    "peak MB": "peak memory, MB",
    "mean KL": "mean KL, nats",
    "top-1 %": "top-1 agreement, %",
    "right %": "answers right, %",
}
# What a terminal of 120 columns has no room for beside the names.
_WIDE_ONLY = ("rank", "% of ceiling", "x H100")
TERMINAL_COLUMNS = tuple(c for c in COLUMNS if c.heading not in _WIDE_ONLY)


def short_names(artifacts: Sequence[str]) -> dict[str, str]:
    """Each artifact's name to show: as many of its path's last parts as tell it from the others."""
    if len(set(artifacts)) < len(artifacts):
        artifacts = list(dict.fromkeys(artifacts))
    parts = {a: ((a,) if a.startswith("torch:") else PurePath(a).parts or (a,)) for a in artifacts}
    names = {}
    for artifact, own in parts.items():
        others = [p for a, p in parts.items() if a != artifact]
        count = next((n for n in range(1, len(own)) if all(p[-n:] != own[-n:] for p in others)), len(own))
        names[artifact] = "/".join(own[-count:]) if count < len(own) or len(own) == 1 else artifact
    return names


def one_each(rows: Iterable[Row]) -> list[Row]:
    """One row per artifact, the one with the fewest users: what an artifact is does not depend on them."""
    found: dict[str, Row] = {}
    for row in rows:
        key = row.get("artifact") or row.get("name") or ""
        if key not in found or (row.get("users") or 1) < (found[key].get("users") or 1):
            found[key] = row
    return list(found.values())


def interval_of(row: Row, key: str) -> tuple[float, float] | None:
    """What a figure may be: its 95 % interval; older results: the extremes of its rounds."""
    if key == "mean_kl_nats":
        return _around(row, key, "mean_kl_se_nats")
    if key == "top1_agreement_percent":
        found = _around(row, key, "top1_se_percent")
        return found and (found[0], min(100.0, found[1]))
    if key == "accuracy_percent":
        found = row.get("ci95_percent")
    else:
        found = (row.get("interval") or {}).get(key) or (row.get("spread") or {}).get(key)
    return (float(found[0]), float(found[1])) if found else None


def _around(row: Row, key: str, error: str) -> tuple[float, float] | None:
    mean, se = row.get(key), row.get(error)
    return None if mean is None or se is None else (max(0.0, mean - _Z95 * se), mean + _Z95 * se)


def interval_text(column: Column, row: Row) -> str:
    """'30.1 to 33.4', or '' where there is nothing between."""
    found = interval_of(row, column.key)
    if row.get(column.key) is None or not found or found[0] == found[1]:
        return ""
    low, high = (column.cell({column.key: value}) for value in found)
    return f"{low} to {high}" if low != high else ""


def shown(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with what the columns say of them in words."""
    return [{**row, "rank_said": rank_text(row), "baseline_speed": _times(row)} for row in rows]


def rank_text(row: Row) -> str | None:
    """'2', or '2 =' where other artifacts cannot be told from it."""
    if row.get("rank") is None:
        return None
    return f"{row['rank']:.0f}" + (" =" if row.get("rank_shared_with") else "")


def _times(row: Row) -> float | None:
    value = (row.get("baseline_ratio") or {}).get("decode_tokens_per_s")
    return None if value is None else float(value)


def baseline_note(row: Row) -> str:
    """Who measured the baseline, on what: it is another machine's figure."""
    memory = row.get("peak_rss_bytes")
    held = f" in {memory / 1e6:,.0f} MB of {row.get('memory_is') or 'memory'}" if memory else ""
    over = "over " if row.get("decode_is_at_least") else ""
    decode = row.get("decode_tokens_per_s")
    speed = f", {over}{rate(decode)} tok/s per user" if decode else ""
    who = "not ours: " if row.get("ours") is False else "baseline: "
    where = " on ".join(str(row[k]) for k in ("model", "hardware") if row.get(k)) or row.get("name") or "?"
    runtime = f" with {row['runtime']}" if row.get("runtime") else ""
    return f"{who}{where}{runtime}{speed}{held}; {row.get('source') or 'no source given'}"


def condition_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """Machine, settings, versions and surroundings of the run, each under its heading."""
    machine, settings = report["machine"], report["settings"]
    conditions = report.get("conditions") or {}
    facts = {
        "Machine": f"{machine.get('cpu')}, {machine.get('cores')} cores, "
        f"{(machine.get('memory_bytes') or 0) / 1e9:,.0f} GB, {machine.get('os')}",
        "Read bandwidth": "; ".join(
            f"{b['bytes_per_s'] / 1e9:,.0f} GB/s from {b['buffer_bytes'] / (1 << 20):,.0f} MiB{_on_card(b)}"
            f" ({b.get('method')})"
            for b in report.get("bandwidth") or ()
        ),
        "Arithmetic": "; ".join(
            f"{c['operations_per_s'] / 1e9:,.0f} billion {c['type']} operations/s{_on_card(c)} "
            f"({c.get('method')})"
            for c in report.get("compute") or ()
        ),
        "Runs": _runs(settings),
        "Surroundings": ", ".join(surroundings(conditions)),
        "Card": card_text(conditions["card"]) if conditions.get("card") else "",
        "Noise": noise_text(conditions),
        "Remarks": " ".join(conditions.get("notes") or ()),
        "Fidelity": _fidelity(report),
        "Answers right": "; ".join(
            f"{t['task']}: {t.get('description') or 'greedy'}, {t.get('n') or '?'} questions"
            for t in report.get("tasks") or ()
        ),
        "Versions": ", ".join(
            [f"Python {machine.get('python')}"]
            + [f"{k} {v}" for k, v in (machine.get("versions") or {}).items()]
        ),
    }
    return {heading: said for heading, said in facts.items() if said}


def _on_card(ceiling: Mapping[str, Any]) -> str:
    return " on the card" if ceiling.get("device") == "cuda" else ""


def _runs(settings: Mapping[str, Any]) -> str:
    workload = f"workload {settings['workload']}: " if settings.get("workload") else ""
    parts = [
        f"{workload}medians of {settings.get('repeats')} fresh processes each, prompts of "
        f"{settings.get('prompt_tokens')} tokens, {settings.get('decode_tokens')} decoded"
    ]
    users = settings.get("users")
    if isinstance(users, list) and users != [1]:
        parts.append(f"{' and '.join(map(str, users))} users at once")
    if settings.get("context"):
        parts.append(f"context {settings['context']:,}")
    if settings.get("page_cache"):
        parts.append(f"page cache {settings['page_cache']}")
    if settings.get("threads"):
        parts.append(f"{settings['threads']} threads")
    if settings.get("profile"):
        parts.append(f"under the caps of {settings['profile']}")
    return ", ".join(parts)


def _fidelity(report: Mapping[str, Any]) -> str:
    text = report.get("text") or {}
    if text:
        tokens, windows = text.get("tokens") or 0, text.get("windows") or 0
        return f"{tokens:,.0f} tokens in {windows:,.0f} windows of {text.get('source') or 'a text'}"
    froms = {row["fidelity_from"] for row in report["rows"] if row.get("fidelity_from")}
    return "; ".join(sorted(froms))
