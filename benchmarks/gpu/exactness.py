"""Whether the GPU computes the model: logits against float32 on the CPU, greedy text, and every kernel.

Logits are compared by relative error on fresh random inputs, read as a prompt and token by token, alone and
several conversations at once. Beside it stands what BF16 itself costs: the reference in BF16 on the CPU.
Runs in a worker (study.py); knows sessions and checkpoints, not speed.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.subject import open_subject
from fox_edge import nano
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.config import SHAPES, FoxConfig
from fox_edge.locate import NANO
from fox_edge.nano.problems import held_out
from runtimes.base import BatchingSession, Logits, Session, SessionOptions, SharingSession
from runtimes.generate import generate
from runtimes.torch import TorchSession

TOLERANCE = 1e-2
# Places of texts, and what was read after each.
_Read: TypeAlias = tuple[list[int], list[Logits]]
# Fox-1's heads and proportions, and weights that keep the size of what they multiply: attention is not flat.
_SMALL = FoxConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=1,
    head_dim=128,
    max_positions=1024,
)
_PROMPT, _STEPS, _USERS = 300, 24, 5
_GREEDY_TOKENS = 64
_TOKENIZER = "tokenizer", "special_tokens", "chat_template"


def logits_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{device, checkpoint: 'nano' or 'random', seed?} -> relative errors of every way to read tokens."""
    seed = job.get("seed", secrets.randbits(32))
    with _checkpoint(job["checkpoint"], seed) as checkpoint:
        rng = np.random.default_rng(seed)
        texts = [rng.integers(8, checkpoint.config.vocab_size, _length(n)).tolist() for n in range(_USERS)]
        reference = _reference(checkpoint, texts)
        spec = f"cuda:{checkpoint.path}"
        options = SessionOptions(context=_PROMPT + _STEPS, conversations=_USERS, device=job["device"])
        session = open_subject(spec).open_session(options)
        with contextlib.closing(session):
            found = dict(_ways(session, texts))
        rows = [
            {"way": way, "relative_error": _relative(logits, [reference[n] for n in users])}
            for way, (users, logits) in found.items()
        ]
        plain = _plain_bf16(checkpoint, texts[0], reference[0])
    worst = max(row["relative_error"] for row in rows)
    return {
        "checkpoint": job["checkpoint"],
        "seed": seed,
        "relative_error": worst,
        "limit": TOLERANCE,
        "passed": worst < TOLERANCE,
        "bf16_on_cpu_relative_error": plain,
        "ways": rows,
    }


def greedy_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{device, texts} -> after how many of them nano says the same 64 tokens on the GPU and on the CPU."""
    texts = []
    for spec, device in ((f"cuda:{NANO}", job["device"]), (f"torch:{NANO}", None)):
        subject = open_subject(spec)
        tokenizer = subject.tokenizer()
        options = SessionOptions(context=subject.context, device=device)
        with contextlib.closing(subject.open_session(options)) as session:
            texts.append([_greedy(session, tokenizer.encode(p, bos=True)) for p in _problems(job["texts"])])
    pairs = list(zip(*texts, strict=True))
    same = sum(ours == theirs for ours, theirs in pairs)
    firsts = [_first_difference(ours, theirs) for ours, theirs in pairs if ours != theirs]
    return {
        "prompts": len(pairs),
        "tokens": _GREEDY_TOKENS,
        "equal": same,
        "passed": same == len(pairs),
        "first_differences": firsts,
    }


def kernels_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{device, shape, kernel, seconds, seed?} -> the rows of one kernel, at a shape."""
    from benchmarks.gpu.kernels import TOLERANCE, Setting, check_kernel

    seed = job.get("seed", secrets.randbits(32))
    torch.backends.cuda.matmul.allow_tf32 = False  # of the reference
    generator = torch.Generator(job["device"]).manual_seed(seed)
    setting = Setting(SHAPES[job["shape"]](), job["device"], job["seconds"], generator)
    rows = []
    with torch.inference_mode():
        for row in check_kernel(job["kernel"], setting):
            rows.append(row)
            progress(len(rows), 0)
    worst = max(row["relative_error"] for row in rows)
    return {
        "kernel": job["kernel"],
        "seed": seed,
        "relative_error": worst,
        "limit": TOLERANCE,
        "passed": all(row["passed"] for row in rows),
        "rows": rows,
    }


def _length(user: int) -> int:
    """Conversations of different lengths, the first the longest."""
    return _PROMPT + _STEPS - 37 * user


@contextlib.contextmanager
def _checkpoint(which: str, seed: int) -> Iterator[Checkpoint]:
    """The embedded model, or a random one that is gone afterwards."""
    if which == NANO:
        yield Checkpoint.open(which)
        return
    with tempfile.TemporaryDirectory(prefix="fox-edge-") as folder:
        path = Path(folder) / "random"
        files = [p for p in Path(nano.__file__).parent.iterdir() if p.name.startswith(_TOKENIZER)]
        write_checkpoint(path, _SMALL, _random_weights(_SMALL, seed), files)
        yield Checkpoint.open(path)


def _random_weights(config: FoxConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices that keep the size of what they multiply, norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in config.tensor_shapes().items():
        drawn = torch.randn(shape, generator=generator)
        yield name, 1 + 0.1 * drawn if len(shape) == 1 else drawn * shape[1] ** -0.5


def _reference(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> list[Logits]:
    """Logits (n, vocab) after every token of each text: the reference model in float32 on the CPU."""
    model = checkpoint.load_model(torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([list(text)]))[0].numpy() for text in texts]


def _plain_bf16(checkpoint: Checkpoint, text: Sequence[int], due: Logits) -> float:
    with contextlib.closing(TorchSession(checkpoint, SessionOptions(context=len(text)))) as session:
        return _relative([np.concatenate(list(session.score(text)))], [due])


def _ways(
    session: Session, texts: Sequence[list[int]]
) -> Iterator[tuple[str, tuple[list[int], list[Logits]]]]:
    """Name -> whose texts were read, and the logits that came out: of all tokens or of the last ones."""
    text, prompt = texts[0], texts[0][:-_STEPS]
    yield "all tokens of a prompt", ([0], [np.concatenate(list(session.score(text)))])
    session.reset()
    rows = [session.prefill(prompt), *(session.step(token) for token in text[-_STEPS:])]
    yield "a prompt, then token by token", ([0], [np.stack(rows)])
    session.reset()
    if isinstance(session, BatchingSession) and isinstance(session, SharingSession):
        others = [session, *(session.another() for _ in range(_USERS - 1))]
        yield f"{_USERS} conversations at once", (list(range(_USERS)), _together(others, texts))
        for other in others[1:]:
            other.close()


def _together(sessions: Sequence[Any], texts: Sequence[list[int]]) -> list[Logits]:
    """Each reads its own text up to the last tokens alone, and these with the others."""
    rows = [[session.prefill(text[:-_STEPS])] for session, text in zip(sessions, texts, strict=True)]
    for n in range(-_STEPS, 0):
        step = sessions[0].step_many(sessions, [text[n] for text in texts])
        for made, logits in zip(rows, step, strict=True):
            made.append(logits)
    return [np.stack(made) for made in rows]


def _relative(found: Sequence[Logits], due: Sequence[Logits]) -> float:
    """The largest relative error of any text's last rows; infinite where anything is no number."""
    errors = []
    for ours, theirs in zip(found, due, strict=True):
        last = theirs[-len(ours) :].astype(np.float64)
        if ours.shape != last.shape or not np.isfinite(ours).all():
            return float("inf")
        errors.append(float(np.linalg.norm(ours - last) / np.linalg.norm(last)))
    return max(errors)


def _problems(count: int) -> list[str]:
    return [f"Question: {problem.question}\nAnswer:" for problem in held_out(count)]


def _greedy(session: Session, prompt: list[int]) -> list[int]:
    session.reset()
    return list(generate(session, prompt, max_tokens=_GREEDY_TOKENS))


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
