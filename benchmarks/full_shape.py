"""GGUF at Fox-1's exact shape: exports and runs, ours beside llama.cpp's, in one go.

    python -m benchmarks.full_shape WORK --results FILE.json [--llama-cpp SOURCE BUILD]
    python -m benchmarks.full_shape WORK --results FILE.json --part compensated

WORK is a scratch folder with about 20 GB free. The checkpoint is random (`fox-edge new`), so this page
says what an export costs and how fast it runs, not what it knows. Peers are measured when they are given:
llama.cpp's source folder (convert_hf_to_gguf.py) and build folder (llama-quantize, llama-bench). Every
command is a fresh process; the peer's run follows ours at once, so that a drifting machine drifts for both.
Runs for minutes; not part of the tests. `--part compensated` adds to the file what the slow, good export
takes, how true its estimates are, and that it goes on where it was killed. (ONNX at this shape is
onnx_shape.py's.)
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.results import medians, study_command, write_results
from benchmarks.processes.commands import Cost, fox_edge, random_checkpoint, run, watch
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores, physical_cores
from fox_edge.progress import say

# Name, --quant and --rounding of our plain exports: what llama.cpp's two steps do too.
EXPORTS = (("gguf-int4", "int4", "nearest"), ("gguf-int8", "int8", "nearest"))
PROMPT_TOKENS, DECODE_TOKENS, CONTEXT = 234, 64, 1024


# --- exports -------------------------------------------------------------------------------------------


def our_exports(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """Export both presets; each row is `fox-edge export --json`'s."""
    rows = []
    for name, quant, rounding in EXPORTS:
        how = ("--format", "gguf", "--quant", quant, "--rounding", rounding, "--replace")
        row = fox_edge("export", checkpoint, work / name, *how)
        rows.append(row | {"who": "fox-edge", "artifact": name, "rounding": rounding})
    return rows


def compensated_export(checkpoint: Path, work: Path) -> dict[str, Any]:
    """The slow, good export, killed once in its middle and finished by the same command.

    `wall_s` is of both processes together; `estimates` are what the first one reckoned with.
    """
    target = work / "gguf-int4-compensated"
    for folder in (target, target.parent / f".{target.name}.unfinished"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "fox_edge.cli", "export", checkpoint, target, "--format", "gguf"]
    command += ["--quant", "int4", "--rounding", "compensated", "--json"]
    killed, estimates = _told(command, kill_at=0.5)
    rest, _ = _told(command)
    row: dict[str, Any] = json.loads(rest.stdout)
    wall = killed.seconds + rest.seconds
    return row | {
        "who": "fox-edge",
        "artifact": target.name,
        "rounding": "compensated",
        "wall_s": wall,
        "killed_after_s": killed.seconds,
        "peak_rss_bytes": max(killed.peak_rss_bytes, rest.peak_rss_bytes),
        "peak_anonymous_bytes": max(killed.peak_anonymous_bytes, rest.peak_anonymous_bytes),
        "estimates": [{"at_s": at, "total_s": total} for at, total in estimates],
        "median_estimate_off": statistics.median(abs(total / wall - 1) for _, total in estimates),
    }


def _told(command: Sequence[object], kill_at: float | None = None) -> tuple[Cost, list[tuple[float, float]]]:
    """Run an export and read its progress: (seconds so far, total seconds that it then reckoned with)."""
    say("$ " + " ".join(map(str, command)))
    start, found = time.monotonic(), []
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=subprocess.PIPE, text=True
        )
        peaks = {"VmHWM": 0, "RssAnon": 0}
        watcher = threading.Thread(target=watch, args=(process, peaks), daemon=True)
        watcher.start()
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if told := re.search(r"(\d+)%, (\d+) s left", line):
                at = time.monotonic() - start
                found.append((at, at + float(told[2])))
                if kill_at is not None and float(told[1]) >= 100 * kill_at:
                    process.kill()
        status = process.wait()
        seconds = time.monotonic() - start
        watcher.join()
        if status and kill_at is None:
            raise FoxEdgeError(f"{command[0]} ended with {status}: {''.join(said)[-2000:]}")
        out.seek(0)
        return Cost(seconds, peaks["VmHWM"], peaks["RssAnon"], out.read()), found


def llama_cpp_exports(checkpoint: Path, work: Path, source: Path, build: Path) -> list[dict[str, Any]]:
    """convert_hf_to_gguf.py to BF16, then llama-quantize: the peer's two steps, timed apart and summed."""
    whole = work / "peer-bf16.gguf"
    convert = run(
        [
            sys.executable,
            source / "convert_hf_to_gguf.py",
            checkpoint,
            "--outfile",
            whole,
            "--outtype",
            "bf16",
        ],
        env={"PYTHONPATH": str(source / "gguf-py")},
    )
    rows = []
    for quant in ("Q4_K_M", "Q4_0", "Q8_0"):
        target = work / f"peer-{quant}.gguf"
        quantize = run([build / "bin" / "llama-quantize", whole, target, quant, available_cores()])
        rows.append(
            {
                "who": "llama.cpp",
                "artifact": target.name,
                "quant": quant,
                "seconds": convert.seconds + quantize.seconds,
                "convert_s": convert.seconds,
                "quantize_s": quantize.seconds,
                "peak_rss_bytes": max(convert.peak_rss_bytes, quantize.peak_rss_bytes),
                "peak_anonymous_bytes": max(convert.peak_anonymous_bytes, quantize.peak_anonymous_bytes),
                "bytes": target.stat().st_size,
                "intermediate_bytes": whole.stat().st_size,
            }
        )
    return rows


# --- runs ----------------------------------------------------------------------------------------------

_REFERENCE_LOAD = """
import json, sys, time
import torch
from benchmarks.common.machine import memory
from fox_edge.checkpoint import Checkpoint
before = memory()
start = time.perf_counter()
model = Checkpoint.open(sys.argv[1]).load_model(torch.bfloat16)
after = memory()
print(json.dumps({
    "load_s": time.perf_counter() - start,
    "weights_bytes": sum(w.nbytes for w in model.parameters()),
    "rss_before_bytes": before.rss,
    "peak_rss_bytes": after.peak_rss,
}))
"""


def reference_load(checkpoint: Path) -> dict[str, Any]:
    """What loading the BF16 reference model takes, in a process of its own."""
    found: dict[str, Any] = json.loads(run([sys.executable, "-c", _REFERENCE_LOAD, checkpoint]).stdout)
    found["peak_over_weights"] = found["peak_rss_bytes"] / found["weights_bytes"]
    return found


def our_runs(work: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """One round of `fox-edge bench` over the exports."""
    found = fox_edge(
        *("bench", *(work / name for name in names)),
        *("--prompt-tokens", str(PROMPT_TOKENS), "--decode-tokens", str(DECODE_TOKENS)),
        *("--context", str(CONTEXT), "--repeats", "1"),
    )
    return [{"who": "fox-edge", **row, "artifact": Path(row["artifact"]).name} for row in found["results"]]


def llama_bench(file: Path, build: Path) -> dict[str, Any]:
    """One round of llama-bench: the prompt into an empty context, the decode behind as long a prompt."""
    bench = [build / "bin" / "llama-bench", "-m", file, "-t", physical_cores(), "-r", 2, "-o", "json"]
    prompt = run([*bench, "-p", PROMPT_TOKENS, "-n", 0])
    decode = run([*bench, "-p", 0, "-n", DECODE_TOKENS, "-d", PROMPT_TOKENS])
    return {
        "who": "llama-bench",
        "artifact": file.name,
        "prompt_tokens_per_s": json.loads(prompt.stdout)[0]["avg_ts"],
        "decode_tokens_per_s": json.loads(decode.stdout)[0]["avg_ts"],
        "peak_rss_bytes": max(prompt.peak_rss_bytes, decode.peak_rss_bytes),
        "peak_anonymous_bytes": max(prompt.peak_anonymous_bytes, decode.peak_anonymous_bytes),
    }


# What is held against what: (label, section, figure, our artifact, the peer's).
_RATIOS = (
    # Q4_0 is what most of our int4 is made of; Q4_K_M takes the peer twice as long.
    ("GGUF int4 export, wall", "exports", "seconds", "gguf-int4", "peer-Q4_0.gguf"),
    ("GGUF int8 export, wall", "exports", "seconds", "gguf-int8", "peer-Q8_0.gguf"),
    (
        "GGUF int4, decode tok/s, same file",
        "runs",
        "decode_tokens_per_s",
        "gguf-int4",
        "checkpoint-int4.gguf",
    ),
    (
        "GGUF int8, decode tok/s, same file",
        "runs",
        "decode_tokens_per_s",
        "gguf-int8",
        "checkpoint-int8.gguf",
    ),
)


def ratios(results: dict[str, Any], rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ours over the peer's: exports once, runs as the median of the rounds' own ratios."""
    found = []
    for label, section, figure, ours, peers in _RATIOS:
        values = []
        for rows in [results["exports"]] if section == "exports" else rounds:
            by_name = {row["artifact"]: row for row in rows}
            if ours in by_name and peers in by_name:
                values.append(by_name[ours][figure] / by_name[peers][figure])
        if values:
            found.append({"what": label, "ratio": statistics.median(values)})
    return found


def main() -> None:
    """Parse, measure, write the results file after every stage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_shape", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path, nargs=2, metavar=("SOURCE", "BUILD"))
    parser.add_argument("--part", choices=("plain", "compensated"), default="plain")
    args = parser.parse_args()
    work: Path = args.work
    checkpoint = random_checkpoint(work)
    if args.part == "compensated":
        found = json.loads(args.results.read_text(encoding="utf-8"))
        found["compensated"] = {
            "command": study_command("full_shape"),
            "machine": machine(),
        } | compensated_export(checkpoint, work)
        write_results(args.results, found)
        return
    before = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    results: dict[str, Any] = {
        **({"compensated": before["compensated"]} if "compensated" in before else {}),
        "command": study_command("full_shape"),
        "machine": machine(),
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "context": CONTEXT,
        "reference_load": reference_load(checkpoint),
        "exports": our_exports(checkpoint, work),
    }

    def save() -> None:
        write_results(args.results, results)

    save()
    if args.llama_cpp:
        results["exports"] += llama_cpp_exports(checkpoint, work, *args.llama_cpp)
        save()
    rounds = []
    for _ in range(args.rounds):
        rows = our_runs(work, [name for name, _, _ in EXPORTS])
        if args.llama_cpp:
            # The same file that ours runs, and the peer's own.
            files = [next((work / name).glob("*.gguf")) for name, _, _ in EXPORTS]
            files += sorted(work.glob("peer-Q*.gguf"))
            rows += [llama_bench(file, args.llama_cpp[1]) for file in files]
        rounds.append(rows)
        results["runs"] = medians(rounds)
        results["ratios"] = ratios(results, rounds)
        save()


if __name__ == "__main__":
    main()
