"""What a comparison with the reference costs: beside the two models' own forward passes, and in memory.

    python -m benchmarks.fidelity_cost WORK --results FILE.json [--artifact DIR ...] [--shape fox-1-1.6b]

Time: the whole command, processes and loading and all, over the sum of what the two models need to compute
the same logits and throw them away: the checkpoint loaded whole in float32 (6.7 GB at Fox-1's shape), and the
artifact in its runtime, both without what loading takes. Memory: the most that the command's processes hold
at once, the one that starts the others included, over the peak of one that only runs the artifact; the
checkpoint is streamed, so all that is held of it counts as above the models. WORK is a scratch folder; a
random checkpoint of the shape and exports of it are made there where they are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine, peak_rss_bytes
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import open_subject
from benchmarks.common.table import Column, render
from benchmarks.fidelity.job import session_logits
from benchmarks.fidelity.texts import Windows, read_windows
from benchmarks.processes.commands import fox_edge, random_exports
from benchmarks.processes.launch import run_worker
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import SCORE_CHUNK, SessionOptions

TOKENS, WINDOW = 8192, 512
# The issue's: time over the sum of both models' own, and bytes above the models.
MOST_RATIO, MOST_BYTES = 1.3, 10**9
EXPORTS = {
    "gguf-int4": ("--format", "gguf", "--quant", "int4", "--rounding", "nearest"),
    "onnx-int4": ("--format", "onnx", "--quant", "int4", "--rounding", "nearest"),
}


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'forward': {subject or checkpoint, windows, first, threads} -> seconds, peak.

    The logits of the positions that count are computed, as the comparison has them, and thrown away.
    """
    text = Windows("", job["windows"], job["first"])
    seconds = _whole(job, text) if "checkpoint" in job else _artifact(job, text)
    return {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def _artifact(job: dict[str, Any], text: Windows) -> float:
    subject = open_subject(job["subject"])
    options = SessionOptions(context=text.length, threads=job["threads"])
    with contextlib.closing(subject.open_session(options)) as session:
        start = time.perf_counter()
        for _ in session_logits(session, text):
            pass
        return time.perf_counter() - start


def _whole(job: dict[str, Any], text: Windows) -> float:
    """The reference with all its weights in memory in float32, window by window."""
    import torch

    from fox_edge.checkpoint import Checkpoint

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    model = Checkpoint.open(job["checkpoint"]).load_model(torch.float32)
    start = time.perf_counter()
    with torch.inference_mode():
        for tokens in text.inputs:
            hidden = model.hidden(torch.tensor([tokens]))[0, text.first :]
            for rows in hidden.split(4 * SCORE_CHUNK):
                model.logits(rows)
    return time.perf_counter() - start


def round_of(checkpoint: str, artifact: str, text: Windows, threads: int | None) -> dict[str, Any]:
    """Each of the three once: the reference alone, the artifact alone, the comparison."""
    job = {"task": "forward", "windows": text.windows, "first": text.first, "threads": threads}
    reference = run_worker({**job, "checkpoint": checkpoint})
    alone = run_worker({**job, "subject": artifact})
    start = time.perf_counter()
    words = ["--tokens", text.length * len(text.windows), "--window", text.length]
    words += [] if threads is None else ["--threads", threads]
    report = fox_edge("eval", artifact, "--task", "fidelity", "--checkpoint", checkpoint, *words)
    seconds = time.perf_counter() - start
    row = report["results"][0]
    if "error" in row:
        raise FoxEdgeError(f"{artifact}: {row['error']}")
    return {
        "reference_forward_s": reference["seconds"],
        "artifact_forward_s": alone["seconds"],
        "fidelity_s": seconds,
        # Of that: the layers, and the head beside the artifact, loading included.
        "layers_s": report["reference_seconds"],
        "beside_artifact_s": row["seconds"],
        "ratio": seconds / (reference["seconds"] + alone["seconds"]),
        "reference_forward_peak_rss_bytes": reference["peak_rss_bytes"],
        "artifact_forward_peak_rss_bytes": alone["peak_rss_bytes"],
        "layers_peak_rss_bytes": report["reference_peak_rss_bytes"],
        "fidelity_peak_rss_bytes": row["peak_rss_bytes"],
        "command_rss_bytes": report["command_rss_bytes"],
        "mean_kl_nats": row["mean_kl_nats"],
    }


def medians(artifact: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several rounds, with the figures that are to be reached."""
    row = {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
    # The layers' process has ended when the artifact's begins.
    largest = max(row["fidelity_peak_rss_bytes"], row["layers_peak_rss_bytes"])
    above = largest + row["command_rss_bytes"] - row["artifact_forward_peak_rss_bytes"]
    return {
        "artifact": Path(artifact).name,
        **row,
        "above_models_bytes": above,
        "reached": {"time": row["ratio"] <= MOST_RATIO, "memory": above <= MOST_BYTES},
        "rounds": rounds,
    }


COLUMNS = (
    Column("artifact", "artifact"),
    Column("reference alone, s", "reference_forward_s", "{:,.1f}"),
    Column("artifact alone, s", "artifact_forward_s", "{:,.1f}"),
    Column("fidelity, s", "fidelity_s", "{:,.1f}"),
    Column("ratio", "ratio", "{:.2f}"),
    Column("above the models, MB", "above_models_bytes", "{:,.0f}", 1e-6),
)


def main() -> None:
    """Parse, measure, write the results file after every artifact."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shape", default="fox-1-1.6b", help="fox-1-1.6b (default) or nano")
    parser.add_argument("--checkpoint", help="instead of a random one under WORK")
    parser.add_argument("--artifact", nargs="+", help="instead of the exports under WORK")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    from fox_edge.checkpoint import Checkpoint

    checkpoint = args.checkpoint or str(random_exports(args.work, args.shape, EXPORTS))
    artifacts = args.artifact or [str(args.work / name) for name in EXPORTS]
    opened = Checkpoint.open(checkpoint)
    text = read_windows(
        opened.tokenizer(), opened.config.max_positions, tokens=args.tokens, window=args.window
    )
    rows: list[dict[str, Any]] = []
    for artifact in artifacts:
        rounds = [round_of(checkpoint, artifact, text, args.threads) for _ in range(args.rounds)]
        rows.append(medians(artifact, rounds))
        say(f"{artifact}: {rows[-1]['ratio']:.2f} times the two models' own time")
        write_results(
            args.results,
            {
                "command": study_command("fidelity_cost"),
                "machine": machine(),
                "shape": args.shape,
                "text": text.to_json(),
                "to_reach": {"ratio": MOST_RATIO, "above_models_bytes": MOST_BYTES},
                "results": rows,
            },
        )
    print(render(COLUMNS, rows))


if __name__ == "__main__":
    main()
