"""A sweep: many exports of many checkpoints, measured and questioned, taken up again where it was cut off.

Steps are done as soon as what they need is there, several at once where processors and memory allow it, each
in a process of its own; their results are kept one by one (store.py). Timing comes last and alone. Knows
when a step may start and what becomes of it; what the steps are is plan.py's, what their results add up to
rows.py's, other machines are ray.py's.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common.machine import memory_bytes
from benchmarks.sweep.file import Sweep, read_sweep
from benchmarks.sweep.plan import ARTIFACTS, HIDDEN, Step, make_plan, plain_name
from benchmarks.sweep.rows import bench_step, finish
from benchmarks.sweep.step import do, with_threads
from benchmarks.sweep.store import Store
from fox_edge.artifact import MANIFEST, sha256_file
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores
from fox_edge.progress import say

_MOST_LOSSES = 5  # of one step's workers, before the step counts as failed
_LOOK_S = 5.0  # how often a pool is asked whether it still can do what waits


class Pool(Protocol):
    """Where steps are done."""

    def fits(self, step: Step) -> bool:
        """Whether the step may start now."""
        ...

    def start(self, step: Step) -> Future[dict[str, Any]]:
        """Start it; the future gives sweep_step's outcome."""
        ...

    def lost(self, error: BaseException) -> str | None:
        """Why a future's error only means that the worker is gone, and the step may be done again."""
        ...

    def check(self) -> None:
        """Raise FoxEdgeError when nothing can be done any more."""
        ...

    def close(self) -> None:
        """End what still runs."""
        ...


class LocalPool:
    """Processes on this machine, as many at once as processors and memory allow."""

    def __init__(self, threads: int | None) -> None:
        self.cores, self.memory_bytes = available_cores(), memory_bytes()
        self.threads = min(threads or self.cores, self.cores)
        self._running: dict[Step, Any] = {}
        self._closed = False
        self._executor = ThreadPoolExecutor(max(1, self.cores // self.threads))

    def fits(self, step: Step) -> bool:
        """A step that wants more memory than there is runs alone."""
        if not self._running:
            return True
        taken = sum(other.memory_bytes for other in self._running)
        cores = self.threads * (len(self._running) + 1)
        return cores <= self.cores and taken + step.memory_bytes <= self.memory_bytes

    def start(self, step: Step) -> Future[dict[str, Any]]:
        """In a thread that waits for the process."""
        self._running[step] = None
        return self._executor.submit(self._do, step)

    def _do(self, step: Step) -> dict[str, Any]:
        def started(process: Any) -> None:
            self._running[step] = process
            if self._closed:
                process.kill()

        try:
            return do(with_threads(step.job, self.threads), started)
        finally:
            del self._running[step]

    def lost(self, error: BaseException) -> str | None:
        """A process that dies here died of its work."""
        return None

    def check(self) -> None:
        """This machine is here."""

    def close(self) -> None:
        """Kill the processes that still run."""
        self._closed = True
        for process in list(self._running.values()):
            if process is not None:
                process.kill()
        self._executor.shutdown(cancel_futures=True)


def sweep(
    path: Path, *, out: Path | None = None, ray: str | None = None, retry: bool = False
) -> dict[str, Any]:
    """Do what a sweep file asks, but for what an earlier run in the same folder has done; returns the result.

    `out` None is out/NAME-OF-THE-FILE. `ray` is a Ray cluster's address, 'auto' or 'local'; `retry` tries
    again what failed. A step that fails is a row's error, and the others go on. Raises FoxEdgeError for a
    file, checkpoint or cluster that is not there, and for a folder that is full or taken.
    """
    asked = read_sweep(path)
    folder = Path("out") / plain_name(path.stem) if out is None else out
    plan = make_plan(asked, folder)
    with Store(folder) as store:
        _check_folders(folder)
        records, taken = _do_steps(plan.steps, asked, store, ray, retry)
        shutil.rmtree(folder / HIDDEN, ignore_errors=True)
        bench = bench_step(plan, asked, records)
        if bench is not None:
            before = _done(bench, store, retry)
            taken += before is not None
            records[bench.identity] = before or _timed(bench, store)
        return finish(plan, asked, records, folder, bench, taken)


def _check_folders(folder: Path) -> None:
    """Make the folders inside; raises FoxEdgeError when one is a link out of the sweep's folder."""
    for name in (ARTIFACTS, HIDDEN):
        inner = folder / name
        try:
            inner.mkdir(exist_ok=True)
        except OSError as error:
            raise FoxEdgeError(f"{inner}: cannot be written ({error.strerror})") from None
        if not inner.resolve().is_relative_to(folder.resolve()):
            raise FoxEdgeError(f"{inner}: leads out of the sweep's folder, to {inner.resolve()}")


def _do_steps(
    steps: Sequence[Step], asked: Sweep, store: Store, ray: str | None, retry: bool
) -> tuple[dict[str, dict[str, Any]], int]:
    """The records of all steps that can be done, by identity, and how many of them were there before."""
    records = {step.identity: found for step in steps if (found := _done(step, store, retry))}
    failed = {identity for identity, record in records.items() if "error" in record}
    waiting = [s for s in steps if s.identity not in records and not failed.intersection(s.needs)]
    taken = len(records)
    if taken:
        say(f"{taken} steps were done before and are taken")
    if any(step.kind != "hidden" for step in waiting):
        with contextlib.closing(_pool(asked, store, ray)) as pool:
            _Loop(waiting, records, store, pool).run()
    return records, taken


def _done(step: Step, store: Store, retry: bool) -> dict[str, Any] | None:
    """What is kept of a step, if it still counts: its artifact or file must be there as it was left."""
    record = store.read(step.identity)
    if record is None or "error" in record:
        return None if retry else record
    if step.kind == "export":
        manifest = Path(step.job["words"][2]) / MANIFEST
        if not manifest.is_file() or sha256_file(manifest) != record["result"].get("manifest_sha256"):
            return None
    if step.kind == "hidden" and not Path(step.job["hidden"]).is_file():
        return None
    return record


def _pool(asked: Sweep, store: Store, ray: str | None) -> Pool:
    if ray is None:
        return LocalPool(asked.run.threads)
    from benchmarks.sweep.ray import RayPool

    return RayPool(ray, store.folder, asked.run.threads)


class _Loop:
    """Steps started as what they need gets done; fills `records`."""

    def __init__(
        self, waiting: list[Step], records: dict[str, dict[str, Any]], store: Store, pool: Pool
    ) -> None:
        self._waiting, self._records, self._store, self._pool = waiting, records, store, pool
        self._total, self._done = len(waiting), 0
        self._dead = {identity for identity, record in records.items() if "error" in record}
        self._losses: Counter[Step] = Counter()
        self._running: dict[Future[dict[str, Any]], Step] = {}

    def run(self) -> None:
        """Until nothing runs, and nothing that waits may start."""
        while True:
            self._start()
            if not self._running:
                break  # what still waits, nobody has a use for
            ended, _ = wait(self._running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
            if not ended:
                self._pool.check()
            for future in ended:
                self._settle(self._running.pop(future), future)

    def _start(self) -> None:
        """Start what may start; drop what needs something that failed or was dropped."""
        for step in list(self._waiting):
            if self._dead.intersection(step.needs):
                self._dead.add(step.identity)
                self._waiting.remove(step)
                self._total -= 1
            elif self._may_start(step) and self._pool.fits(step):
                self._waiting.remove(step)
                self._running[self._pool.start(step)] = step

    def _may_start(self, step: Step) -> bool:
        """Whether what it needs is there, and somebody has a use for it."""
        return self._has(step.needs) and (step.kind != "hidden" or self._is_wanted(step.identity))

    def _is_wanted(self, identity: str) -> bool:
        """Whether a step lacks nothing but this one, which is of no use in itself."""
        users = [step.needs for step in self._waiting if identity in step.needs]
        return any(self._has(need for need in needs if need != identity) for needs in users)

    def _has(self, needs: Iterable[str]) -> bool:
        return all(need in self._records and need not in self._dead for need in needs)

    def _settle(self, step: Step, future: Future[dict[str, Any]]) -> None:
        error = future.exception()
        if error is None:
            self._keep(step, future.result())
            return
        reason = self._pool.lost(error)
        if reason is None:
            raise error
        self._losses[step] += 1
        if self._losses[step] < _MOST_LOSSES:
            say(f"{step.label}: {reason}; it is done again")
            self._waiting.insert(0, step)
        else:
            self._keep(step, {"error": f"{reason}, {_MOST_LOSSES} times"})

    def _keep(self, step: Step, outcome: dict[str, Any]) -> None:
        self._records[step.identity] = _kept(step, outcome, self._store)
        if "error" in outcome:
            self._dead.add(step.identity)
        self._done += 1
        say(f"[{self._done}/{self._total}] {_told(step, outcome)}")


def _kept(step: Step, outcome: dict[str, Any], store: Store) -> dict[str, Any]:
    return store.write(step.identity, {"kind": step.kind, "label": step.label, **outcome})


def _told(step: Step, outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return f"{step.label} failed: {outcome['error']}"
    return f"{step.label}: {outcome['seconds']:.1f} s"


def _timed(step: Step, store: Store) -> dict[str, Any]:
    """The record of the timing step: nothing else of the sweep runs beside it."""
    from benchmarks.latency.bench import bench

    say(f"measuring {len(step.job['artifacts'])}, alone")
    start = time.monotonic()
    try:
        outcome: dict[str, Any] = {"result": bench(**step.job)}
    except FoxEdgeError as error:
        outcome = {"error": str(error)}
    outcome |= {"artifacts": step.job["artifacts"], "seconds": time.monotonic() - start}
    say(_told(step, outcome))
    return _kept(step, outcome, store)
