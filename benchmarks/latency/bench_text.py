"""What `fox-edge bench` says to a person: the table, ranks, ceilings, conditions. Knows a report's keys."""

from __future__ import annotations

from typing import Any

from benchmarks.common.table import Column, render
from benchmarks.devices.card import card_text
from benchmarks.latency.bounds_text import bounds_text
from benchmarks.latency.conditions_text import conditions_text
from benchmarks.latency.intervals import ENOUGH_ROUNDS

COLUMNS = (
    Column("artifact", "artifact"),
    Column("runtime", "runtime"),
    Column("MB", "bytes", "{:,.1f}", 1e-6),
    Column("load s", "load_s", "{:.2f}"),
    Column("first ms", "time_to_first_token_s", "{:,.0f}", 1e3),
    Column("prompt/s", "prompt_tokens_per_s", "{:,.0f}"),
    Column("decode/s", "decode_tokens_per_s", "{:,.1f}"),
    Column("95 %", "decode_interval"),
    Column("p95 ms", "token_p95_s", "{:,.1f}", 1e3),
    Column("of ceiling", "roofline_percent", "{:.1f} %"),
    Column("peak MB", "peak_rss_bytes", "{:,.0f}", 1e-6),
    Column("rank", "rank", "{:d}"),
)
_CARD = Column("card MB", "peak_device_bytes", "{:,.0f}", 1e-6)
_USERS = (Column("users", "users", "{:d}"), Column("all/s", "total_tokens_per_s", "{:,.1f}"))


def bench_text(result: dict[str, Any]) -> str:
    """The report as a table for a person, with intervals and what the figures mean."""
    rows = [_shown(row) for row in result["results"] if "error" not in row]
    several = any(row["users"] > 1 for row in rows)
    columns = (COLUMNS[0], *_USERS, *COLUMNS[1:]) if several else COLUMNS
    if any(row.get("peak_device_bytes") is not None for row in rows):
        columns = (*columns[:-1], _CARD, columns[-1])
    lines = [render(columns, rows)] if rows else []
    lines += [f"{row['artifact']}: {row['error']}" for row in result["results"] if "error" in row]
    lines += [_ceiling(row) for row in rows]
    lines += _ties(rows, result["conditions"])
    lines.append(_what(result))
    lines.append(conditions_text(result["conditions"]))
    if card := result["conditions"].get("card"):
        lines.append(card_text(card))
    lines += bounds_text(result)
    return "\n".join(lines)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    interval = row["interval"].get("decode_tokens_per_s")
    return row | {"decode_interval": interval and f"{interval[0]:,.1f}–{interval[1]:,.1f}"}


def _ceiling(row: dict[str, Any]) -> str:
    low, high = row["spread"]["decode_tokens_per_s"]
    shared = f" ({row['together']} users in one pass)" if row["together"] > 1 else ""
    most = row["ceiling_tokens_per_s"]
    so = "on a card that could not be measured" if most is None else f"so at most {most:,.0f} tok/s"
    return (
        f"{row['artifact']}: {row['bytes_per_token'] / 1e6:,.1f} MB per token{shared}, {so}; "
        f"{low:,.1f} to {high:,.1f} in {row['runs']} runs"
    )


def _ties(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> list[str]:
    """Who shares a rank, once per rank."""
    lines: dict[str, None] = {}
    for row in rows:
        group = sorted([row["artifact"], *row["rank_shared_with"]])
        if len(group) > 1:
            why = f"in {row['runs']} rounds"
            if conditions["noisy"]:
                why += f" on a machine whose speed varies by {conditions['noise_percent']:.0f} %"
            users = f" with {row['users']} users" if row["users"] > 1 else ""
            lines[f"not told apart by decode speed{users} {why}: {', '.join(group)}"] = None
    return list(lines)


def _what(result: dict[str, Any]) -> str:
    settings, described = result["settings"], result["machine"]
    turns = [len(c) for c in settings["conversations"]]
    asked = f"prompts of {settings['prompt_tokens']} tokens"
    if len(turns) > 1:
        asked += f" on average ({len(turns)} of them)"
    if max(turns) > 1:
        asked = f"{max(turns)} turns of {settings['prompt_tokens']} tokens on average"
    line = (
        f"{described['cpu']}, {described['cores']} cores, {described['os']}; "
        f"{settings['workload']}: {asked}, {settings['decode_tokens']} out; "
        f"page cache {settings['page_cache']}; medians of {settings['repeats']} rounds"
    )
    if settings["repeats"] == 1:
        return line + " (one round: no intervals, no ranks)"
    if settings["repeats"] < ENOUGH_ROUNDS:
        return line + f" (95 % intervals take {ENOUGH_ROUNDS}: take these for less)"
    return line
