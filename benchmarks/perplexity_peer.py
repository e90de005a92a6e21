"""Our divergence beside llama-perplexity's, on the same model, text and windows.

    python -m benchmarks.perplexity_peer WORK --llama-cpp SOURCE BUILD --results FILE.json [--checkpoint nano]

SOURCE has convert_hf_to_gguf.py, BUILD bin/llama-perplexity. Theirs: the checkpoint converted to a GGUF of
float32, its log-probabilities written to a file in 16 bits (--kl-divergence-base), our GGUF exports held
against that file (--kl-divergence). Ours: the same exports against the checkpoint in float32, with no file.
The KV cache of their reference is float32, so that both references are the same but for the order of sums;
attention is computed in steps on both sides (in one pass, llama.cpp's results depend on the batch's size).
Their converter does not say whether a space goes before a text, so they are told; that both sides compare the
same tokens is checked.

Every difference is told beside what their 16 bits alone do to our own figures: our logits are rounded as they
round them and summed as they sum them (`as_stored`, `stored_divergence`). WORK is a scratch folder.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import open_subject
from benchmarks.common.table import Column, render
from benchmarks.fidelity.divergence import look, perplexities, side_by_side, summary
from benchmarks.fidelity.job import session_logits
from benchmarks.fidelity.reference import ReferenceHead, hidden_states
from benchmarks.fidelity.texts import WINDOW, Windows, built_in_text, read_windows
from benchmarks.processes.commands import fox_edge, run
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import Logits, SessionOptions

QUANTS = ("int8", "int4", "q2_k")
TOKENS = 8192
# Their base file: 16 nats below the likeliest token in 65,535 steps; what is rarer than e^-16 is left out.
_RANGE, _STEPS = 16.0, 65535
# What their report is searched for: our key, their words.
_FIGURES = {
    "perplexity": "Mean PPL(Q)",
    "reference_perplexity": "Mean PPL(base)",
    "perplexity_ratio": "Mean PPL(Q)/PPL(base)",
    "mean_kl_nats": "Mean    KLD",
    "max_kl_nats": "Maximum KLD",
    "p99_kl_nats": "99.0%   KLD",
    "median_kl_nats": "Median  KLD",
    "top1_agreement_percent": "Same top p",
}
_ERRORS = {
    "perplexity_ratio_se": "Mean PPL(Q)/PPL(base)",
    "mean_kl_se_nats": "Mean    KLD",
    "top1_se_percent": "Same top p",
}


def parse_report(text: str) -> dict[str, float]:
    """The figures that llama-perplexity printed; raises FoxEdgeError for one that is missing."""
    found: dict[str, float] = {}
    for keys, pattern in ((_FIGURES, r"{}\s*:\s*(\S+)"), (_ERRORS, r"{}\s*:\s*\S+ ±\s*(\S+)")):
        for key, words in keys.items():
            match = re.search("^" + pattern.format(re.escape(words)), text, re.MULTILINE)
            if match is None:
                raise FoxEdgeError(f"llama-perplexity printed no '{words}': {text[-500:]}")
            found[key] = float(match[1].rstrip("%"))
    return found


# --- what their 16 bits do -------------------------------------------------------------------------------


@dataclass
class Stored:
    """One row of log-probabilities as their file has it: steps (V,), and the step and the least of them."""

    steps: NDArray[np.float32]
    scale: np.float32
    least: np.float32

    def log_p(self) -> NDArray[np.float32]:
        """Log-probabilities (V,) as they are read again."""
        return self.scale * self.steps + self.least


def as_stored(logits: Logits) -> Stored:
    """A row of logits (V,) as llama-perplexity writes it: linear steps from the likeliest down 16 nats."""
    top = logits.max()
    low = max(logits.min(), np.float32(top - np.float32(_RANGE)))
    log_mass = np.float32(math.log(np.exp(logits - top).sum(dtype=np.float64)))
    scale = np.float32((top - low) / np.float32(_STEPS))
    steps = np.zeros_like(logits)
    if scale:
        steps = np.rint(np.where(logits > low, (logits - low) / scale, np.float32(0)))
    return Stored(steps, scale, np.float32(low - top - log_mass))


def stored_divergence(reference: Stored, artifact: Logits) -> float:
    """KL as they sum it: over tokens whose stored log-probability is above -16."""
    log_p = reference.log_p()
    top = artifact.max()
    log_mass = np.float32(top + np.float32(math.log(np.exp(artifact - top).sum(dtype=np.float64))))
    counted = log_p > -_RANGE
    p = np.exp(log_p[counted])
    return float((p * (log_p[counted] - artifact[counted] + log_mass)).sum(dtype=np.float64))


def rounded_figures(
    reference: Iterator[Logits], artifact: Iterator[Logits], text: Windows
) -> dict[str, float]:
    """Our own logits through their file: the figures that their rounding can touch."""
    kl, same, nll, other_nll, targets = [], [], [], [], iter(text.targets())
    for a, b in side_by_side(reference, artifact):
        for row, other in zip(a, b, strict=True):
            stored = as_stored(row)
            kl.append(stored_divergence(stored, other))
            same.append(stored.steps.argmax() == other.argmax())
            token = next(targets)
            nll.append(-float(stored.log_p()[token]))
            other_nll.append(_nll(other, token))
    return {
        "mean_kl_nats": float(np.mean(kl)),
        "median_kl_nats": float(np.median(kl)),
        "p99_kl_nats": float(np.percentile(kl, 99)),
        "max_kl_nats": float(np.max(kl)),
        "top1_agreement_percent": 100 * float(np.mean(same)),
        "reference_perplexity": math.exp(float(np.mean(nll))),
        "perplexity_ratio": math.exp(float(np.mean(other_nll) - np.mean(nll))),
    }


def _nll(logits: Logits, token: int) -> float:
    """-log p of one token, of a row of logits (V,)."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[token])


# --- both sides ---------------------------------------------------------------------------------------------


class Ours:
    """A checkpoint's float32 reference over a text, and artifacts held against it."""

    def __init__(self, checkpoint: Checkpoint, text: Windows) -> None:
        self._text = text
        states = hidden_states(checkpoint, text.inputs, text.first)
        self._hidden = np.concatenate([some.flatten(0, 1).numpy() for some in states])
        self._head = ReferenceHead(checkpoint)

    def figures(self, folder: Path, threads: int) -> dict[str, Any]:
        """Exact figures, and 'rounded': the same behind their 16 bits."""
        text, length = self._text, self._text.length
        options = SessionOptions(context=length, threads=threads, cache=False, flash_attention=False)
        with contextlib.closing(open_subject(folder).open_session(options)) as session:
            found = look(self._head.logits(self._hidden), session_logits(session, text), text.targets())
            rounded = rounded_figures(self._head.logits(self._hidden), session_logits(session, text), text)
        return {**summary(found).to_json(), **perplexities(found), "rounded": rounded}


class Theirs:
    """llama-perplexity with a base file of the same checkpoint and text."""

    def __init__(self, work: Path, llama_cpp: Sequence[Path], window: int, threads: int) -> None:
        self._source, self._build = llama_cpp
        self._work, self._window, self._threads = work, window, threads
        self._base = work / "base.kld"

    def make_base(self, checkpoint: Checkpoint, file: Path, text: Windows) -> None:
        """Convert to float32 and write the base file; the KV cache of this run is float32 too.

        Raises FoxEdgeError when they cut the text into other tokens than ours.
        """
        whole = self._work / "checkpoint-f32.gguf"
        convert = [sys.executable, self._source / "convert_hf_to_gguf.py", checkpoint.path]
        run(
            [*convert, "--outfile", whole, "--outtype", "f32"],
            {"PYTHONPATH": str(self._source / "gguf-py")},
        )
        prefix = str(checkpoint.tokenizer().add_space_prefix).lower()
        space = ("--override-kv", f"tokenizer.ggml.add_space_prefix=bool:{prefix}")
        self._perplexity(whole, "--file", file, *space, "--cache-type-k", "f32", "--cache-type-v", "f32")
        check_tokens(self._base, text)

    def figures(self, model: Path) -> dict[str, float]:
        """What they find for a GGUF."""
        return parse_report(self._perplexity(model, "--kl-divergence"))

    def _perplexity(self, model: Path, *words: object) -> str:
        command = [self._build / "bin" / "llama-perplexity", "--model", model, "--ctx-size", self._window]
        command += ["--threads", self._threads, "--gpu-layers", 0, "--flash-attn", "off"]
        command += ["--kl-divergence-base", self._base]
        cost = run([*command, *words])
        return cost.stdout + cost.stderr


def check_tokens(base: Path, text: Windows) -> None:
    """Raises FoxEdgeError when a base file's tokens are not the windows', the first of each left out.

    The file begins with a magic word of 8 bytes, then int32: window, vocabulary, windows, all token ids.
    """
    length, count = text.length, len(text.windows)
    found = np.fromfile(base, np.int32, 5 + length * count)
    if (found[2], found[4]) != (length, count):
        raise FoxEdgeError(f"{base}: {found[4]} windows of {found[2]} tokens, not {count} of {length}")
    # They write down the token that <bos> stands in for.
    theirs, ours = found[5:].reshape(count, length)[:, 1:], np.array(text.windows)[:, 1:]
    if differing := int((theirs != ours).sum()):
        raise FoxEdgeError(f"{base}: {differing} of {ours.size} tokens are not the checkpoint's")


def compared(name: str, ours: dict[str, Any], theirs: dict[str, float]) -> dict[str, Any]:
    """One row: both sides, ours less theirs, and our rounded figures less theirs."""
    rounded = ours["rounded"]
    return {
        "artifact": name,
        "ours": ours,
        "theirs": theirs,
        "difference": {key: ours[key] - value for key, value in theirs.items()},
        "rounded_difference": {key: value - theirs[key] for key, value in rounded.items()},
        "relative_mean_kl": ours["mean_kl_nats"] / theirs["mean_kl_nats"] - 1,
    }


COLUMNS = (
    Column("artifact", "artifact"),
    Column("mean KL: ours", "ours_kl", "{:.6f}"),
    Column("rounded as theirs", "rounded_kl", "{:.6f}"),
    Column("theirs", "theirs_kl", "{:.6f}"),
    Column("p99: ours", "ours_p99", "{:.6f}"),
    Column("theirs", "theirs_p99", "{:.6f}"),
    Column("top-1, %: ours", "ours_top", "{:.3f}"),
    Column("theirs", "theirs_top", "{:.3f}"),
    Column("ratio: ours", "ours_ratio", "{:.6f}"),
    Column("theirs", "theirs_ratio", "{:.6f}"),
)
_SHORT = {
    "kl": "mean_kl_nats",
    "p99": "p99_kl_nats",
    "top": "top1_agreement_percent",
    "ratio": "perplexity_ratio",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a person."""
    flat = [
        {"artifact": row["artifact"], "rounded_kl": row["ours"]["rounded"]["mean_kl_nats"]}
        | {f"{side}_{short}": row[side][key] for side in ("ours", "theirs") for short, key in _SHORT.items()}
        for row in rows
    ]
    return render(COLUMNS, flat, width=160)


def main() -> None:
    """Parse, run both sides for every export, write the results file after each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity_peer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-cpp", type=Path, nargs=2, metavar=("SOURCE", "BUILD"), required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--quant", nargs="+", default=list(QUANTS), help="GGUF exports to compare")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(args.checkpoint)
    tokenizer, file = checkpoint.tokenizer(), args.work / "text.txt"
    file.write_text(built_in_text(tokenizer, args.tokens), encoding="utf-8", newline="")
    # They take all whole windows of a file; so do we.
    whole = len(tokenizer.encode(built_in_text(tokenizer, args.tokens), bos=tokenizer.add_bos))
    text = read_windows(
        tokenizer, checkpoint.config.max_positions, file=file, tokens=whole, window=args.window
    )
    ours, theirs = Ours(checkpoint, text), Theirs(args.work, args.llama_cpp, args.window, args.threads)
    theirs.make_base(checkpoint, file, text)
    rows: list[dict[str, Any]] = []
    for quant in args.quant:
        folder = args.work / f"{args.checkpoint}-gguf-{quant}"
        if not folder.exists():
            words = ("--format", "gguf", "--quant", quant, "--max-mean-kl", "10", "--greedy-tokens", "0")
            fox_edge("export", args.checkpoint, folder, *words)
        model = next(folder.glob("*.gguf"))
        rows.append(compared(folder.name, ours.figures(folder, args.threads), theirs.figures(model)))
        say(f"{folder.name}: mean KL {100 * rows[-1]['relative_mean_kl']:+.2f} % beside theirs")
        write_results(
            args.results,
            {
                "command": study_command("perplexity_peer"),
                "machine": machine(),
                "checkpoint": args.checkpoint,
                "text": text.to_json(),
                "results": rows,
            },
        )
    print(table(rows))


if __name__ == "__main__":
    main()
