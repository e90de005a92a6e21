"""The figures that are to be reached on one H200, and whether they were: from results to rows and words.

Knows the keys of the results; measures nothing. A figure that was not measured says so, and why if that is
known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.table import Column, render

Results = Mapping[str, Any]
# Of the paper: vLLM on one H100, several users at once.
_PAPER = "over 200 tok/s"
_WIDTH = 160


@dataclass(frozen=True)
class Goal:
    """One figure: what it is, what the paper has, and what ours must be at least or at most.

    `ours` computes it from the results; raises KeyError where they do not have it.
    """

    what: str
    ours: Callable[[Results], float]
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    paper: str = ""
    shown: Callable[[Results], str] = lambda results: ""

    def row(self, results: Results) -> dict[str, Any]:
        """The figure with its verdict: reached, missed or not measured; without a card, rehearsed."""
        about = {
            "what": self.what,
            "unit": self.unit,
            "paper": self.paper,
            "at_least": self.at_least,
            "at_most": self.at_most,
        }
        try:
            ours = self.ours(results)
        except _Missing as missing:
            return {**about, "ours": None, "verdict": "not measured", "note": str(missing)}
        good = (self.at_least is None or ours >= self.at_least) and (
            self.at_most is None or ours <= self.at_most
        )
        verdict = "reached" if good else "missed"
        if results.get("device", "cuda") != "cuda":
            verdict = "rehearsed"
        return {**about, "ours": ours, "verdict": verdict, "note": self.shown(results)}


class _Missing(Exception):
    """A figure that the results do not have."""


def case(results: Results, part: str, name: str) -> Mapping[str, Any]:
    """What one measurement found; raises _Missing with its error, or because it was not made."""
    found: Mapping[str, Any] | None = results.get("parts", {}).get(part, {}).get(name)
    if found is None:
        raise _Missing("")
    if "error" in found:
        raise _Missing(str(found["error"]))
    return found


def _bandwidth(results: Results) -> float:
    return float(max(found["bytes_per_s"] for found in case(results, "floors", "card")["bandwidth"]))


def _operations(results: Results) -> float:
    rates = case(results, "floors", "card")["compute"]
    return float(next(found["operations_per_s"] for found in rates if found["type"] == "bf16"))


def _decode(results: Results, name: str) -> float:
    return float(case(results, "decode", name)["decode_tokens_per_s"])


def share_of_bandwidth(results: Results, part: str, name: str) -> float:
    """Percent of the measured bandwidth that one measurement's decoding moved, all users together."""
    row = case(results, part, name)
    return 100 * float(row["total_tokens_per_s"]) * float(row["bytes_per_token"]) / _bandwidth(results)


def share_of_operations(results: Results, part: str, name: str) -> float:
    """Percent of the measured rate of BF16 products that reading a prompt came to."""
    row = case(results, part, name)
    done = float(row["prompt_tokens_per_s"]) * float(row["prompt_operations_per_token"])
    return 100 * done / _operations(results)


def _times(results: Results, name: str) -> float:
    return _decode(results, name) / _decode(results, "bf16")


def _memory(results: Results) -> float:
    held = case(results, "decode", "bf16, the paper's prompts")["peak_device_bytes"]
    if held is None:
        raise _Missing("no card")
    return float(held) / 1e6


def _peer(results: Results) -> float:
    return _decode(results, "bf16") / float(case(results, "peer", "generate")["decode_tokens_per_s"])


def _of_users(results: Results, count: int, figure: str) -> float:
    return float(case(results, "users", f"bf16, {count} users")[figure])


def _rate_of(part: str, name: str, figure: str = "decode_tokens_per_s") -> Callable[[Results], str]:
    return lambda results: f"{case(results, part, name)[figure]:,.0f} tok/s"


def _worst(results: Results) -> float:
    return max(float(case(results, "exact", f"logits, {n}")["relative_error"]) for n in ("nano", "random"))


def _greedy(results: Results) -> float:
    found = case(results, "exact", "greedy, nano")
    return 100 * found["equal"] / found["prompts"]


def _kernels(results: Results) -> float:
    names = results.get("parts", {}).get("kernels", {})
    if not names:
        raise _Missing("")
    return max(float(case(results, "kernels", name)["relative_error"]) for name in names)


GOALS = (
    Goal("BF16 logits against float32 on the CPU, relative error", _worst, "", at_most=1e-2),
    Goal("greedy text of nano as on the CPU, 64 tokens", _greedy, "% of prompts", at_least=100),
    Goal("every kernel against unpacked weights, relative error", _kernels, "", at_most=1e-2),
    Goal(
        "BF16, one user, decode: share of the bandwidth",
        lambda results: share_of_bandwidth(results, "decode", "bf16"),
        "%",
        at_least=75,
        paper=_PAPER,
        shown=_rate_of("decode", "bf16"),
    ),
    Goal(
        "int8, one user, over our BF16",
        lambda results: _times(results, "int8"),
        "x",
        at_least=1.6,
        shown=_rate_of("decode", "int8"),
    ),
    Goal(
        "int4, one user, over our BF16",
        lambda results: _times(results, "int4"),
        "x",
        at_least=2.4,
        shown=_rate_of("decode", "int4"),
    ),
    Goal(
        "BF16, 32 users, each",
        lambda results: _of_users(results, 32, "decode_tokens_per_s"),
        "tok/s",
        at_least=400,
        paper=_PAPER + " each",
    ),
    Goal(
        "BF16, 32 users, all together",
        lambda results: _of_users(results, 32, "total_tokens_per_s"),
        "tok/s",
        at_least=12_800,
    ),
    Goal("memory, BF16, the paper's prompts, one user", _memory, "MB", at_most=3600, paper="3,703 MB"),
    Goal(
        "prompt of 4,000: share of the BF16 matrix rate",
        lambda results: share_of_operations(results, "prompt", "bf16"),
        "%",
        at_least=60,
        shown=_rate_of("prompt", "bf16", "prompt_tokens_per_s"),
    ),
    Goal(
        "one user, over Hugging Face's generate",
        _peer,
        "x",
        at_least=10,
        shown=_rate_of("peer", "generate"),
    ),
)


def goal_rows(results: Results) -> list[dict[str, Any]]:
    """Every goal with what was found."""
    return [goal.row(results) for goal in GOALS]


def to_reach(row: Mapping[str, Any]) -> str:
    """'at least 75 %'."""
    way, bound = ("least", row["at_least"]) if row["at_least"] is not None else ("most", row["at_most"])
    return f"at {way} {bound:,g} {row['unit']}".rstrip()


def found(row: Mapping[str, Any]) -> str:
    """Our figure in its unit, with the rate behind it; a dash where there is none."""
    if row["ours"] is None:
        return "–"
    digits = f"{row['ours']:.2g}" if not row["unit"] else f"{row['ours']:,.{1 if row['ours'] < 1000 else 0}f}"
    behind = f" ({row['note']})" if row["note"] else ""
    return f"{digits} {row['unit']}".rstrip() + behind


def goals_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table that the command ends with."""
    shown = [{**row, "found": found(row), "bound": to_reach(row)} for row in rows]
    columns = (
        Column("on one card", "what"),
        Column("paper, H100", "paper"),
        Column("to reach", "bound"),
        Column("ours", "found"),
        Column("", "verdict"),
    )
    lines = [render(columns, shown, _WIDTH)]
    lines += [f"{r['what']}: {r['note']}" for r in rows if r["ours"] is None and r["note"]]
    return "\n".join(lines)
