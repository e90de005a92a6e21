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
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.subject import open_subject
from fox_edge import nano
from fox_edge.checkpoint import Checkpoint, write_checkpoint
from fox_edge.config import SHAPES, FoxConfig
from fox_edge.locate import NANO
from fox_edge.nano.problems import generate as generate_problems
from fox_edge.nano.problems import held_out
from fox_edge.quant import EMBEDDING
from runtimes.base import BatchingSession, Logits, Session, SessionOptions
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
_SIZES = {"q_proj": 2.0, "o_proj": 0.25, "down_proj": 0.25}
_TOKENIZER = "tokenizer", "special_tokens", "chat_template"


class Reading(NamedTuple):
    """How much is read: so many tokens as a prompt and then one by one, in so many conversations at most."""

    prompt: int
    steps: int
    users: int

    def length(self, user: int) -> int:
        """Tokens of a conversation: all of different lengths, the first the longest."""
        return self.prompt * (self.users + 1 - user) // (self.users + 1) + self.steps


def logits_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{device, checkpoint: 'nano' or 'random', read, seed?} -> relative errors of every way to read tokens.

    Nano reads problems that were never told before, the random model random tokens.
    """
    seed, reading = job.get("seed", secrets.randbits(32)), Reading(*job["read"])
    with _checkpoint(job["checkpoint"], seed) as checkpoint:
        texts = _texts(checkpoint, reading, seed)
        reference = _reference(checkpoint, texts)
        options = SessionOptions(context=reading.length(0), conversations=reading.users, device=job["device"])
        session = open_subject(f"cuda:{checkpoint.path}").open_session(options)
        with contextlib.closing(session):
            found = dict(_ways(session, texts, reading.steps))
        plain = _plain_bf16(checkpoint, texts)
    ways: list[dict[str, Any]] = []
    for way, (users, logits) in found.items():
        due = [reference[n] for n in users]
        # The same rows of the same texts: how far BF16 is from float32 differs from one to the next.
        rows = [plain[n][-len(read) :] for n, read in zip(users, logits, strict=True)]
        ways.append(
            {
                "way": way,
                "relative_error": _relative(logits, due),
                "bf16_on_cpu_relative_error": _relative(rows, due),
            }
        )
    worst = max(way["relative_error"] for way in ways)
    return {
        "checkpoint": job["checkpoint"],
        "seed": seed,
        "relative_error": worst,
        "limit": TOLERANCE,
        "passed": worst < TOLERANCE,
        "ways": ways,
    }


def greedy_job(job: dict[str, Any], _progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{device, texts, tokens} -> after how many of them nano goes on as on the CPU, for so many tokens."""
    texts = []
    for spec, device in ((f"cuda:{NANO}", job["device"]), (f"torch:{NANO}", None)):
        subject = open_subject(spec)
        tokenizer = subject.tokenizer()
        options = SessionOptions(context=subject.context, device=device)
        with contextlib.closing(subject.open_session(options)) as session:
            prompts = [tokenizer.encode(p, bos=True) for p in _problems(job["texts"])]
            texts.append([_greedy(session, prompt, job["tokens"]) for prompt in prompts])
    pairs = list(zip(*texts, strict=True))
    same = sum(ours == theirs for ours, theirs in pairs)
    firsts = [_first_difference(ours, theirs) for ours, theirs in pairs if ours != theirs]
    return {
        "prompts": len(pairs),
        "tokens": job["tokens"],
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
    """Weights under which every part of a layer matters, and none drowns the others, as in trained models.

    Queries are twice as long as what they are made of, so that attention looks at some positions; what is
    written to the residual stream is a quarter of it. Norms are about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in config.tensor_shapes().items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            yield name, 1 + 0.1 * drawn
        elif name == EMBEDDING:
            yield name, drawn
        else:
            part = name.split(".")[-2]
            yield name, drawn * _SIZES.get(part, 1.0) * shape[1] ** -0.5


def _reference(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> list[Logits]:
    """Logits (n, vocab) after every token of each text: the reference model in float32 on the CPU."""
    model = checkpoint.load_model(torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([list(text)]))[0].numpy() for text in texts]


def _plain_bf16(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> list[Logits]:
    """The same from the reference model in BF16."""
    read, options = [], SessionOptions(context=max(map(len, texts)))
    with contextlib.closing(TorchSession(checkpoint, options)) as session:
        for text in texts:
            session.reset()
            read.append(np.concatenate(list(session.score(text))))
    return read


def _texts(checkpoint: Checkpoint, reading: Reading, seed: int) -> list[list[int]]:
    """A text for each conversation, in tokens that the model knows what to do with."""
    lengths = [reading.length(user) for user in range(reading.users)]
    if checkpoint.name != NANO:
        rng = np.random.default_rng(seed)
        return [rng.integers(8, checkpoint.config.vocab_size, length).tolist() for length in lengths]
    told = generate_problems(seed, 8 * reading.users)
    tokenizer, texts = checkpoint.tokenizer(), []
    for user, length in enumerate(lengths):
        text = "".join(f"Question: {p.question}\nAnswer: {p.answer}\n\n" for p in told[user :: reading.users])
        texts.append(tokenizer.encode(text, bos=True)[:length])
    return texts


def _ways(session: Session, texts: Sequence[list[int]], steps: int) -> Iterator[tuple[str, _Read]]:
    """Name -> whose texts were read, and the logits that came out: of all tokens or of the last ones."""
    text, prompt = texts[0], texts[0][:-steps]
    yield "all tokens of a prompt", ([0], [np.concatenate(list(session.score(text)))])
    session.reset()
    rows = [session.prefill(prompt), *(session.step(token) for token in text[-steps:])]
    yield "a prompt, then token by token", ([0], [np.stack(rows)])
    session.reset()
    assert isinstance(session, BatchingSession)
    others: list[Any] = [session, *(session.another() for _ in texts[1:])]
    yield f"{len(texts)} conversations at once", (list(range(len(texts))), _together(others, texts, steps))
    for other in others[1:]:
        other.close()


def _together(sessions: Sequence[Any], texts: Sequence[list[int]], steps: int) -> list[Logits]:
    """Each reads its own text up to the last tokens alone, and these with the others."""
    rows = [[session.prefill(text[:-steps])] for session, text in zip(sessions, texts, strict=True)]
    for n in range(-steps, 0):
        step = sessions[0].step_many(sessions, [text[n] for text in texts])
        for made, logits in zip(rows, step, strict=True):
            made.append(logits)
    return [np.stack(made) for made in rows]


def _relative(found: Sequence[Logits], due: Sequence[Logits]) -> float:
    """Of the last rows of all texts, the difference's length over that of what is due; inf for no numbers."""
    wrong = whole = 0.0
    for ours, theirs in zip(found, due, strict=True):
        last = theirs[-len(ours) :].astype(np.float64)
        if ours.shape != last.shape or not np.isfinite(ours).all():
            return float("inf")
        wrong += float(np.square(ours - last).sum())
        whole += float(np.square(last).sum())
    return float(np.sqrt(wrong / whole))


def _problems(count: int) -> list[str]:
    return [f"Question: {problem.question}\nAnswer:" for problem in held_out(count)]


def _greedy(session: Session, prompt: list[int], count: int) -> list[int]:
    session.reset()
    return list(generate(session, prompt, max_tokens=count))


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
