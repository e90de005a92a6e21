"""What a run on ARM is compared with, and whether it passed; the table that tells it.

Logits are compared with the float32 reference under the limits of `verify`, answers with x86's. Knows rows;
not how anything is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.arm.processors import DOTPROD_INSTRUCTIONS, I8MM_INSTRUCTIONS
from benchmarks.arm.runs import X86, Found
from benchmarks.common.markdown import markdown
from benchmarks.common.table import Column, render
from benchmarks.fidelity.checks import TIE_NATS
from benchmarks.fidelity.divergence import compare
from benchmarks.fidelity.reference import ReferenceScorer
from benchmarks.fidelity.verify import limits_of
from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError

Row = dict[str, Any]


def compared(
    reference: ReferenceScorer, artifact: Artifact, job: Mapping[str, Any], found: Found, x86: Found | None
) -> Row:
    """The figures of a run, beside x86's where there are any, and whether it passed."""
    limit = limits_of(artifact).mean_kl_nats
    fidelity = compare(reference.passing_logits(job["text"]), iter([found.logits]))
    row: Row = {
        "runtime": f"{found.said['runtime']} {found.said['version']}",
        "says": found.said["says"],
        "mean_kl_nats": fidelity.mean_kl_nats,
        "limit_mean_kl_nats": limit,
        "top1_agreement_percent": fidelity.top1_agreement_percent,
        "positions": fidelity.positions,
    }
    why = [] if fidelity.mean_kl_nats <= limit else [f"mean KL above {limit:g} nats"]
    if x86 is not None:
        apart = compare(iter([x86.logits]), iter([found.logits]))
        text = same_text(x86.said, found.said)
        row |= {"kl_from_x86_nats": apart.mean_kl_nats, **text, "instructions": dict(found.instructions)}
        if text["first_difference"]:
            why.append(text["first_difference"])
    return {**row, "passed": not why, "why": "; ".join(why)}


def same_text(x86: Mapping[str, Any], arm: Mapping[str, Any]) -> Row:
    """How much of the greedy answers is the same; a difference says where, unless it is a tie.

    A tie is a token that x86 itself holds within TIE_NATS of its next best; what follows it in an answer is
    another text, and is not compared.
    """
    same = ties = 0
    first = ""
    for number, (ours, theirs, margins) in enumerate(
        zip(x86["answers"], arm["answers"], x86["margins"], strict=True), 1
    ):
        place = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        same += place
        if ours == theirs:
            continue
        if place < len(margins) and margins[place] <= TIE_NATS:
            ties += 1
        elif not first:
            margin = f"{margins[place]:.3f}" if place < len(margins) else "no"
            first = f"answer {number} differs from x86's at token {place + 1} ({margin} nats likelier there)"
    tokens = sum(map(len, x86["answers"]))
    return {"tokens": tokens, "same_tokens": same, "ties": ties, "first_difference": first}


def failed(error: FoxEdgeError) -> Row:
    """The row of a run that there is none of."""
    return {"passed": False, "why": str(error)}


# Rows of `cells`.
_COLUMNS = (
    Column("export", "artifact"),
    Column("processor", "processor"),
    Column("mean KL, nats", "mean_kl_nats", "{:.2g}"),
    Column("limit", "limit_mean_kl_nats", "{:g}"),
    Column("KL to x86", "kl_from_x86_nats", "{:.1g}"),
    Column("tokens as on x86", "same"),
    Column("dot", "dot", "{:,}"),
    Column("mmla", "mmla", "{:,}"),
    Column("", "verdict"),
)


def cells(row: Row) -> Row:
    """A row as tables show it: the same tokens of all, and how many of the new instructions were used."""
    shown = {**row, "verdict": "ok" if row["passed"] else "FAIL"}
    if "tokens" in row:
        ties = f" ({row['ties']} ties)" if row["ties"] else ""
        shown["same"] = f"{row['same_tokens']} of {row['tokens']}{ties}"
        used = row["instructions"]
        shown["dot"] = sum(used.get(name, 0) for name in DOTPROD_INSTRUCTIONS)
        shown["mmla"] = sum(used.get(name, 0) for name in I8MM_INSTRUCTIONS)
    return shown


def text_of(results: Mapping[str, Any]) -> str:
    """The whole check as a terminal shows it: processors, rows, and why some did not pass."""
    rows: list[Row] = results["rows"]
    return "\n".join(
        [
            *map(_processor_line, results["processors"]),
            "",
            render(_COLUMNS, [cells(row) for row in rows]),
            *(f"{row['artifact']} on {row['processor']}: {row['why']}" for row in rows if row["why"]),
            "passed" if results["passed"] else "NOT passed",
        ]
    )


def arm_table(results: Mapping[str, Any]) -> str:
    """The runs on ARM in Markdown, each beside what the same export says on x86."""
    x86 = {row["artifact"]: row for row in results["rows"] if row["processor"] == X86}
    head = ("nano as", "processor", "mean KL, nats", "on x86", "limit", "tokens as on x86", "dot", "mmla", "")
    rows = []
    for row in map(cells, results["rows"]):
        if row["processor"] != X86:
            figures = [
                f"{r['mean_kl_nats']:.2g}" if "tokens" in row else "" for r in (row, x86[row["artifact"]])
            ]
            limit = f"{row['limit_mean_kl_nats']:g}" if "tokens" in row else ""
            counts = [f"{row[key]:,}" if "tokens" in row else "" for key in ("dot", "mmla")]
            words = [row["artifact"].removeprefix("nano-"), row["processor"]]
            rows.append([*words, *figures, limit, row.get("same", ""), *counts, row["verdict"]])
    return (
        f"{markdown(head, rows)}\n\n{results['emulator']}; {results['system']}; "
        f"{', '.join(sorted({row['runtime'] for row in results['rows'] if 'runtime' in row}))}."
    )


def _processor_line(processor: Mapping[str, Any]) -> str:
    if processor["why"]:
        return f"{processor['name']}: {processor['why']}"
    runs = ", ".join(f"{name} {'runs' if ran else 'is illegal'}" for name, ran in processor["runs"].items())
    return f"{processor['name']} (qemu -cpu {processor['qemu']}): {runs}; {' '.join(processor['features'])}"
