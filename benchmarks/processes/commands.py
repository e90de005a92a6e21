"""Whole commands in fresh processes, and what each took: fox-edge's own verbs, and those of other tools.

For studies, which also share how a random checkpoint and exports of it are made once in a scratch folder.
Knows command lines, clocks and memory; not what is studied.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say

_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Cost:
    """What a whole command took. Peaks are of the largest single process; anonymous is sampled."""

    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    stdout: str
    stderr: str = ""


def run(command: Sequence[object], env: dict[str, str] | None = None) -> Cost:
    """Run a command to its end; raises FoxEdgeError with its last words when it fails."""
    say("$ " + " ".join(map(str, command)))
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | (env or {}),
    )
    peaks = {"VmHWM": 0, "RssAnon": 0}
    watcher = threading.Thread(target=watch, args=(process, peaks), daemon=True)
    watcher.start()
    out, err = process.communicate()
    seconds = time.monotonic() - start
    watcher.join()
    if process.returncode:
        raise FoxEdgeError(f"{command[0]} ended with {process.returncode}: {(err or out)[-2000:]}")
    return Cost(seconds, peaks["VmHWM"], peaks["RssAnon"], out, err)


def watch(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    """Sample a process's memory until it ends (Linux; elsewhere the peaks stay 0)."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            for line in status.read_text().splitlines():
                key = line.split(":")[0]
                if key in peaks:
                    peaks[key] = max(peaks[key], int(line.split()[1]) * 1024)
        except OSError:
            return
        time.sleep(_SAMPLE_S)


def fox_edge(*arguments: object) -> dict[str, Any]:
    """Run one verb with --json in a fresh process."""
    cost = run([sys.executable, "-m", "fox_edge.cli", *arguments, "--json"])
    result: dict[str, Any] = json.loads(cost.stdout)
    return result


def random_checkpoint(work: Path, shape: str = "fox-1-1.6b") -> Path:
    """The checkpoint of a shape, Fox-1's, in a scratch folder; made when it is not there."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        fox_edge("new", checkpoint, "--shape", shape, "--seed", "0")
    return checkpoint


def random_exports(work: Path, shape: str, exports: Mapping[str, Sequence[str]]) -> Path:
    """That checkpoint with exports beside it, name -> words of the verb; those that are missing are made."""
    checkpoint = random_checkpoint(work, shape)
    for name, words in exports.items():
        if not (work / name).exists():
            fox_edge("export", checkpoint, work / name, *words, "--max-mean-kl", "10", "--greedy-tokens", "0")
    return checkpoint
