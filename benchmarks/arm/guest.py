"""One export in its runtime, on whichever processor this is: logits of a text, and answers, into a folder.

    python -m benchmarks.arm.guest JOB.json OUT

The same program runs on x86 and inside the emulator. It imports as little as a runtime lets it: what is
compared with what, and PyTorch, are on the other side. Knows the project's sessions; nothing of emulators.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.grammar import EXIT_MISTAKE
from runtimes.base import Logits, Session, SessionOptions, open_session, runtime_name

SAID, LOGITS = "said.json", "logits.npy"
# Artifact format -> the package whose version names the runtime.
_PACKAGES = {"gguf": "llama-cpp-python", "onnx": "onnxruntime", "pte": "executorch"}


def answer(
    session: Session, prompt: Sequence[int], stop: Collection[int], most: int
) -> tuple[list[int], list[float]]:
    """The greedy answer to a prompt, and by how many nats each token was likelier than the next best."""
    session.reset()
    row = session.prefill(prompt)
    tokens: list[int] = []
    margins: list[float] = []
    while True:
        tokens.append(int(row.argmax()))
        margins.append(_margin(row))
        if tokens[-1] in stop or len(tokens) == most or session.length == session.context:
            return tokens, margins
        row = session.step(tokens[-1])


def _margin(row: Logits) -> float:
    second, first = np.partition(row, -2)[-2:]
    return float(first - second)


def run(job: dict[str, Any]) -> tuple[dict[str, Any], Logits]:
    """What a session makes of a job: its words, and logits (n, V) of the job's text."""
    artifact = Artifact.open(Path(job["artifact"]))
    format = artifact.manifest.format
    options = SessionOptions(context=job["context"], threads=job["threads"], cache=False)
    with closing(open_session(artifact, options)) as session:
        logits = np.concatenate([chunk.copy() for chunk in session.score(job["text"])])
        answers = [answer(session, prompt, job["stop"], job["most"]) for prompt in job["prompts"]]
    said = {
        "runtime": runtime_name(format),
        "version": _version(format),
        "says": _says(format),
        "answers": [tokens for tokens, _ in answers],
        "margins": [margins for _, margins in answers],
    }
    return said, logits


def _version(format: str) -> str | None:
    """The runtime's version; of what was not installed but built, that of the sources it was built from."""
    try:
        return metadata.version(_PACKAGES[format])
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get("llama_cpp"), "__version__", None)


def _says(format: str) -> str | None:
    """What a runtime says of the kernels that it was built with; None where it says nothing."""
    if format != "gguf":
        return None
    import llama_cpp.llama_cpp as lib

    said: bytes = lib.llama_print_system_info()
    return said.decode("utf-8", "replace").strip(" |")


def main(job: str, out: str) -> int:
    """Do a job and write what was found; the exit status."""
    try:
        said, logits = run(json.loads(Path(job).read_text(encoding="utf-8")))
    except FoxEdgeError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    np.save(Path(out) / LOGITS, logits, allow_pickle=False)
    (Path(out) / SAID).write_text(json.dumps(said), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
