"""The two jobs behind `eval --task fidelity`, each done in a process of its own (processes/worker.py).

The first cuts the text and takes the checkpoint's layers over it, once for all artifacts. It leaves the
hidden states in a file: 8 KB per compared position at Fox-1's width, where its logits are 1 MB. The second,
one per artifact, turns them into logits a chunk at a time and lays the artifact's beside them. Knows
sessions, the reference and the comparison; not what becomes of the figures.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common.machine import peak_rss_bytes
from benchmarks.common.subject import open_subject
from benchmarks.fidelity.texts import Windows, read_windows
from fox_edge.artifact import MANIFEST
from fox_edge.errors import FoxEdgeError, VerificationError
from runtimes.base import Logits, Session, SessionOptions, is_foreign

if TYPE_CHECKING:
    from fox_edge.checkpoint import Checkpoint

Progress = Callable[[int, int], None]


def run_reference_job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The worker's task 'fidelity-reference': a text in windows, and the checkpoint's hidden states over it.

    {checkpoint, text, tokens, window, score_from, hidden, threads}: `text` is a file's path or None. Hidden
    states of the positions that count, float32 (positions, C), go to the file `hidden`, unless the reference
    is an artifact itself, which has a head of its own.
    """
    start, reference = time.perf_counter(), _Reference(job["checkpoint"])
    text = read_windows(
        reference.tokenizer,
        reference.context,
        file=None if job["text"] is None else Path(job["text"]),
        tokens=job["tokens"],
        window=job["window"],
        score_from=job["score_from"],
    )
    if reference.checkpoint is not None:
        _use(job["threads"])
        _write_hidden_states(reference.checkpoint, text, Path(job["hidden"]), progress)
    return {
        "text": {"source": text.source, "windows": text.windows, "first": text.first},
        "is_artifact": reference.checkpoint is None,
        "notes": reference.notes,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
    }


class _Reference:
    """What artifacts are held to: a checkpoint, or (`checkpoint` is None) an artifact in its own runtime."""

    def __init__(self, spec: str) -> None:
        from fox_edge.checkpoint import Checkpoint

        self.checkpoint: Checkpoint | None = None
        self.notes: list[str] = []
        if is_artifact(spec):
            subject = open_subject(spec)
            self.tokenizer, self.context = subject.tokenizer(), subject.context
            return
        self.checkpoint = Checkpoint.open(spec)
        self.notes = self.checkpoint.notes
        self.tokenizer, self.context = self.checkpoint.tokenizer(), self.checkpoint.config.max_positions


def is_artifact(spec: str) -> bool:
    """Whether a reference is an exported model instead of a checkpoint."""
    return is_foreign(Path(spec)) or (Path(spec) / MANIFEST).exists()


def _write_hidden_states(checkpoint: Checkpoint, text: Windows, path: Path, progress: Progress) -> None:
    from benchmarks.fidelity.reference import hidden_states

    try:
        with path.open("wb") as file:
            for hidden in hidden_states(checkpoint, text.inputs, text.first, progress):
                file.write(hidden.contiguous().numpy().data)
    except OSError as error:
        need = 4 * checkpoint.config.hidden_size * text.scored * len(text.windows)
        raise FoxEdgeError(f"{path}: cannot hold {need} bytes of hidden states ({error.strerror})") from None


def run_job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The worker's task 'fidelity': an artifact against the reference, and what that took.

    {subject, checkpoint, text, hidden, threads, session}: `text` and `hidden` are the other job's. A
    reference that is an artifact itself runs in a session of its own.
    """
    start = time.perf_counter()
    text = Windows(**job["text"])
    options = SessionOptions(context=text.length, threads=job["threads"], **job["session"])
    with contextlib.ExitStack() as opened:
        session = opened.enter_context(contextlib.closing(open_subject(job["subject"]).open_session(options)))
        if is_artifact(job["checkpoint"]):
            own = SessionOptions(context=text.length, threads=job["threads"])
            other = open_subject(job["checkpoint"]).open_session(own)
            opened.enter_context(contextlib.closing(other))
            vocab_size, reference = other.vocab_size, session_logits(other, text)
        else:
            vocab_size, reference = _head(job)
        _use(job["threads"])
        if session.vocab_size != vocab_size:
            raise VerificationError(
                f"it has a vocabulary of {session.vocab_size} tokens, the reference one of {vocab_size}"
            )
        found = figures(reference, session_logits(session, text, progress), text)
    return found | {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes()}


def figures(reference: Iterable[Logits], artifact: Iterable[Logits], text: Windows) -> dict[str, Any]:
    """All figures of one comparison over the positions of a text that count."""
    # Here and not above: a runtime that needs no PyTorch shall be able to run without it.
    from benchmarks.fidelity.divergence import curve, look, perplexities, standard_error, summary

    found = look(reference, artifact, text.targets())
    kl = found.kl_nats.reshape(len(text.windows), text.scored)
    return {
        **summary(found).to_json(),
        # Positions of one window are not strangers to each other; whole windows more nearly are.
        "mean_kl_se_by_window_nats": standard_error(kl.mean(1)) if len(kl) > 1 else None,
        **perplexities(found),
        "curve": curve(kl, text.first),
    }


def session_logits(
    session: Session, text: Windows, progress: Progress = lambda done, total: None
) -> Iterator[Logits]:
    """A session's logits at the positions that count, window after window, each in an empty cache."""
    for n, tokens in enumerate(text.inputs):
        session.reset()
        yield from session.score(tokens, text.first)
        progress(n + 1, len(text.windows))


def _head(job: dict[str, Any]) -> tuple[int, Iterator[Logits]]:
    """The reference's vocabulary, and its logits made of the other job's hidden states."""
    from benchmarks.fidelity.reference import ReferenceHead
    from fox_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(job["checkpoint"])
    head = ReferenceHead(checkpoint)
    hidden = np.memmap(job["hidden"], np.float32, "r").reshape(-1, checkpoint.config.hidden_size)
    return head.vocab_size, head.logits(hidden)


def _use(threads: int | None) -> None:
    """PyTorch's threads; last, since a session in PyTorch sets its own."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
