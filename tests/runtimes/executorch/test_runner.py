"""The folder in ExecuTorch's own runner, the C++ class that its Android library and iOS framework wrap."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from runtimes.base import SessionOptions
from runtimes.executorch.runner_tokenizer import RunnerTokenizer
from runtimes.executorch.session import PteSession
from runtimes.generate import Sampling, generate

ROOT = Path(__file__).parents[3]
COUNT = 24
PROMPT = "the fox and the hello world user model, how many are there in all each day?"


def documented_lines() -> str:
    """The lines of docs/phone.md that run the runner."""
    page = (ROOT / "docs" / "phone.md").read_text("utf-8")
    (found,) = re.findall(r"```python\n([^`]*TextLLMRunner[^`]*)```", page)
    return str(found)


def test_its_greedy_text_is_ours(tiny_pte: Artifact, tiny: Checkpoint) -> None:
    tokenizer, path = tiny.tokenizer(), RunnerTokenizer(tiny_pte.path).path
    prompt = tokenizer.encode(PROMPT, bos=True)
    with contextlib.closing(PteSession(tiny_pte, SessionOptions(threads=1))) as session:
        ours = list(generate(session, prompt, Sampling(temperature=0.0), tokenizer.stop_ids, COUNT))
    lines = documented_lines().replace('"fox-phone/model.pte"', repr(str(tiny_pte.model_path)))
    lines = lines.replace('"fox-phone/executorch-tokenizer.json"', repr(str(path)))
    # A text that is not from a chat's template has no <bos> of its own.
    lines = lines.replace("max_new_tokens=32", f"max_new_tokens={COUNT}, num_bos=1")
    program = f"prompt, pieces = {PROMPT!r}, []\n{lines}\nprint('ANSWER', ascii(''.join(pieces)))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (answer,) = re.findall(r"ANSWER (.*)", run.stdout)
    assert answer == ascii(tokenizer.decode(ours))
