"""The runs: each export answers prompts and scores a text, on x86 and on every emulated processor.

All by the same program (guest.py). What a run found is kept until the check is through, so that one that was
cut off goes on where it was. Knows what is asked and how it is started; not what it should come to.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.tasks import TaskOptions, word_problems_task
from benchmarks.arm import guest
from benchmarks.arm.emulator import REPOSITORY, Emulator, Ended
from benchmarks.arm.llama_cpp import libraries, sources
from benchmarks.arm.processors import Processor
from benchmarks.arm.wheels import wheels
from benchmarks.fidelity.checks import LOGIT_TOKENS
from benchmarks.fidelity.divergence import reference_text
from benchmarks.processes.commands import fox_edge
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.partial import PartialFolder
from runtimes.base import Logits

# Format and --quant of the exports. q4_0 is what llama.cpp rearranges for ARM's own products.
EXPORTS = (
    *(("gguf", "int8"), ("gguf", "int4"), ("gguf", "q4_0")),
    *(("onnx", "int8"), ("onnx", "int4")),
    *(("pte", "int8"), ("pte", "int4")),
)
PROMPTS, MOST_TOKENS = 4, 64
X86 = "x86-64"
# One thread: an emulator's threads wait for one another at great length.
THREADS = 1

# Runs the project's Python with these arguments.
Start = Callable[[Sequence[str]], Ended]


@dataclass(frozen=True)
class Found:
    """What one export said on one processor: guest.py's words, its logits (n, V), instructions used."""

    said: Mapping[str, Any]
    logits: Logits
    instructions: Mapping[str, int] = field(default_factory=dict)


def job_of(checkpoint: Checkpoint, artifact: Artifact) -> dict[str, Any]:
    """What is asked of an export, in token ids: a text to score, and word problems to answer."""
    tokenizer = checkpoint.tokenizer()
    chats = word_problems_task(TaskOptions(limit=PROMPTS)).prompts
    prompts = [tokenizer.encode_chat(chat) for chat in chats if not isinstance(chat, str)]
    text = tokenizer.encode(reference_text(), bos=True)[:LOGIT_TOKENS]
    longest = max(len(text), *(len(prompt) + MOST_TOKENS for prompt in prompts))
    return {
        "artifact": str(artifact.path.resolve()),
        "context": min(longest, artifact.manifest.context),
        "threads": THREADS,
        "text": text,
        "prompts": prompts,
        "stop": sorted(tokenizer.stop_ids),
        "most": MOST_TOKENS,
    }


def export(work: Path, format: str, quant: str) -> Artifact:
    """An export of the embedded model, made when it is not there; raises FoxEdgeError."""
    target = work / "exports" / f"nano-{format}-{quant}"
    if not target.exists():
        fox_edge("export", "nano", target, "--format", format, "--quant", quant)
    return Artifact.open(target)


# --- one run -----------------------------------------------------------------------------------------------


def on_x86(work: Path, artifact: Artifact, job: Mapping[str, Any]) -> Found:
    """An export on this machine; raises FoxEdgeError."""

    def start(words: Sequence[str]) -> Ended:
        path = {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | path)
        return Ended(done.returncode, done.stdout, done.stderr)

    return _kept(work / "runs" / f"{artifact.path.name}-{X86}", artifact, job, X86, start)


def on_arm(
    work: Path, emulator: Emulator, processor: Processor, artifact: Artifact, job: Mapping[str, Any]
) -> Found:
    """An export on an emulated processor; raises FoxEdgeError, also when it dies there."""
    format = artifact.manifest.format
    paths = [REPOSITORY, wheels(work, emulator.root, format)]
    environment = {}
    if format == "gguf":
        # llama-cpp-python's own Python files, which load the libraries from where they are told to.
        paths.append(sources(work))
        environment["LLAMA_CPP_LIB_PATH"] = str(libraries(work, processor.march).resolve())
    environment["PYTHONPATH"] = os.pathsep.join(str(path.resolve()) for path in paths)

    def start(words: Sequence[str]) -> Ended:
        return emulator.python(processor, words, environment=environment, count=True)

    folder = work / "runs" / f"{artifact.path.name}-{processor.name}"
    return _kept(folder, artifact, job, processor.qemu, start)


def _kept(folder: Path, artifact: Artifact, job: Mapping[str, Any], where: str, start: Start) -> Found:
    """A run, or what it left when a check was cut off after it; raises FoxEdgeError when it ends badly."""
    digest = hashlib.sha256((artifact.path / "manifest.json").read_bytes()).hexdigest()
    program = hashlib.sha256(Path(guest.__file__).read_bytes()).hexdigest()
    identity = json.loads(json.dumps({"job": job, "where": where, "export": digest, "program": program}))
    ended_file, identity_file = "ended.json", "identity.json"
    if not _is(folder / identity_file, identity):
        with PartialFolder(folder) as partial:
            task = partial.path / "job.json"
            task.write_text(json.dumps(job), encoding="utf-8")
            ended = start(["-m", "benchmarks.arm.guest", str(task.resolve()), str(partial.path.resolve())])
            if complaint := ended.complaint():
                raise FoxEdgeError(complaint)
            (partial.path / ended_file).write_text(json.dumps(ended.instructions), encoding="utf-8")
            (partial.path / identity_file).write_text(json.dumps(identity), encoding="utf-8")
            partial.put_in_place()
    return Found(
        said=json.loads((folder / guest.SAID).read_text(encoding="utf-8")),
        logits=np.load(folder / guest.LOGITS, allow_pickle=False),
        instructions=json.loads((folder / ended_file).read_text(encoding="utf-8")),
    )


def _is(path: Path, identity: Any) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == identity)
    except (OSError, ValueError):
        return False
