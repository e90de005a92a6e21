"""The main job on one checkpoint: four exports, verified, measured, questioned, and one report of it all.

Drives the same verbs and functions that a user has; exports run as the command line itself, each in a fresh
process, so that the demo knows the exporters by their artifacts only.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.evaluate import evaluate
from benchmarks.common.results import command_text
from benchmarks.common.subject import TORCH_PREFIX, open_subject
from benchmarks.devices.profiles import PROFILES
from benchmarks.fidelity.checks import LOGIT_TOKENS
from benchmarks.fidelity.divergence import compare, reference_text
from benchmarks.fidelity.reference import ReferenceScorer
from benchmarks.latency.bench import bench
from benchmarks.report.document import make_report, need_folder, report_text, write_report
from benchmarks.report.findings import findings
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import SessionOptions
from runtimes.chat.chat import Chat

EXPORTS = (("gguf", "int8"), ("gguf", "int4"), ("onnx", "int8"), ("onnx", "int4"))
QUESTION = "Ivy buys 4 crates of 12 apples. She gives 9 apples to Julia. How many does she have left?"
TASK = "word-problems"
_ANSWER_TOKENS = 160
_CONTEXT = 512


def demo(
    out: Path,
    *,
    checkpoint: str = "nano",
    problems: int = 50,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run everything; artifacts, report.json, .md and .html go into `out`. Returns the report.

    Raises FoxEdgeError when an export fails; what was there under the artifacts' names is replaced.
    """
    start = time.monotonic()
    source = Checkpoint.open(checkpoint)
    need_folder(out)
    name = source.path.name if Path(checkpoint).exists() else checkpoint.replace("/", "-")
    reference = TORCH_PREFIX + checkpoint
    specs = [str(out / f"{name}-{format}-{quant}") for format, quant in EXPORTS]
    fidelity = {reference: _reference_fidelity(source, reference)}
    commands = []
    for (format, quant), spec in zip(EXPORTS, specs, strict=True):
        command = ["export", checkpoint, spec, "--format", format, "--quant", quant, "--replace"]
        commands.append(command_text(*command))
        fidelity[spec] = _export(command)
    everything = [*specs, reference]
    say("measuring each in fresh processes")
    measured = bench(everything, repeats=1)
    say(f"asking each the same {problems} word problems")
    graded = evaluate([reference, *specs], task=TASK, limit=problems)
    answers = {spec: _answer(spec) for spec in everything}
    names = {spec: f"{format.upper()} {quant}" for (format, quant), spec in zip(EXPORTS, specs, strict=True)}
    commands += [
        command_text("bench", *everything),
        command_text("eval", *everything, "--task", TASK, "--limit", problems),
    ]
    report = make_report(
        measured,
        checkpoint=checkpoint,
        names=names | {reference: "PyTorch BF16"},
        fidelity=fidelity,
        evaluations=[graded],
        profiles=[profile.to_json() for profile in PROFILES.values()],
        answers=answers,
        question=QUESTION,
        commands=commands,
    )
    data, _, page = write_report(report, out)
    show(report_text(report))
    show("")
    for sentence in findings(report["rows"]):
        show(sentence)
    show(f"\n{QUESTION}")
    for row in report["rows"]:
        show(f"  {row['name']:<13} {row['answer']}")
    show(f"\n{page} and {data} in {time.monotonic() - start:.0f} s")
    return report


def _export(command: Sequence[str]) -> dict[str, Any]:
    """Run `fox-edge export`; returns its JSON, which holds what verification found."""
    done = subprocess.run(
        [sys.executable, "-m", "fox_edge.cli", *command, "--json"],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        # Its own sentence went to stderr already.
        raise FoxEdgeError(f"'fox-edge {' '.join(command)}' ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    say(
        f"{command[2]}: {result['bytes'] / 1e6:,.1f} MB in {result['seconds']:.1f} s, "
        f"verified (mean KL {result['mean_kl_nats']:.2g} nats)"
    )
    return result


def _reference_fidelity(checkpoint: Checkpoint, spec: str) -> dict[str, Any]:
    """What bfloat16 arithmetic alone costs: the torch model against the float32 reference."""
    tokens = checkpoint.tokenizer().encode(reference_text(), bos=True)
    tokens = tokens[: min(LOGIT_TOKENS, checkpoint.config.max_positions)]
    options = SessionOptions(context=len(tokens))
    with contextlib.closing(open_subject(spec).open_session(options)) as session:
        return compare(ReferenceScorer(checkpoint).logits(tokens), session.score(tokens)).to_json()


def _answer(spec: str) -> str:
    """What a model says to the question, on one line."""
    subject = open_subject(spec)
    context = min(_CONTEXT, subject.context)
    with contextlib.closing(subject.open_session(SessionOptions(context=context))) as session:
        chat = Chat(session, subject.tokenizer(), max_tokens=_ANSWER_TOKENS)
        return " ".join("".join(chat.ask(QUESTION)).split())
