"""One measurement in a process of its own: a job comes on stdin, JSON lines go to stdout.

    python -m benchmarks.processes.worker < job.json

A job is an object with 'task' and what that task needs. Lines: {"progress": [done, total]} any number of
times, then {"result": {...}}, or {"error": "one sentence"} for a mistake of the user's. Knows which function
does which task; a bug ends the process with a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from benchmarks.processes.launch import die_with_parent
from fox_edge.errors import FoxEdgeError
from runtimes.base import load

# Task -> "module:function"; called with (job, progress).
TASKS = {
    "measure": "benchmarks.latency.measure:run_job",
    "answer": "benchmarks.accuracy.answer:run_job",
    "lm-eval": "benchmarks.accuracy.lm_eval_tasks:run_job",
    "memory": "benchmarks.memory:run_job",
    "card-rates": "benchmarks.devices.card_rates:run_job",
    "gpu": "benchmarks.gpu.study:run_job",
    "footprint": "benchmarks.devices.fit:run_job",
    "fidelity-reference": "benchmarks.fidelity.job:run_reference_job",
    "fidelity": "benchmarks.fidelity.job:run_job",
    "forward": "benchmarks.fidelity_cost:run_job",
    "tune": "benchmarks.latency.tune:run_job",
    "speculation": "benchmarks.speculation:run_job",
    "sweep-export": "benchmarks.sweep.step:run_export",
}


def main() -> None:
    """Do the job on stdin."""
    die_with_parent()
    # Native libraries print to stdout as they like: from here on, file descriptor 1 is stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        try:
            result = load(TASKS[job["task"]])(job, lambda done, total: _say(out, progress=[done, total]))
        except FoxEdgeError as error:
            _say(out, error=str(error))
        else:
            _say(out, result=result)


def _say(out: TextIO, **line: Any) -> None:
    print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
