"""What `fox-edge inspect` says that a model will take, beside what it takes.

    python -m benchmarks.memory WORK --results FILE.json [--shape fox-1-1.6b] [--context N ...]

Every runtime, type of KV cache and context: the prediction of one fresh process, and the peak of another that
loads the tokenizer and the model, fills all but the last positions of the context with a prompt, and decodes.
WORK is a scratch folder; a random checkpoint of the shape and its exports are made there where they are
missing (Fox-1's shape takes 6 GB and some minutes). Memory does not depend on how busy a machine is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine, memory
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import TORCH_PREFIX, open_subject
from benchmarks.common.table import Column, render
from benchmarks.processes.commands import fox_edge, random_exports
from benchmarks.processes.launch import run_worker
from fox_edge.progress import say
from runtimes.base import SessionOptions
from runtimes.generate import GREEDY, generate

DECODE_TOKENS = 2
# What is measured: the name under WORK, the choices with which it is opened.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gguf-int4", {}),
    ("gguf-int4", {"repack": False}),
    ("gguf-int4", {"mmap": False}),
    ("gguf-int4", {"kv": "q8_0"}),
    ("gguf-int4", {"kv": "q4_0"}),
    ("onnx-int4", {}),
    ("onnx-int4", {"kv": "int8"}),
    (f"{TORCH_PREFIX}checkpoint", {}),
)
EXPORTS = {
    "gguf-int4": ("--format", "gguf", "--quant", "int4"),
    "onnx-int4": ("--format", "onnx", "--quant", "int4", "--rounding", "nearest"),
}


def run_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'memory': {subject, context, session, threads} -> resident memory, step by step."""
    subject = open_subject(job["subject"])
    subject.prepare()
    tokenizer = subject.tokenizer()
    tokens = tokenizer.encode("What a process holds is what it was given. ", bos=True)
    count = job["context"] - DECODE_TOKENS
    prompt = (tokens * -(-count // len(tokens)))[:count]
    before = memory()
    options = SessionOptions(context=job["context"], threads=job["threads"], **job["session"])
    session = subject.open_session(options)
    opened = memory()
    made = list(generate(session, prompt, GREEDY, max_tokens=DECODE_TOKENS + 1))
    tokenizer.decode(made)
    after = memory()
    session.close()
    return {
        "before_bytes": before.rss,
        "opened_peak_bytes": opened.peak_rss,
        "peak_rss_bytes": after.peak_rss,
        "anonymous_bytes": after.anonymous,
        "file_bytes": after.file,
    }


def flags(session: dict[str, Any]) -> Iterator[str]:
    """The words of the command line for these choices."""
    for name, value in session.items():
        yield f"--{name.replace('_', '-')}"
        yield ("off", "on")[value] if isinstance(value, bool) else str(value)


def compare(target: str, context: int, session: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """One row: predicted, measured, and the ratio of the two."""
    named = target.removeprefix(TORCH_PREFIX)
    predicted = fox_edge("inspect", named, "--context", str(context), *flags(session))["memory"]
    job = {"subject": target, "context": context, "session": session, "threads": threads}
    measured = run_worker({"task": "memory", **job})
    ratio = predicted["total_bytes"] / measured["peak_rss_bytes"]
    return {
        "artifact": Path(target).name,
        "runtime": predicted["runtime"],
        "kv": predicted["kv"],
        "context": context,
        "session": session,
        "predicted": predicted,
        "measured": measured,
        "ratio": ratio,
    }


COLUMNS = (
    Column("runtime", "runtime"),
    Column("KV cache", "kv"),
    Column("choices", "choices"),
    Column("context", "context", "{:,}"),
    Column("predicted MB", "predicted_bytes", "{:,.0f}", 1e-6),
    Column("peak RSS MB", "measured_bytes", "{:,.0f}", 1e-6),
    Column("ratio", "ratio", "{:.3f}"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    flat = [
        row
        | {
            "choices": " ".join(f"{k} {v}" for k, v in row["session"].items() if k != "kv") or "-",
            "predicted_bytes": row["predicted"]["total_bytes"],
            "measured_bytes": row["measured"]["peak_rss_bytes"],
        }
        for row in rows
    ]
    return render(COLUMNS, flat)


def main() -> None:
    """Parse, measure, write the results file after every row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shape", default="fox-1-1.6b", help="fox-1-1.6b (default) or nano")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--only", help="measure only artifacts of this name")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    random_exports(args.work, args.shape, EXPORTS)
    rows: list[dict[str, Any]] = []
    for name, session in CASES:
        kind = TORCH_PREFIX if name.startswith(TORCH_PREFIX) else ""
        if args.only not in (None, name):
            continue
        for context in args.context:
            target = kind + str(args.work / name.removeprefix(TORCH_PREFIX))
            rows.append(compare(target, context, session, args.threads))
            say(f"{name} {session} {context}: {rows[-1]['ratio']:.3f}")
            command = study_command("memory")
            write_results(
                args.results,
                {"command": command, "machine": machine(), "shape": args.shape, "rows": rows},
            )
    print(table(rows))


if __name__ == "__main__":
    main()
