"""What `fox-edge bench` says of prompts' ceilings, devices, projections, the baseline. Knows report keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common.table import rate
from benchmarks.devices.baseline import baseline_text


def bounds_text(result: Mapping[str, Any]) -> list[str]:
    """Lines for a person, beside the table."""
    rows = result["results"]
    lines = [*_device(result), *_prompts(rows), *_ratios(rows), *_projections(rows)]
    return [*lines, baseline_text(result["baseline"])]


def _device(result: Mapping[str, Any]) -> Iterator[str]:
    """What was taken from a profile."""
    settings = result["settings"]
    name = settings["profile"]
    if name is None:
        return
    profile = next(p for p in result["profiles"] if p["name"] == name)
    yield (
        f"as {name}: {settings['threads']} threads (the device: {profile['threads']}), a context of "
        f"{settings['context']:,}, at most {settings['memory_cap_bytes'] / 1e6:,.0f} MB "
        f"({settings['memory_cap_kept_by']}); {profile['source']}"
    )


def _prompts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row.get("prompt_roofline_percent") is not None:
            yield (
                f"{row['artifact']}: {row['prompt_operations_per_token'] / 1e6:,.1f} million operations per "
                f"token of a prompt, so at most {row['prompt_ceiling_tokens_per_s']:,.0f} tok/s; "
                f"{row['prompt_roofline_percent']:.1f} % reached"
            )


def _ratios(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each measured row over the baseline."""
    for row in rows:
        ratio = row.get("baseline_ratio") or {}
        if ratio.get("decode_tokens_per_s") is not None:
            memory = ratio.get("peak_rss_bytes")
            also = "" if memory is None else f", {rate(memory)} x its memory"
            yield f"{row['artifact']}: {rate(ratio['decode_tokens_per_s'])} x the baseline's speed{also}"


def _projections(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        speeds = [
            f"{rate(p['decode_tokens_per_s'])} tok/s on {p['profile']}"
            for p in row.get("projections") or ()
            if p["decode_tokens_per_s"] is not None
        ]
        misfits = [p["profile"] for p in row.get("projections") or () if p["fits"] is False]
        said = [*speeds, *(["does not fit " + ", ".join(misfits)] if misfits else [])]
        if said:
            yield f"{row['artifact']}, computed, not measured: {'; '.join(said)}"
