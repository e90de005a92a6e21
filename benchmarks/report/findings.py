"""What the figures say at a glance: the smallest, the fastest, the closest, each beside the reference.

Calls no winner that the intervals do not: who cannot be told apart is named together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.figures import interval_of, one_each

Row = Mapping[str, Any]


def findings(rows: Sequence[Row]) -> list[str]:
    """A few sentences, each export beside the PyTorch reference; none without such a reference."""
    reference = next((r for r in one_each(rows) if r.get("format") == "torch" and not r.get("error")), None)
    measured = [r for r in rows if r.get("device") != "cuda" and not r.get("error")]
    exports = [r for r in one_each(measured) if r.get("format") != "torch"]
    sized = [r for r in exports if r.get("bytes")]
    if reference is None or not reference.get("bytes") or not sized:
        return []
    smallest = min(sized, key=lambda r: r["bytes"])
    said = [
        f"Smallest: {smallest['name']}, {100 * smallest['bytes'] / reference['bytes']:.0f} % "
        "of the BF16 checkpoint's bytes."
    ]
    return said + _fastest(exports, reference) + _closest(exports)


def _fastest(exports: Sequence[Row], reference: Row) -> list[str]:
    key = "decode_tokens_per_s"
    timed = [r for r in exports if r.get(key)]
    if not timed or not reference.get(key):
        return []
    fastest = max(timed, key=lambda r: r[key])
    ratio = fastest[key] / reference[key]
    said = f"Fastest at decoding: {fastest['name']}, {ratio:.1f} times the BF16 PyTorch model"
    shared = set(fastest.get("rank_shared_with") or ())
    same = [r["name"] for r in timed if r["artifact"] in shared and r is not fastest]
    return [said + (f", not told apart from {', '.join(same)}." if same else ".")]


def _closest(exports: Sequence[Row]) -> list[str]:
    known = [r for r in exports if r.get("mean_kl_nats") is not None]
    if not known:
        return []
    best = min(known, key=lambda r: r["mean_kl_nats"])
    said = f"Closest to the reference: {best['name']}, mean KL {best['mean_kl_nats']:.2g} nats"
    if best.get("top1_agreement_percent") is not None:
        said += f", the same first choice at {best['top1_agreement_percent']:.1f} % of the positions"
    limit = interval_of(best, "mean_kl_nats")
    same = [
        r["name"]
        for r in known
        if r is not best and limit and (own := interval_of(r, "mean_kl_nats")) and own[0] <= limit[1]
    ]
    return [said + (f"; not told apart from {', '.join(same)}." if same else ".")]
