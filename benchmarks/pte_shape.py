"""ExecuTorch at Fox-1's exact shape, beside llama.cpp: what an export costs, and how its int4 model runs.

    python -m benchmarks.pte_shape WORK --results FILE.json --data TEST.jsonl [--rounds N] [--part PART]

WORK is a scratch folder with about 12 GB free, TEST.jsonl is GSM8K's test split. The checkpoint is random, so
costs and speed are measured on it; what rounding leaves is measured on the embedded model, on 8,192 positions
of that text. The peer is llama.cpp on our own q4_k file, with and without repacking; of each figure it is
given the better one. Models run in turn, each in a fresh process: a prompt of 234 tokens in 1,024 positions,
and one of 4,000. Runs for about half an hour; not part of the tests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.results import medians, study_command, write_results
from benchmarks.fidelity.reference import ReferenceScorer
from benchmarks.onnx_shape import LONG, SHORT, Goal, Workload
from benchmarks.processes.commands import fox_edge, random_checkpoint
from benchmarks.rounding import measured, our_export, windows
from fox_edge.checkpoint import Checkpoint

OURS, LONG_CACHE, PEER = "pte-int4", "pte-int4-4096", "gguf-q4_k"
# Name of an export, and what it is made by beside int4 weights rounded to nearest.
_EXPORTS = (
    (OURS, ("--format", "pte", "--quant", "int4", "--context", str(SHORT.context))),
    (LONG_CACHE, ("--format", "pte", "--quant", "int4", "--context", str(LONG.context))),
    (PEER, ("--format", "gguf", "--quant", "q4_k")),
)
# A row of `bench` -> whether more is better; of each the peer gets the best of its settings.
_FIGURES = {
    "load_s": False,
    "prompt_tokens_per_s": True,
    "decode_tokens_per_s": True,
    "running_rss_bytes": False,
    "peak_rss_bytes": False,
}
GOALS = (
    Goal("export, wall", "exports", "seconds", OURS, PEER, limit=200),
    Goal("export, peak RSS", "exports", "peak_rss_bytes", OURS, PEER, limit=6e9),
    Goal("decode after 234, tok/s", "runs", "decode_tokens_per_s", SHORT.name, SHORT.name, at_least=1.5),
    Goal("prompt of 234, tok/s", "runs", "prompt_tokens_per_s", SHORT.name, SHORT.name, at_least=1.3),
    Goal("decode after 4,000, tok/s", "runs", "decode_tokens_per_s", LONG.name, LONG.name, at_least=1.3),
    Goal("prompt of 4,000, tok/s", "runs", "prompt_tokens_per_s", LONG.name, LONG.name),
    Goal("memory while running, 1,024", "runs", "running_rss_bytes", SHORT.name, SHORT.name, limit=1.3e9),
    Goal("peak RSS, 1,024 positions", "runs", "peak_rss_bytes", SHORT.name, SHORT.name),
    Goal("memory while running, 4,096", "runs", "running_rss_bytes", LONG.name, LONG.name),
    Goal("load, warm", "runs", "load_s", SHORT.name, SHORT.name, limit=1.5),
    Goal("weights of nano, int4", "fidelity", "weight_bytes", "pte-int4", "gguf-q4_k", at_most=1),
    Goal("mean KL of nano, int4, nats", "fidelity", "mean_kl_nats", "pte-int4", "gguf-q4_k", at_most=1),
    Goal("mean KL of nano, int8, nats", "fidelity", "mean_kl_nats", "pte-int8", "gguf-int8", limit=0.003),
)
# The embedded model's exports: name, format, --quant and --rounding.
_NANO = (
    ("pte-int4", "pte", "int4", None),
    ("pte-int4-nearest", "pte", "int4", "nearest"),
    ("pte-q4s64", "pte", "q4s64", None),
    ("pte-q4s32", "pte", "q4s32", None),
    ("pte-int8", "pte", "int8", None),
    ("gguf-q4_k", "gguf", "q4_k", None),
    ("gguf-int8", "gguf", "int8", None),
)


def exports(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """Every export of the random checkpoint; each row is `fox-edge export --json`'s."""
    rows = []
    for name, flags in _EXPORTS:
        # Random weights leave no model to be close to: the limit is out of the way.
        found = fox_edge(
            *("export", checkpoint, work / name, *flags, "--rounding", "nearest"),
            *("--max-mean-kl", "1000", "--replace"),
        )
        rows.append(found | {"artifact": name})
    return rows


def one_run(folder: Path, workload: Workload, *flags: str) -> dict[str, Any]:
    """One run of `fox-edge bench`; `running_rss_bytes` is what is resident when it has answered."""
    found = fox_edge(
        *("bench", folder, "--repeats", "1", "--context", str(workload.context), *flags),
        *("--prompt-tokens", str(workload.prompt), "--decode-tokens", str(workload.decode)),
    )
    row: dict[str, Any] = found["results"][0]
    return row | {"running_rss_bytes": row["anonymous_rss_bytes"] + row["file_rss_bytes"]}


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The better of several settings, figure by figure."""
    return {figure: (max if more else min)(row[figure] for row in rows) for figure, more in _FIGURES.items()}


def one_round(work: Path) -> list[dict[str, Any]]:
    """Ours and the peer's, turn by turn."""
    rows = []
    for workload, ours in ((SHORT, OURS), (LONG, LONG_CACHE)):
        found = one_run(work / ours, workload)
        rows.append({"artifact": ours, "run": workload.name, **{key: found[key] for key in _FIGURES}})
        settings = [one_run(work / PEER, workload, "--repack", repack) for repack in ("on", "off")]
        rows.append({"artifact": PEER, "run": workload.name, **best_of(settings)})
    return rows


def fidelity(work: Path, data: Path) -> list[dict[str, Any]]:
    """What each export of the embedded model keeps, on GSM8K's test text."""
    checkpoint = Checkpoint.open("nano")
    reference, texts = ReferenceScorer(checkpoint), windows(checkpoint.tokenizer(), data)
    folder = work / "nano"
    folder.mkdir(exist_ok=True)
    return [measured(our_export(folder, *export), reference, texts) for export in _NANO]


def reached(section: str, rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The goals of a section over its rounds (exports and fidelity are one)."""
    found = []
    for goal in GOALS:
        if goal.section != section:
            continue
        pairs = []
        for rows in rounds:
            ours = next(
                r for r in rows if r["artifact"] != PEER and goal.ours in (r.get("run"), r["artifact"])
            )
            peer = next(
                r
                for r in rows
                if r["artifact"].startswith("gguf") and goal.peers in (r.get("run"), r["artifact"])
            )
            pairs.append((ours[goal.figure], peer[goal.figure]))
        found.append(goal.row(pairs))
    return found


def main() -> None:
    """Parse, measure, write the results file after every stage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pte_shape", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--part", choices=("exports", "runs", "fidelity"), help="only this; FILE.json keeps the rest"
    )
    args = parser.parse_args()
    work: Path = args.work
    checkpoint = random_checkpoint(work)
    results: dict[str, Any] = {}
    if args.part:
        results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    results |= {"command": study_command("pte_shape"), "machine": machine(), "peers": {}}

    def save(part: str, rounds: list[list[dict[str, Any]]]) -> None:
        kept = [goal for goal in results.get("goals", ()) if goal["section"] != part]
        goals = sorted(kept + reached(part, rounds), key=_place)
        rows = medians(rounds) if part == "runs" else rounds[0]
        results.update({part: rows, "goals": goals})
        write_results(args.results, results)

    if args.part in (None, "exports"):
        save("exports", [exports(checkpoint, work)])
    if args.part in (None, "runs"):
        rounds: list[list[dict[str, Any]]] = []
        for _ in range(args.rounds):
            rounds.append(one_round(work))
            save("runs", rounds)
    if args.part in (None, "fidelity"):
        save("fidelity", [fidelity(work, args.data)])


def _place(goal: dict[str, Any]) -> int:
    return [known.what for known in GOALS].index(goal["what"])


if __name__ == "__main__":
    main()
