"""ONNX at Fox-1's exact shape, beside onnxruntime-genai: what an export costs, and how its int4 model runs.

    python -m benchmarks.onnx_shape WORK --results FILE.json --genai PYTHON [--rounds N]

WORK is a scratch folder with about 15 GB free; PYTHON has onnxruntime-genai. The checkpoint is random, so
this says what things cost and not what the model knows (that is rounding.py's). Ours is exported by each way
of rounding, the peer's by its own builder (int4, shared embeddings, pruned head); then both run in turn, each
in a fresh process: a prompt of 234 tokens in 1,024 positions and one of 4,000, ours there with the KV cache
in float32 and in int8. Ours loads as at a second start: what the first one packed lies beside the artifact.
Runs for about half an hour; not part of the tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.results import medians, study_command, write_results
from benchmarks.processes.commands import fox_edge, random_checkpoint, run

OURS = "onnx-int4-compensated"
_NEAREST, _SEARCH = "onnx-int4-nearest", "onnx-int4-search"
PEER = "peer-genai"


@dataclass(frozen=True)
class Workload:
    """A prompt and an answer, in tokens, in a context of so many positions."""

    name: str
    prompt: int
    decode: int
    context: int


SHORT = Workload("prompt of 234", 234, 64, 1024)
LONG = Workload("prompt of 4,000", 4000, 64, 4096)


@dataclass(frozen=True)
class Goal:
    """One figure of ours beside the peer's, and what is to be reached.

    `at_most` and `at_least` bound the ratio of ours over the peer's, `limit` our own figure.
    """

    what: str
    section: str
    figure: str
    ours: str
    peers: str
    at_most: float | None = None
    at_least: float | None = None
    limit: float | None = None

    def row(self, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """The medians of (ours, the peer's) and of their ratio, and whether that is good enough."""
        ratio = statistics.median(ours / peers for ours, peers in pairs)
        ours, peers = (statistics.median(values) for values in zip(*pairs, strict=True))
        reached = (
            (self.at_most is None or ratio <= self.at_most)
            and (self.at_least is None or ratio >= self.at_least)
            and (self.limit is None or ours <= self.limit)
        )
        bounds = {"at_most": self.at_most, "at_least": self.at_least, "limit": self.limit}
        return {
            "what": self.what,
            "section": self.section,
            "figure": self.figure,
            "ours": ours,
            "peer": peers,
            "ratio": ratio,
            **bounds,
            "reached": reached,
        }


def _run_name(workload: Workload, kv: str | None = None) -> str:
    return f"{workload.name}, {kv} KV" if kv else workload.name


GOALS = (
    Goal("export, rounding to nearest, wall", "exports", "seconds", _NEAREST, PEER, at_most=0.5),
    Goal("export, scale search, wall", "exports", "seconds", _SEARCH, PEER, at_most=1.0),
    Goal("export, compensated, wall", "exports", "seconds", OURS, PEER, limit=900),
    Goal("export, rounding to nearest, peak RSS", "exports", "peak_rss_bytes", _NEAREST, PEER, limit=2e9),
    Goal("export, scale search, peak RSS", "exports", "peak_rss_bytes", _SEARCH, PEER, limit=2e9),
    Goal("export, compensated, peak RSS", "exports", "peak_rss_bytes", OURS, PEER, limit=2e9),
    Goal("prompt of 234, tok/s", "runs", "prompt_tokens_per_s", SHORT.name, SHORT.name, at_least=2.5),
    Goal("decode after 234, tok/s", "runs", "decode_tokens_per_s", SHORT.name, SHORT.name, at_least=1.5),
    Goal("peak RSS, 1,024 positions", "runs", "peak_rss_bytes", SHORT.name, SHORT.name, at_most=0.6),
    Goal("load, second start", "runs", "load_s", SHORT.name, SHORT.name, limit=1.0),
    Goal("prompt of 4,000, tok/s", "runs", "prompt_tokens_per_s", LONG.name, LONG.name),
    Goal("decode after 4,000, tok/s", "runs", "decode_tokens_per_s", LONG.name, LONG.name, at_least=1.3),
    Goal(
        "decode after 4,000, int8 KV cache, tok/s",
        "runs",
        "decode_tokens_per_s",
        _run_name(LONG, "int8"),
        LONG.name,
        at_least=1.6,
    ),
    Goal("peak RSS, 4,096 positions", "runs", "peak_rss_bytes", LONG.name, LONG.name),
    Goal(
        "peak RSS, 4,096 positions, int8 KV cache",
        "runs",
        "peak_rss_bytes",
        _run_name(LONG, "int8"),
        LONG.name,
    ),
)


def genai_export(checkpoint: Path, work: Path, python: str) -> dict[str, Any]:
    """onnxruntime-genai's builder: int4 on CPU, shared embeddings, pruned head."""
    target = work / "peer-genai"
    shutil.rmtree(target, ignore_errors=True)
    cost = run(
        [
            *(python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", target),
            *("-p", "int4", "-e", "cpu", "-c", work / "genai-cache"),
            *("--extra_options", "shared_embeddings=true", "prune_lm_head=true"),
        ],
        env={"HF_HUB_OFFLINE": "1"},
    )
    return {
        "who": "onnxruntime-genai",
        "artifact": target.name,
        "quant": "int4",
        "seconds": cost.seconds,
        "peak_rss_bytes": cost.peak_rss_bytes,
        "peak_anonymous_bytes": cost.peak_anonymous_bytes,
        "bytes": sum(p.stat().st_size for p in target.iterdir()),
    }


# Their generator, as their own examples drive it. Prints one JSON object.
_GENAI_RUN = """
import json, sys, time
import onnxruntime_genai as og
folder, prompt, decode, context = sys.argv[1], *map(int, sys.argv[2:5])
start = time.perf_counter()
model = og.Model(folder)
load = time.perf_counter() - start
prompts, decodes = [], []
for repeat in range(2):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=context, min_length=context, do_sample=False)
    generator = og.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens([5 + i % 4000 for i in range(prompt)])
    generator.generate_next_token()
    prompts.append(prompt / (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(decode):
        generator.generate_next_token()
    decodes.append(decode / (time.perf_counter() - start))
print(json.dumps({"load_s": load, "prompt_tokens_per_s": prompts[-1], "decode_tokens_per_s": decodes[-1]}))
"""


def genai_run(folder: Path, python: str, workload: Workload) -> dict[str, Any]:
    """One round of onnxruntime-genai's own generator."""
    cost = run(
        [python, "-c", _GENAI_RUN, folder, *map(str, (workload.prompt, workload.decode, workload.context))]
    )
    memory = {"peak_rss_bytes": cost.peak_rss_bytes, "peak_anonymous_bytes": cost.peak_anonymous_bytes}
    return {
        "who": "onnxruntime-genai",
        "artifact": folder.name,
        "run": workload.name,
        **json.loads(cost.stdout),
        **memory,
    }


def peer_versions(python: str) -> dict[str, str]:
    """Versions in the peer's own Python."""
    program = "import importlib.metadata as m; print(m.version('onnxruntime-genai'))"
    return {"onnxruntime-genai": run([python, "-c", program]).stdout.strip()}


def our_exports(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """int4 by each way of rounding; each row is `fox-edge export --json`'s."""
    rows = []
    for rounding in ("nearest", "search", "compensated"):
        target = work / f"onnx-int4-{rounding}"
        flags = ("--format", "onnx", "--quant", "int4", "--rounding", rounding, "--replace")
        row = fox_edge("export", checkpoint, target, *flags)
        rows.append(row | {"who": "fox-edge", "artifact": target.name})
    return rows


def our_run(folder: Path, workload: Workload, kv: str | None = None) -> dict[str, Any]:
    """One run of `fox-edge bench`."""
    found = fox_edge(
        *("bench", folder, "--repeats", "1", "--context", str(workload.context)),
        *("--prompt-tokens", str(workload.prompt), "--decode-tokens", str(workload.decode)),
        *(("--kv", kv) if kv else ()),
    )
    row: dict[str, Any] = found["results"][0]
    return {"who": "fox-edge", **row, "artifact": folder.name, "run": _run_name(workload, kv)}


def one_round(work: Path, python: str) -> list[dict[str, Any]]:
    """Ours and the peer's, turn by turn."""
    rows = []
    for workload in (SHORT, LONG):
        rows.append(our_run(work / OURS, workload))
        rows.append(genai_run(work / PEER, python, workload))
    rows.append(our_run(work / OURS, LONG, "int8"))
    return rows


def reached(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every goal that both sides were measured for, over the rounds (the exports are one round)."""
    found = []
    for goal in GOALS:
        pairs = []
        for rows in rounds:
            ours = [row for row in rows if row["who"] == "fox-edge" and _name(row) == goal.ours]
            peers = [row for row in rows if row["who"] != "fox-edge" and _name(row) == goal.peers]
            if ours and peers:
                pairs.append((ours[0][goal.figure], peers[0][goal.figure]))
        if pairs:
            found.append(goal.row(pairs))
    return found


def _name(row: dict[str, Any]) -> str:
    """What a goal calls a row: a run by its workload, an export by its folder."""
    name: str = row.get("run", row["artifact"])
    return name


def main() -> None:
    """Parse, measure, write the results file after every stage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx_shape", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--genai", metavar="PYTHON", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("exports", "runs"), help="only this; FILE.json keeps the other")
    args = parser.parse_args()
    work: Path = args.work
    checkpoint = random_checkpoint(work)
    results: dict[str, Any] = {}
    if args.part:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    results |= {
        "command": study_command("onnx_shape"),
        "machine": machine(),
        "peers": peer_versions(args.genai),
    }

    def save(part: str, rows: list[dict[str, Any]], rounds: list[list[dict[str, Any]]]) -> None:
        kept = [goal for goal in results.get("goals", ()) if goal["section"] != part]
        results.update({part: rows, "goals": sorted(kept + reached(rounds), key=_place)})
        write_results(args.results, results)

    if args.part != "runs":
        exports = [*our_exports(checkpoint, work), genai_export(checkpoint, work, args.genai)]
        save("exports", exports, [exports])
    if args.part != "exports":
        # The first start packs and writes; it is looked at, but it is no round.
        results["first_start"] = our_run(work / OURS, SHORT)
        rounds: list[list[dict[str, Any]]] = []
        for _ in range(args.rounds):
            rounds.append(one_round(work, args.genai))
            save("runs", medians(rounds), rounds)


def _place(goal: dict[str, Any]) -> int:
    return [known.what for known in GOALS].index(goal["what"])


if __name__ == "__main__":
    main()
