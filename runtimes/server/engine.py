"""The engine: one thread that owns the model, and lets several answers grow side by side.

Every round, each answer that has begun gets one token, and one prompt that has not been read yet gets a part
run, another one's in the next round: so a long prompt holds nobody up for longer than that part takes. Where
the session can, the tokens of all answers are run in one pass over the weights. Else each token is computed
as it would be alone, and an answer does not depend on who else is asking.

Knows sessions, tokens and a clock. Does not know text, HTTP, or who reads an answer.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fox_edge.errors import FoxEdgeError
from fox_edge.progress import say
from runtimes.base import Logits, SharingSession
from runtimes.generate import Constraint, FinishReason, Generation, Logprobs, run_together
from runtimes.sampling import Sampling
from runtimes.server.metrics import Metrics
from runtimes.server.slots import Slot, Slots

# Why an answer ended: by itself (generate.FinishReason), or because its reader had enough ("read"), hung up
# ("cancelled"), it took too long ("timeout"), the server stopped ("shutdown"), or the model failed ("error").
Ending = FinishReason | Literal["read", "cancelled", "timeout", "shutdown", "error"]


class QueueFull(FoxEdgeError):
    """More requests than may wait."""


class ShuttingDown(FoxEdgeError):
    """A request that came after the server was told to stop."""


@dataclass(frozen=True)
class Outcome:
    """How an answer ended. `completion_tokens` counts those that were handed to the reader."""

    ending: Ending
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class Reader(Protocol):
    """Who an answer is for. Called on the engine's thread, so it must not take long."""

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        """One more token; False when no more are wanted."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """The answer is over; called exactly once, after the last token."""
        ...


@dataclass(eq=False)
class Job:
    """A prompt, how to go on from it, and who reads the answer."""

    prompt: list[int]
    reader: Reader
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    max_tokens: int | None = None
    constraint: Constraint | None = None
    logprobs: int | None = None
    timeout_s: float | None = None
    submitted_s: float = 0.0
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody reads any more: the slot is free before the next token. From any thread."""
        self.cancelled = True


class Engine:
    """Runs jobs on `slots` conversations of one model; up to `queue` more wait.

    The session is the engine's own from here on; `close` closes it.
    """

    def __init__(
        self,
        session: SharingSession,
        slots: int,
        queue: int,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.context, self.vocab_size = session.context, session.vocab_size
        self.metrics = metrics or Metrics()
        self._slots = Slots(session, slots)
        self._queue_limit, self._clock = queue, clock
        self._waiting: deque[Job] = deque()
        self._running: dict[Slot, Job] = {}  # in order of arrival
        self._wake = threading.Condition()
        self._rounds = 0
        self._closing = self.failed = False
        self._grace_ends_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def slots(self) -> int:
        """How many answers can grow at once."""
        return len(self._slots.all)

    @property
    def busy(self) -> int:
        """How many do."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job run; from any thread. Raises QueueFull, and ShuttingDown after `drain`."""
        with self._wake:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            if self.busy + self.queued >= self.slots + self._queue_limit:
                raise QueueFull(
                    f"{self.busy} answers are being written and {self.queued} requests wait already, "
                    f"but only {self.slots} + {self._queue_limit} are taken"
                )
            job.submitted_s = self._clock()
            self._waiting.append(job)
            self._wake.notify()

    def drain(self, grace_s: float) -> None:
        """Take no more jobs, tell those that wait, give running answers so long to end; returns at once."""
        with self._wake:
            self._closing = True
            self._grace_ends_s = self._clock() + grace_s
            self._wake.notify()

    def close(self) -> None:
        """End everything that is left and free the model. The engine must have been started."""
        self.drain(0)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            # A bug in here must leave nobody waiting for an answer that never comes.
            say("".join(traceback.format_exception(error)))
            with self._wake:
                self._closing = self.failed = True
            for slot, job in list(self._running.items()):
                self._fail(job, FoxEdgeError("the engine failed"), slot)
            while self._waiting:
                self._fail(self._waiting.popleft(), FoxEdgeError("the engine failed"))
        finally:
            self._slots.close()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._closing):
                    self._wake.wait()
                if self._closing and not self._running and not self._waiting:
                    return
            self._sweep()
            self._admit()
            self._round()

    def _sweep(self) -> None:
        """End what need not go on: nobody reads it, its time is up, or the server stops."""
        now = self._clock()
        over = self._grace_ends_s is not None and now >= self._grace_ends_s
        for slot, job in list(self._running.items()):
            if ending := _interrupted(job, now, over):
                self._end(job, ending, slot)
        with self._wake:
            waiting = list(self._waiting)
            endings = [_interrupted(job, now, self._closing) for job in waiting]
            self._waiting = deque(job for job, e in zip(waiting, endings, strict=True) if not e)
        for job, ending in zip(waiting, endings, strict=True):
            if ending:
                self._end(job, ending)

    def _admit(self) -> None:
        """Give waiting jobs the slots that are free."""
        while free := [slot for slot in self._slots.all if slot not in self._running]:
            with self._wake:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                slot = self._slots.take(job.prompt, free)
                slot.generation = slot.cache.generate(
                    job.prompt,
                    job.sampling,
                    job.stop_ids,
                    job.max_tokens,
                    constraint=job.constraint,
                    logprobs=job.logprobs,
                )
            except Exception as error:
                self._fail(job, error)
                continue
            slot.last_part = 0
            self._running[slot] = job
            self.metrics.prompt(slot.cache.prompt_tokens, slot.cache.reused_tokens)

    def _round(self) -> None:
        """One token for every answer that has begun, and a part of one prompt: the one least recently run."""
        reading = [slot for slot in self._running if not slot.generation or not slot.generation.tokens]
        self._write([slot for slot in self._running if slot not in reading])
        if reading:
            self._read(min(reading, key=lambda slot: slot.last_part))

    def _read(self, slot: Slot) -> None:
        """A part of a prompt; after the last one comes the first token."""
        job, generation = self._running[slot], slot.generation
        assert generation is not None
        self._rounds += 1
        slot.last_part = self._rounds
        try:
            if not generation.feed(slot.part):
                self._deliver(slot, job, next(generation, None))
        except Exception as error:
            self._fail(job, error, slot)

    def _write(self, slots: list[Slot]) -> None:
        """One token for each of several answers, in one pass where the model can."""
        results = self._run_together([slot.generation for slot in slots if slot.generation is not None])
        for slot in slots:
            job, generation = self._running[slot], slot.generation
            assert generation is not None
            try:
                together = generation in results
                token = generation.take(results[generation]) if together else next(generation, None)
                self._deliver(slot, job, token)
            except Exception as error:
                self._fail(job, error, slot)

    def _run_together(self, generations: list[Generation]) -> dict[Generation, Logits | int]:
        """What comes of one pass; nothing where it fails.

        All conversations are then as they were: each is run alone, and the one at fault ends alone.
        """
        try:
            return run_together(generations)
        except Exception as error:
            say(f"a pass for {len(generations)} answers at once failed, each is tried alone: {error}")
            return {}

    def _deliver(self, slot: Slot, job: Job, token: int | None) -> None:
        """Hand an answer's newest token to its reader; None: there is none, the answer is over."""
        generation = slot.generation
        assert generation is not None
        if token is None:
            assert generation.finish_reason is not None
            self._end(job, generation.finish_reason, slot)
            return
        now = self._clock()
        if len(generation.tokens) == 1:
            self.metrics.first_token(now - job.submitted_s)
        else:
            self.metrics.token(now - slot.last_token_s)
        slot.last_token_s = now
        logprobs = generation.logprobs[-1] if job.logprobs is not None else None
        if not job.reader.token(token, logprobs):
            self._end(job, "read", slot)

    def _fail(self, job: Job, error: Exception, slot: Slot | None = None) -> None:
        """A model that failed, or a job that it refuses: this answer ends, the others go on."""
        if not isinstance(error, FoxEdgeError):
            say("".join(traceback.format_exception(error)))
        if slot is not None:
            slot.cache.reset()
        message = (
            str(error) if isinstance(error, FoxEdgeError) else f"internal error ({type(error).__name__})"
        )
        self._end(job, "error", slot, message)

    def _end(self, job: Job, ending: Ending, slot: Slot | None = None, error: str | None = None) -> None:
        """Free the slot and tell the reader."""
        cached = made = 0
        if slot is not None:
            assert slot.generation is not None
            cached, made = slot.cache.reused_tokens, len(slot.generation.tokens)
            slot.generation = None
            self._running.pop(slot, None)
        self.metrics.answer(ending)
        job.reader.ended(Outcome(ending, len(job.prompt), cached, made, error))


def _interrupted(job: Job, now: float, stopping: bool) -> Ending | None:
    """Why a job shall not go on, if it shall not."""
    if job.cancelled:
        return "cancelled"
    if job.timeout_s is not None and now - job.submitted_s >= job.timeout_s:
        return "timeout"
    return "shutdown" if stopping else None
