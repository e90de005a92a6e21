"""What rounding costs, at equal bytes: the embedded model by every way of rounding, ours beside the peers.

    python -m benchmarks.rounding WORK --data TEST.jsonl --results FILE.json [--genai PYTHON]

WORK is a scratch folder; TEST.jsonl is GSM8K's test split, on whose text every model's logits are compared
with the float32 reference's. Calibration is the exporter's own built-in text. Peers are made when PYTHON has
onnxruntime-genai: its builder at its own default, block 32, with onnxruntime's `default` and `k_quant`
rounding and one shared embedding. Each row is the model as it ships (int8 activations); for ours also with
float32 activations, and how often the two choose different tokens. Runs for a few minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.gsm8k import read_split
from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import Subject, open_subject
from benchmarks.fidelity.divergence import Fidelity, compare
from benchmarks.fidelity.reference import ReferenceScorer
from benchmarks.onnx_shape import peer_versions
from fox_edge.checkpoint import Checkpoint
from fox_edge.progress import say
from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits, SessionOptions

WINDOWS, WINDOW = 32, 256
# Name, format, --quant and --rounding of our exports.
OURS = (
    ("onnx-int4", "onnx", "int4", "compensated"),
    ("onnx-int4-search", "onnx", "int4", "search"),
    ("onnx-int4-nearest", "onnx", "int4", "nearest"),
    ("onnx-q4a64", "onnx", "q4a64", "compensated"),
    ("onnx-q4a32", "onnx", "q4a32", "compensated"),
    ("onnx-q2a32", "onnx", "q2a32", "compensated"),
    ("onnx-int8", "onnx", "int8", None),
    ("gguf-q4_k", "gguf", "q4_k", None),
    ("gguf-int4", "gguf", "int4", None),
    ("gguf-int8", "gguf", "int8", None),
)
# Name and builder options of the peer's.
PEERS = (
    ("genai-default-32", ("algo_config=default", "block_size=32")),
    ("genai-k_quant-32", ("algo_config=k_quant", "block_size=32")),
    ("genai-default-128", ("algo_config=default", "block_size=128")),
    ("genai-k_quant-128", ("algo_config=k_quant", "block_size=128")),
)


def windows(tokenizer: Tokenizer, data: Path) -> list[list[int]]:
    """WINDOWS windows of WINDOW tokens of questions and answers, each behind a <bos>."""
    questions = read_split("test", data, "--data")
    texts = (f"Question: {q.question}\nAnswer: {q.answer}\n\n" for q in questions)
    ids = chain.from_iterable(tokenizer.encode(text, bos=False) for text in texts)
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return [head + list(islice(ids, WINDOW - len(head))) for _ in range(WINDOWS)]


def scored(
    subject: Subject, texts: Iterable[list[int]], level: int | None, best: list[int]
) -> Iterator[Logits]:
    """Logits of all windows in turn; `best` receives the likeliest token at each position."""
    with closing(subject.open_session(SessionOptions(context=WINDOW, accuracy_level=level))) as session:
        for ids in texts:
            session.reset()
            for logits in session.score(ids):
                best.extend(logits.argmax(-1).tolist())
                yield logits


def measured(folder: Path, reference: ReferenceScorer, texts: list[list[int]]) -> dict[str, Any]:
    """One row: bytes and fidelity as it ships, and with float32 activations where that can be chosen."""
    subject = open_subject(folder)
    manifest = getattr(subject.source, "manifest", None)

    def fidelity(level: int | None) -> tuple[Fidelity, list[int]]:
        best: list[int] = []
        wanted = chain.from_iterable(reference.logits(ids) for ids in texts)
        return compare(wanted, scored(subject, texts, level, best)), best

    shipped, best = fidelity(None)
    row = {
        "artifact": folder.name,
        "bytes": sum(
            path.stat().st_size
            for path in folder.iterdir()
            if path.name.startswith("model") or path.suffix == ".gguf"
        ),
        "weight_bytes": subject.weight_bytes,
        "bits_per_weight": subject.bits_per_weight,
        **shipped.to_json(),
    }
    if manifest is not None and manifest.format == "onnx":
        row["rounding"] = manifest.recipe.get("rounding")
        exact, other = fidelity(1)
        row["float32_activations"] = exact.to_json()
        row["flipped_percent"] = 100 * float(np.mean(np.array(best) != np.array(other)))
    return row


def our_export(work: Path, name: str, format: str, quant: str, rounding: str | None) -> Path:
    """One export of the embedded model; wide limits, since bad rounding is what is looked at."""
    target = work / name
    command = [sys.executable, "-m", "fox_edge.cli", "export", "nano", str(target), "--format", format]
    command += ["--quant", quant, "--replace", "--max-mean-kl", "10", "--greedy-tokens", "0"]
    if rounding:
        command += ["--rounding", rounding]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return target


def peer_export(work: Path, checkpoint: Checkpoint, python: str, name: str, options: Iterable[str]) -> Path:
    """The same checkpoint by onnxruntime-genai's builder."""
    target = work / name
    shutil.rmtree(target, ignore_errors=True)
    command = [
        python,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(checkpoint.path),
        "-o",
        str(target),
    ]
    command += ["-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
    command += ["--extra_options", "shared_embeddings=true", *options]
    subprocess.run(
        command,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return target


def ratios(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes of the weights and mean KL of ours over each peer's at its default block of 32."""
    by_name = {row["artifact"]: row for row in rows}
    found = []
    for ours, peer in (
        *((ours, peer) for ours in ("onnx-int4", "onnx-q4a64", "onnx-q4a32") for peer, _ in PEERS[:2]),
        ("onnx-int4", "gguf-q4_k"),
        ("onnx-q4a32", "gguf-int4"),
    ):
        if ours in by_name and peer in by_name:
            one, other = by_name[ours], by_name[peer]
            found.append(
                {
                    "ours": ours,
                    "peer": peer,
                    "bytes": one["weight_bytes"] / other["weight_bytes"],
                    "mean_kl": one["mean_kl_nats"] / other["mean_kl_nats"],
                }
            )
    return found


def main() -> None:
    """Parse, export, measure, write the results file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounding", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--genai", metavar="PYTHON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open("nano")
    reference, texts = ReferenceScorer(checkpoint), windows(checkpoint.tokenizer(), args.data)
    rows = []
    folders: Iterator[Path] = (our_export(args.work, *ours) for ours in OURS)
    if args.genai:
        peers = (peer_export(args.work, checkpoint, args.genai, *peer) for peer in PEERS)
        folders = chain(folders, peers)
    for folder in folders:
        rows.append(measured(folder, reference, texts))
        say(f"{folder.name}: {rows[-1]['mean_kl_nats']:.5f} nats")
    results = {
        "command": study_command("rounding"),
        "machine": machine(),
        "peers": peer_versions(args.genai) if args.genai else {},
        "positions": WINDOWS * WINDOW,
        "rows": rows,
        "ratios": ratios(rows),
    }
    write_results(args.results, results)


if __name__ == "__main__":
    main()
