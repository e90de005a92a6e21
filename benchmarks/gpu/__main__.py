"""Fox-1's exact shape on one NVIDIA GPU, in one command of a few minutes; every figure beside its floor.

    python -m benchmarks.gpu WORK --results FILE.json [--part PART]... [--seconds N]

On a machine with a card, from the repository's root, without installing anything (PyTorch's CUDA build, 2.11
to 2.13, with triton, numpy, safetensors, sentencepiece, tokenizers, jinja2 and huggingface_hub; transformers
for the peer):

    PYTHONPATH=. python3 -m benchmarks.gpu ../scratch --results gpu.json
    PYTHONPATH=. python3 -m benchmarks.gpu ../scratch --results gpu.json --part kernels

WORK is a scratch folder with 4 GB free for a random checkpoint, which is made first. Parts: floors (the
card's bandwidth and BF16 rate), exact (logits and greedy text against the CPU), decode (BF16, int8, int4; the
paper's prompts), prompt (4,000 tokens), users (4 to 64), peer (Hugging Face's generate), questions (many at
once, and one by one), compiled (generate again, with the static cache that it compiles for), and, when asked
for by name, kernels (each against plain arithmetic, and its time).
Each measurement is a process of its own, and FILE is written after each: a run that is cut off keeps what it
has, and a part asked for again replaces only itself in an existing FILE. What fails says why there, with its
traceback in FILE.log. What was not begun after `--seconds` is not begun at all.

Without a card, `--shape nano --device cpu` rehearses all of it in small, through the same code.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.devices.card import find_card
from benchmarks.gpu.checkpoint import checkpoint_in
from benchmarks.gpu.goals import goal_rows, goals_text
from benchmarks.gpu.study import PARTS, Study, measure, plan
from fox_edge.config import SHAPES
from fox_edge.errors import FoxEdgeError
from fox_edge.gpu import find_gpu
from fox_edge.grammar import EXIT_MISTAKE
from fox_edge.progress import say

# Parts that take long, and are asked for by name.
_BY_NAME = ("kernels",)
_FOX, _NANO = "fox-1-1.6b", "nano"
_SECONDS = 560.0


def study_of(checkpoint: Path, shape: str, device: str) -> Study:
    """What is measured at a shape: the issue's figures at Fox-1's, a rehearsal at nano's."""
    study = Study(checkpoint, shape, device)
    if shape == _FOX:
        return study
    return replace(
        study,
        prompt_tokens=40,
        decode_tokens=6,
        long_prompt=300,
        users=(2,),
        texts=(2, 16),
        read=(60, 24, 3),
        rate_seconds=0.05,
        seconds=0.0,
        passes=(2, 2),
        peer_passes=1,
        questions=(4, 2, 6),
        at_once=4,
        buffers=(1 << 20,),
        products=((64, 256, 256),),
        kernel_seconds=0.0,
    )


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="scratch folder for a random checkpoint")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help=f"in all (default: {_SECONDS:g})")
    parser.add_argument("--shape", choices=tuple(SHAPES), default=_FOX)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, help="of the inputs of what must be exact (default: a fresh one)")
    args = parser.parse_args(argv)
    try:
        run(args, sys.argv[1:] if argv is None else argv)
    except FoxEdgeError as error:
        say(f"benchmarks.gpu: {error}")
        return EXIT_MISTAKE
    return 0


def run(args: argparse.Namespace, words: list[str]) -> None:
    """Make the checkpoint, measure the parts, and keep what was found; raises FoxEdgeError."""
    if args.device == "cuda" and isinstance(found := find_gpu(), str):
        raise FoxEdgeError(f"{found}; --shape nano --device cpu rehearses without a card")
    results = _before(args.results)
    if results and (results["shape"], results["device"]) != (args.shape, args.device):
        raise FoxEdgeError(
            f"{args.results}: holds results of {results['shape']} on {results['device']}, not of "
            f"{args.shape} on {args.device}; name another file"
        )
    parts = args.part or [part for part in PARTS if part not in _BY_NAME]
    card = find_card()
    results |= {
        "command": study_command("gpu", words),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": args.shape,
        "device": args.device,
        "machine": machine(),
        "card": card and {"name": card.name, "driver": card.driver, "memory_bytes": card.memory_bytes},
    }
    results.setdefault("parts", {})

    def save() -> None:
        results["goals"] = goal_rows(results)
        write_results(args.results, results)

    save()
    checkpoint = checkpoint_in(args.work, args.shape)
    study = replace(study_of(checkpoint, args.shape, args.device), seed=args.seed)
    measure(plan(study, parts), results, save, args.seconds, args.results.with_suffix(".log"))
    print(goals_text(results["goals"]))
    if args.device != "cuda":
        print("a rehearsal without a card: none of these figures is one")


def _before(path: Path) -> dict[str, Any]:
    """What an earlier run left; raises FoxEdgeError for a file of something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FoxEdgeError(f"{path}: not JSON ({error}); name another file") from None
    if not isinstance(found, dict) or not {"shape", "device", "parts"} <= set(found):
        raise FoxEdgeError(f"{path}: is no results file of this study; name another file")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
