"""How one step of a sweep is done, on this machine or on a cluster's: a fresh process, and its outcome.

An export is the command line's own verb, so that benchmarks know exporters by their artifacts only. Knows
jobs and outcomes; not which step comes when.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.machine import versions
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.artifact import MANIFEST, sha256_file
from fox_edge.errors import FoxEdgeError


def with_threads(job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A step's job, told how many threads it has."""
    if job["task"] == "sweep-export":
        return {**job, "words": [*job["words"], "--threads", str(threads)]}
    return {**job, "threads": threads}


def do(job: Mapping[str, Any], started: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Do a job in a fresh process; returns {result or error, seconds, host}, which is plain data.

    `started` is given the process, so that somebody else may end it.
    """
    start = time.monotonic()
    try:
        outcome: dict[str, Any] = {"result": run_worker(dict(job), started=started)}
    except WorkerError as error:
        outcome = {"error": str(error)}
    return {**outcome, "seconds": time.monotonic() - start, "host": platform.node()}


def do_elsewhere(job: Mapping[str, Any], sight: str, expected: Mapping[str, str]) -> dict[str, Any]:
    """`do` on another machine, which must see the sweep's folder and have the same libraries.

    `sight` is a file in that folder, `expected` the versions of the machine that drives the sweep.
    """
    host = platform.node()
    if not Path(sight).is_file():
        folder = Path(sight).parent
        return {
            "error": f"{host} does not see {folder}: a sweep's folder must be one that all machines share"
        }
    found = versions()
    for name, version in expected.items():
        if found.get(name) != version:
            has = f"{name} {found[name]}" if name in found else f"no {name}"
            return {"error": f"{host} has {has}, but the sweep was started with {version}"}
    return do(job)


def run_export(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'sweep-export': {words} -> what the verb prints, and the manifest's sha256.

    Raises FoxEdgeError with the verb's own sentence.
    """
    from fox_edge.cli import main

    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        status = main(job["words"])
    if status:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        sentence = lines[-1] if lines else f"the export ended with status {status}"
        raise FoxEdgeError(sentence.removeprefix("fox-edge export: "))
    result: dict[str, Any] = json.loads(out.getvalue())
    return result | {"manifest_sha256": sha256_file(Path(result["artifact"]) / MANIFEST)}
