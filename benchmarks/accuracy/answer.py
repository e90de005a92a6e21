"""Letting a subject answer prompts, greedily, in a process of its own: one by one, or several at once.

Knows sessions and whose turn it is; not what is right. Worked examples that prompts share are run once, and
every prompt goes on from that very place: an answer then has the same bits whichever prompts came before it,
so that a run may be cut off and gone on with, or dealt out in parts. Whether they depend on the prompts that
are answered beside it is the session's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.answers_log import appending
from benchmarks.accuracy.gsm8k import judge
from benchmarks.accuracy.writing import SharedStart, Writing, advance
from benchmarks.common.subject import open_subject
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import BatchingSession, Session, SessionOptions

if TYPE_CHECKING:
    from fox_edge.tokenizer import Tokenizer

# A plain text, or a chat's messages.
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a subject said. `cut`: neither it nor a stop text ended the answer, but a limit did.

    `first_token_s` is the time until the prompt had been run, `seconds` that of the whole answer, which of a
    pass for several has an equal share: all answers' seconds are those of the run.
    """

    text: str
    cut: bool
    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    first_token_s: float
    seconds: float


def answer_all(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int,
    stop_texts: Sequence[str] = (),
    keep: Callable[[int, Answer], None] = lambda place, answer: None,
    shared: str = "",
    at_once: int = 1,
) -> list[Answer]:
    """Answer each prompt greedily; raises ContextOverflowError before the first when one does not fit.

    `shared` is the text that all prompts begin with: it is run once. `keep` is told every answer when it is
    there, with its place among the prompts. `at_once` prompts are answered together, in as many conversations
    on the session's weights; raises FoxEdgeError where those cannot step together.
    """
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    if longest >= session.context:
        raise ContextOverflowError(
            f"the longest prompt has {longest} tokens; with its answer it does not fit a context of "
            f"{session.context}"
        )
    # The last token of the shared text may be another one when a question follows.
    start = tokenizer.encode(shared, bos=True)[:-1] if shared else []
    waiting = deque(enumerate(encoded))
    answers: dict[int, Answer] = {}
    with _caches(session, min(at_once, len(prompts)), start) as caches:
        writings: dict[SharedStart, Writing] = {}
        while waiting or writings:
            for cache in caches:
                if waiting and cache not in writings:
                    place, tokens = waiting.popleft()
                    writings[cache] = Writing(place, cache, tokenizer, tokens, max_tokens, stop_texts)
            advance([one for one in writings.values() if not one.over])
            for cache, one in [(cache, one) for cache, one in writings.items() if one.over]:
                del writings[cache]
                answers[one.place] = _answer(one)
                keep(one.place, answers[one.place])
    return [answers[place] for place in range(len(encoded))]


@contextlib.contextmanager
def _caches(session: Session, count: int, start: Sequence[int]) -> Iterator[list[SharedStart]]:
    """So many conversations on the same weights, the session's own first; others are closed afterwards."""
    caches: list[SharedStart] = []
    with contextlib.ExitStack() as opened:
        for n in range(max(1, count)):
            one = session
            if n:
                if not isinstance(session, BatchingSession):
                    raise FoxEdgeError("these conversations cannot step together; ask one by one")
                one = opened.enter_context(contextlib.closing(session.another()))
            caches.append(SharedStart(one, start, caches))
        yield caches


def encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A prompt's tokens: a text after <bos>, messages through the chat template."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=True)
    return tokenizer.encode_chat(prompt)


def _answer(one: Writing) -> Answer:
    return Answer(
        text=one.text,
        cut=one.cut,
        prompt_tokens=one.prompt_tokens,
        reused_tokens=one.reused_tokens,
        answer_tokens=len(one.generation.tokens),
        first_token_s=one.first_token_s,
        seconds=one.seconds,
    )


def prompt_digest(prompt: Prompt) -> str:
    """SHA-256 of a prompt, as answers in a file carry it."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def run_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'answer': {subject, threads, session, prompts, max_tokens, stop_texts} -> answers.

    Where there are any: `shared`, the text that all prompts begin with; `skip`, places of prompts that have
    been answered; `context_for`, prompts that must fit too (those of other parts of one task); `ids` and
    `expected`, one per prompt, and `log`, the file that every answer is added to at once; `at_once`, how many
    prompts are answered together. The context is as long as the longest prompt and its answer need, at most
    the model's.
    """
    prompts = job["prompts"]
    subject = open_subject(job["subject"])
    tokenizer = subject.tokenizer()
    longest = max(len(encode(tokenizer, prompt)) for prompt in [*prompts, *job.get("context_for", ())])
    context = min(longest + job["max_tokens"], subject.context)
    at_once = job.get("at_once", 1)
    options = SessionOptions(
        context=context, threads=job["threads"], conversations=at_once, **job.get("session", {})
    )
    places = sorted(set(range(len(prompts))) - set(job.get("skip", ())))
    path = Path(job["log"]) if job.get("log") else None
    with contextlib.closing(subject.open_session(options)) as session, appending(path, subject.spec) as write:
        done = len(prompts) - len(places)

        def keep(n: int, answer: Answer) -> None:
            nonlocal done
            if path is not None:
                place = places[n]
                digest = {"prompt_sha256": prompt_digest(prompts[place])}
                judged = judge(answer.text, job["expected"][place])
                write(job["ids"][place], {**digest, **judged, **asdict(answer)})
            done += 1
            progress(done, len(prompts))

        start = time.perf_counter()
        pending = [prompts[place] for place in places]
        shared = job.get("shared", "")
        answers = answer_all(
            session, tokenizer, pending, job["max_tokens"], job["stop_texts"], keep, shared, at_once
        )
        seconds = time.perf_counter() - start
    return {"answers": [asdict(answer) for answer in answers], "seconds": seconds}
