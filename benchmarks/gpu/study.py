"""The parts of the study, one process per measurement: what is asked, for how long, and what became of it.

A kernel that writes where it must not takes the card away from its whole process, and memory is only told
true by a process that did nothing else: so every measurement has its own, with a limit on its time. What
fails says why in the results, and the others go on; whatever was found is kept at once. Knows jobs and their
order; how each is done, the modules named in `JOBS` do.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.devices.card import card_state
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import load

# What a job of the worker's task 'gpu' is, by its 'do': "module:function" of (job, progress).
JOBS = {
    "checkpoint": "benchmarks.gpu.checkpoint:checkpoint_job",
    "floors": "benchmarks.gpu.floors:floors_job",
    "logits": "benchmarks.gpu.exactness:logits_job",
    "greedy": "benchmarks.gpu.exactness:greedy_job",
    "kernels": "benchmarks.gpu.exactness:kernels_job",
    "speed": "benchmarks.gpu.speed:speed_job",
    "peer": "benchmarks.gpu.peers:peer_job",
    "questions": "benchmarks.gpu.questions:questions_job",
}
# The operations of runtimes/cuda/ops.py, each looked at alone.
KERNELS = ("embed", "norm_linear", "attend", "linear_add", "norm_gate_up", "head", "dequantize")
PARTS = ("floors", "exact", "decode", "prompt", "users", "peer", "questions", "compiled", "kernels")
# What is made before all of them.
CHECKPOINT = "checkpoint"
# Numbers of users beside one, as in the paper's workload.
USERS = (4, 16, 32, 64)
# What is still left to be done must have at least so long.
_LEAST_S = 10.0

Results = dict[str, Any]
Work = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """What is measured, on what: a checkpoint and its shape, a device, and how much of everything."""

    checkpoint: Path
    shape: str
    device: str
    prompt_tokens: int = 234
    decode_tokens: int = 512
    long_prompt: int = 4000
    paper: str = "paper"  # the workload whose memory is told
    users: Sequence[int] = USERS
    texts: tuple[int, int] = (6, 64)  # that must be answered as on the CPU, and tokens of each
    read: tuple[int, int, int] = (300, 24, 5)  # tokens of a prompt, tokens one by one, conversations
    rate_seconds: float = 2.0  # of each of the card's ceilings
    seconds: float = 6.0  # of passes, per measurement
    passes: tuple[int, int] | None = None
    peer_passes: int = 3
    questions: tuple[int, int, int] = (256, 12, 128)  # at once, one by one, tokens of an answer
    at_once: int = 64
    buffers: Sequence[int] = (4 << 30,)
    products: Sequence[tuple[int, int, int]] | None = None
    kernel_seconds: float = 0.03
    seed: int | None = None  # of the inputs of what must be exact; fresh ones where it is None

    def drawn(self) -> dict[str, Any]:
        """What a job on random inputs is told of them."""
        return {} if self.seed is None else {"seed": self.seed}


@dataclass(frozen=True)
class Case:
    """One measurement: a process of its own, ended when it takes longer than `limit_s`."""

    part: str
    name: str
    job: Mapping[str, Any]
    limit_s: float = 200.0  # kernels are compiled in it, too


def plan(study: Study, parts: Sequence[str] = PARTS) -> list[Case]:
    """The measurements of some parts, in the order in which they are made, and before them the checkpoint."""
    made = {"do": "checkpoint", "folder": str(study.checkpoint), "shape": study.shape}
    return [
        Case(CHECKPOINT, "random", made, 180),
        *(case for part in PARTS if part in parts for case in _CASES[part](study)),
    ]


def measure(
    cases: Sequence[Case],
    results: Results,
    save: Callable[[], None],
    seconds: float,
    log: Path,
    work: Work = run_worker,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Make all measurements that there is time for; each is in `results` and saved as soon as it is made.

    One of an earlier run stays until its new one is there. `log` is where tracebacks go.
    """
    end = clock() + seconds
    for case in cases:
        left = end - clock()
        if left < _LEAST_S:
            found: dict[str, Any] = {"error": f"not begun: {max(0.0, left):.0f} s were left of {seconds:.0f}"}
            if case.name in results["parts"].get(case.part, {}):
                continue
        else:
            found = _measured(case, min(case.limit_s, left), log, work, clock)
        results["parts"].setdefault(case.part, {})[case.name] = found
        save()
        say(f"{case.part}, {case.name}: {found.get('error') or 'done'} ({found.get('took_s', 0):.0f} s)")


def _measured(
    case: Case, limit_s: float, log: Path, work: Work, clock: Callable[[], float]
) -> dict[str, Any]:
    """What one process found, or how it ended."""
    before, start = card_state(), clock()
    try:
        found = work({**case.job, "task": "gpu", "log": str(log.absolute())}, timeout_s=limit_s)
    except WorkerError as error:
        took = clock() - start
        found = {"error": f"ended after {limit_s:.0f} s" if took >= limit_s else str(error)}
    return {
        **found,
        "took_s": clock() - start,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "card_before": before and before.to_json(),
    }


def run_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'gpu': a job by its 'do'.

    Whatever goes wrong is one sentence in the results, and a traceback in the job's `log`.
    """
    try:
        result: dict[str, Any] = load(JOBS[job["do"]])(job, progress)
    except FoxEdgeError:
        raise
    except Exception as error:
        # Compilers of kernels and the driver raise what they like, and the machine is gone afterwards.
        with Path(job["log"]).open("a", encoding="utf-8") as log:
            log.write(f"{json.dumps(job)}\n{traceback.format_exc()}\n")
        said = (str(error).splitlines() or [""])[0][:300]
        raise FoxEdgeError(f"{type(error).__name__}: {said}") from error
    return result


# --- parts -----------------------------------------------------------------------------------------------


def _floors(s: Study) -> Iterator[Case]:
    job = {
        "do": "floors",
        "device": s.device,
        "shape": s.shape,
        "sizes": list(s.buffers),
        "seconds": s.rate_seconds,
        "long_prompt": s.long_prompt,
    }
    if s.products is not None:
        job["products"] = [list(size) for size in s.products]
    yield Case("floors", "card", job)


def _exact(s: Study) -> Iterator[Case]:
    for which in ("nano", "random"):
        job = {"do": "logits", "device": s.device, "checkpoint": which, "read": list(s.read)}
        yield Case("exact", f"logits, {which}", job | s.drawn())
    texts, tokens = s.texts
    greedy = {"do": "greedy", "device": s.device, "texts": texts, "tokens": tokens}
    yield Case("exact", "greedy, nano", greedy)


def _kernels(s: Study) -> Iterator[Case]:
    for name in KERNELS:
        job = {"do": "kernels", "device": s.device, "shape": s.shape, "kernel": name}
        yield Case("kernels", name, job | {"seconds": s.kernel_seconds} | s.drawn())


def _speed(s: Study, prefix: str, users: int = 1, **asked: Any) -> dict[str, Any]:
    job = {
        "do": "speed",
        "subject": f"{prefix}{s.checkpoint}",
        "device": s.device,
        "users": users,
        "seconds": s.seconds,
        "workload": "custom",
        "prompt_tokens": s.prompt_tokens,
        "decode_tokens": s.decode_tokens,
    }
    if s.passes is not None:
        job["passes"] = list(s.passes)
    return job | asked


def _decode(s: Study) -> Iterator[Case]:
    for name, prefix in (("bf16", "cuda:"), ("int8", "cuda-int8:"), ("int4", "cuda-int4:")):
        yield Case("decode", name, _speed(s, prefix))
    paper = _speed(s, "cuda:", workload=s.paper, prompt_tokens=None, passes=[1, 2])
    yield Case("decode", "bf16, the paper's prompts", paper)


def _prompt(s: Study) -> Iterator[Case]:
    for name, prefix in (("bf16", "cuda:"), ("int4", "cuda-int4:")):
        job = _speed(s, prefix, prompt_tokens=s.long_prompt, decode_tokens=min(64, s.decode_tokens))
        yield Case("prompt", name, job)


def _users(s: Study) -> Iterator[Case]:
    for count in s.users:
        yield Case("users", f"bf16, {count} users", _speed(s, "cuda:", count))


def _peer(s: Study, part: str = "peer", static: bool = False) -> Iterator[Case]:
    job = {
        "do": "peer",
        "checkpoint": str(s.checkpoint),
        "device": s.device,
        "prompt_tokens": s.prompt_tokens,
        "decode_tokens": s.decode_tokens,
        "passes": s.peer_passes,
        "static": static,
    }
    yield Case(part, "generate", job, 150)


def _compiled(s: Study) -> Iterator[Case]:
    """What transformers compiles where its cache is static; compiling may take longer than there is time."""
    return _peer(s, "compiled", static=True)


def _questions(s: Study) -> Iterator[Case]:
    many, few, tokens = s.questions
    job = {"do": "questions", "subject": f"cuda:{s.checkpoint}", "device": s.device, "max_tokens": tokens}
    yield Case("questions", "at once", job | {"questions": many, "at_once": s.at_once})
    yield Case("questions", "one by one", job | {"questions": few, "at_once": 1})


_CASES: Mapping[str, Callable[[Study], Iterator[Case]]] = {
    "floors": _floors,
    "exact": _exact,
    "decode": _decode,
    "prompt": _prompt,
    "users": _users,
    "peer": _peer,
    "questions": _questions,
    "compiled": _compiled,
    "kernels": _kernels,
}
