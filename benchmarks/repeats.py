"""Do two runs of the same artifact agree within their intervals? The whole of `bench`, again and again.

    python -m benchmarks.repeats ARTIFACT --results FILE.json [--runs 20] [--repeats 5] [--decode-tokens N]

Every run is a `bench` of its own, with its own rounds, medians and intervals. Two runs agree on a figure when
their intervals have a value in common; counted over all pairs of runs, so that a machine that was another one
an hour later shows. That should be so 19 times of 20. Beside it, how many would agree by the rounds alone, if
intervals knew nothing of how the machine wanders, and what a user would be told: how many pairs `fox-edge
compare` does not tell apart.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import study_command, write_results
from benchmarks.common.table import Column, render
from benchmarks.latency.bench import REPEATS, bench
from benchmarks.latency.intervals import bootstrap_median
from benchmarks.report.compare import compare_results
from benchmarks.report.verdicts import SAME
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say

RUNS = 20
WANTED_PERCENT = 95.0
FIGURES = (
    "decode_tokens_per_s",
    "prompt_tokens_per_s",
    "time_to_first_token_s",
    "token_p95_s",
    "load_s",
    "peak_rss_bytes",
)


def agreement(intervals: Sequence[Sequence[float]]) -> tuple[int, int]:
    """How many pairs of intervals have a value in common, and how many pairs there are."""
    pairs = list(itertools.combinations(intervals, 2))
    agreeing = sum(max(a[0], b[0]) <= min(a[1], b[1]) for a, b in pairs)
    return agreeing, len(pairs)


def not_told_apart(runs: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of how many pairs of runs `fox-edge compare` says that they cannot be told apart, by figure."""
    records = [{"conditions": run["conditions"], "rows": [_row(run)]} for run in runs]
    counts = dict.fromkeys(FIGURES, 0)
    for first, second in itertools.combinations(records, 2):
        (found,) = compare_results(first, second)["results"]
        for figure in found["figures"]:
            if figure["figure"] in counts and figure["verdict"] == SAME:
                counts[figure["figure"]] += 1
    return counts


def _row(run: dict[str, Any]) -> dict[str, Any]:
    """A run as a row of `bench`."""
    return {
        "artifact": "it",
        "runs": len(run[FIGURES[0]]["samples"]),
        "interval": {figure: run[figure]["interval"] for figure in FIGURES},
        **{figure: run[figure]["median"] for figure in FIGURES},
    }


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per figure: the medians' range, the intervals' typical width, and how many pairs agree."""
    found, alike = [], not_told_apart(runs)
    for figure in FIGURES:
        intervals = [run[figure]["interval"] for run in runs]
        medians = [run[figure]["median"] for run in runs]
        agreeing, pairs = agreement(intervals)
        by_rounds, _ = agreement([bootstrap_median(run[figure]["samples"]) or (0.0, 0.0) for run in runs])
        widths = sorted(
            100 * (high - low) / median for (low, high), median in zip(intervals, medians, strict=True)
        )
        found.append(
            {
                "figure": figure,
                "lowest": min(medians),
                "highest": max(medians),
                "width_percent": widths[len(widths) // 2],
                "pairs": pairs,
                "agreeing": agreeing,
                "agreeing_percent": 100 * agreeing / pairs,
                "by_rounds_alone_percent": 100 * by_rounds / pairs,
                "not_told_apart": alike[figure],
                "not_told_apart_percent": 100 * alike[figure] / pairs,
            }
        )
    return found


def repeats(spec: str, runs: int, **options: Any) -> dict[str, Any]:
    """Run `bench` so often; raises FoxEdgeError when the artifact dies in any of them."""
    if runs < 2 or options.get("repeats", REPEATS) < 2:
        raise FoxEdgeError("agreement takes at least two runs, and intervals at least two rounds in each")
    results = []
    for n in range(runs):
        result = bench([spec], **options)
        (row,) = result["results"]
        if "error" in row:
            raise FoxEdgeError(f"run {n + 1}: {spec}: {row['error']}")
        results.append(result)
        say(f"run {n + 1} of {runs}: {row['decode_tokens_per_s']:,.1f} tok/s")
    found = []
    for result in results:
        row = result["results"][0]
        figures = {
            f: {"median": row[f], "interval": row["interval"][f], "samples": row["samples"][f]}
            for f in FIGURES
        }
        found.append({"created": result["created"], "conditions": result["conditions"], **figures})
    noises = [run["conditions"]["noise_percent"] for run in found]
    return {
        "machine": results[0]["machine"],
        "settings": results[0]["settings"],
        "wanted_percent": WANTED_PERCENT,
        "noise_percent": statistics.median(noises) if None not in noises else None,
        "results": summarize(found),
        "runs": found,
    }


COLUMNS = (
    Column("figure", "figure"),
    Column("lowest median", "lowest", "{:,.4g}"),
    Column("highest", "highest", "{:,.4g}"),
    Column("interval's width", "width_percent", "{:.1f} %"),
    Column("pairs that agree", "pairs_agreeing"),
    Column("share", "agreeing_percent", "{:.1f} %"),
    Column("by rounds alone", "by_rounds_alone_percent", "{:.1f} %"),
    Column("not told apart", "not_told_apart_percent", "{:.1f} %"),
)


def repeats_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    return render(COLUMNS, [r | {"pairs_agreeing": f"{r['agreeing']} of {r['pairs']}"} for r in rows])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeats", description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--decode-tokens", type=int)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    found = repeats(
        args.artifact,
        args.runs,
        repeats=args.repeats,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        threads=args.threads,
    )
    command = study_command("repeats")
    write_results(args.results, {"command": command, "artifact": args.artifact, **found})
    print(repeats_text(found["results"]))


if __name__ == "__main__":
    main()
