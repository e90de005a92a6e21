"""Is the export still the model? Checks an artifact against the checkpoint it was made from.

Runs at the end of every export, before the artifact gets its name, and again whenever a user asks.
Each check is one row of the report; all are run, so that one failure does not hide another.
Knows sessions and model files through their protocols; not which format it looks at.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity import Fidelity, compare, reference_text
from benchmarks.machine import peak_rss_bytes
from benchmarks.peak import AnonymousPeak
from benchmarks.reference import ReferenceScorer
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, FoxEdgeError, VerificationError
from fox_edge.processors import available_cores
from fox_edge.progress import Progress
from fox_edge.quant import TYPES, Limits
from fox_edge.tokenizer import Tokenizer
from runtimes.base import ModelFile, Session, SessionOptions, open_model_file, open_session
from runtimes.generate import Sampling, generate

LOGIT_TOKENS = 512
PROMPT_TOKENS = 32
# Two tokens whose log-probabilities the reference itself holds this close are a tie, not a difference.
TIE_NATS = 0.02
# Weights per step of the tensor check: 16 MiB of float32 for the original and as much for the copy.
_CHUNK_WEIGHTS = 1 << 22

# Text that tokenizers get wrong: leading spaces, newlines, digits, accents, emoji, CJK, control characters.
TOKENIZER_SAMPLES = (
    "Hello, world!",
    " leading space",
    "   three leading spaces, and  two inside ",
    "line one\nline two\n\n\nline five\n",
    "\ttabs\tand\r\nreturns",
    "1234567890 + 3.14159 = 1,234,567,893",
    "naïve café – “quoted” … ½ ²",
    "🦊 jumps over 👩‍👩‍👧 and 🇨🇭",
    "狐狸在雪地裡。キツネ 여우",
    "def f(x):\n    return x**2  # square\n",
    "",
)


@dataclass(frozen=True)
class Check:
    """One row of the report."""

    name: str
    passed: bool
    detail: str


def limits_of(artifact: Artifact) -> Limits:
    """The limits that the artifact's own recipe set; raises ArtifactError when the manifest has none."""
    try:
        limits = artifact.manifest.recipe["limits"]
        return Limits(float(limits["mean_kl_nats"]), int(limits["greedy_tokens"]))
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(
            f"{artifact.path}: the manifest's recipe has no limits to verify against"
        ) from None


def verify(
    artifact: Artifact,
    checkpoint: Checkpoint,
    limits: Limits,
    *,
    text: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run every check; returns the report (`passed checks[] mean_kl_nats top1_agreement_percent ...`).

    `text` is what logits are compared on, at most LOGIT_TOKENS of it; None: built-in word problems.
    """
    start = time.monotonic()
    report: dict[str, Any] = {"artifact": str(artifact.path), "limits": asdict(limits)}
    tokenizer = checkpoint.tokenizer()
    checks = [_run("files", lambda: _files(artifact)), _run("source", lambda: _source(artifact, checkpoint))]
    try:
        with contextlib.closing(open_model_file(artifact)) as file:
            checks += [
                _run("tokenizer", lambda: _tokenizer(file, tokenizer)),
                _run("special tokens", lambda: _special_tokens(file, tokenizer)),
                _run("chat template", lambda: _chat_template(file, tokenizer)),
                _run("tie", lambda: file.tie() if checkpoint.config.tied else "the checkpoint is not tied"),
                _run("tensors", lambda: _tensors(file, artifact, checkpoint, threads or available_cores())),
            ]
        with contextlib.closing(open_session(artifact, SessionOptions(threads=threads))) as session:
            checks += _logits(session, checkpoint, text, limits, report)
    except FoxEdgeError as error:
        checks.append(Check("opens", False, str(error)))
    report |= {
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "seconds": round(time.monotonic() - start, 2),
    }
    return report


class Verifier:
    """The last step of an export: what exporters call with the finished, not yet named artifact.

    Keeps the report as TARGET.verification.json beside the target and raises VerificationError when a
    check fails, whereupon the exporter leaves nothing behind. Remembers its own cost, so that the
    export's can be told apart; `watch` is asked for the peak before it starts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        limits: Limits,
        target: Path,
        *,
        text: str | None = None,
        threads: int | None = None,
        watch: AnonymousPeak | None = None,
    ) -> None:
        self._checkpoint, self._limits, self._target = checkpoint, limits, target
        self._text, self._threads, self._watch = text, threads, watch
        self.seconds = 0.0
        self.peak_rss_before_bytes = self.peak_anonymous_before_bytes = 0

    def __call__(self, artifact: Artifact) -> dict[str, Any]:
        """The report of an artifact that passed."""
        self.peak_rss_before_bytes = peak_rss_bytes()
        self.peak_anonymous_before_bytes = self._watch.look() if self._watch else 0
        report = verify(artifact, self._checkpoint, self._limits, text=self._text, threads=self._threads)
        report["artifact"] = str(self._target)
        self.seconds = report["seconds"]
        kept = self._target.with_name(self._target.name + ".verification.json")
        if report["passed"]:
            kept.unlink(missing_ok=True)
            return report
        kept.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        failed = next(check for check in report["checks"] if not check["passed"])
        raise VerificationError(
            f"{self._target}: the export failed verification and was not kept: {failed['name']}: "
            f"{failed['detail']} (whole report: {kept})"
        )


def verify_text(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"{'ok  ' if c['passed'] else 'FAIL'}  {c['name']:<15} {c['detail']}" for c in report["checks"]]
    verdict = "verified: it is still the model" if report["passed"] else "NOT the model any more"
    return "\n".join([*lines, f"{report['artifact']}: {verdict} ({report['seconds']:.1f} s)"])


def _run(name: str, check: Callable[[], str]) -> Check:
    """A check says what it found, or raises a FoxEdgeError that says what is wrong."""
    try:
        return Check(name, True, check())
    except FoxEdgeError as error:
        return Check(name, False, str(error))


# --- the checks that read files ------------------------------------------------------------------------


def _files(artifact: Artifact) -> str:
    if not artifact.manifest.files:
        return "just written; hashed when the export is complete"
    changed = list(artifact.changed_files())
    if changed:
        raise VerificationError(f"sha256 is not the manifest's: {', '.join(changed)}")
    return f"{len(artifact.manifest.files)} files have the manifest's sha256"


def _source(artifact: Artifact, checkpoint: Checkpoint) -> str:
    told, found = artifact.manifest.checkpoint_sha256, checkpoint.digest()
    if told != found:
        raise VerificationError(f"made from checkpoint {told[:12]}, but {checkpoint.name} is {found[:12]}")
    return f"made from this checkpoint ({found[:12]})"


def _tokenizer(file: ModelFile, tokenizer: Tokenizer) -> str:
    chat = tokenizer.render_chat([{"role": "user", "content": TOKENIZER_SAMPLES[0]}])
    count = 0
    for text, special in (*((sample, False) for sample in TOKENIZER_SAMPLES), (chat, True)):
        want, got = tokenizer.encode(text, special=special), file.tokenize(text, special)
        if want != got:
            at = next(
                (i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b),
                min(len(want), len(got)),
            )
            raise VerificationError(
                f"{text!r}, token {at}: the checkpoint has {want[at : at + 4]}, this {got[at : at + 4]}"
            )
        count += len(want)
    return f"{count} ids of {len(TOKENIZER_SAMPLES) + 1} texts are the checkpoint's"


def _special_tokens(file: ModelFile, tokenizer: Tokenizer) -> str:
    want = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "unk": tokenizer.unk_id,
    }
    got = file.special_ids()
    wrong = [
        f"{name} is {got.get(name)} instead of {id}"
        for name, id in want.items()
        if id is not None and got.get(name) != id
    ]
    if wrong:
        raise VerificationError("; ".join(wrong))
    return ", ".join(f"{name} {id}" for name, id in want.items() if id is not None)


def _chat_template(file: ModelFile, tokenizer: Tokenizer) -> str:
    got = file.chat_template()
    if got != tokenizer.chat_template:
        raise VerificationError(
            "the artifact's chat template is not the checkpoint's" if got else "no chat template"
        )
    return f"the checkpoint's, {len(got or '')} characters"


def _tensors(file: ModelFile, artifact: Artifact, checkpoint: Checkpoint, threads: int) -> str:
    """Every tensor is there, and its dequantized error is within its type's bound."""
    shapes, records = checkpoint.shapes(), {t.name: t for t in artifact.manifest.tensors}
    present = set(file.tensor_names())
    for missing in (
        sorted(set(shapes) - present),
        sorted(present - set(shapes)),
        sorted(set(shapes) - set(records)),
    ):
        if missing:
            raise VerificationError(
                f"{missing[0]} and {len(missing) - 1} more are not in both checkpoint and artifact"
            )
    worst, worst_name = 0.0, ""
    total = sum(math.prod(s) for s in shapes.values())
    done = 0
    with Progress("checking tensors") as progress, ThreadPoolExecutor(threads) as pool:
        for name, shape in shapes.items():
            kind = TYPES.get((artifact.manifest.format, records[name].type))
            if kind is None:
                raise VerificationError(
                    f"{name}: the manifest's type '{records[name].type}' "
                    f"is no {artifact.manifest.format} type"
                )
            error, bound = _relative_error(file, checkpoint, name, shape, pool), kind.max_error
            if not error <= bound:
                raise VerificationError(
                    f"{name} ({records[name].type}): relative error {error:.2g}, above {bound:.2g}"
                )
            if bound > 0 and error / bound > worst:
                worst, worst_name = error / bound, name
            done += math.prod(shape)
            progress.update(done, total)
    return f"all {len(shapes)} within their types' bounds; nearest: {worst_name} at {worst:.0%} of it"


def _relative_error(
    file: ModelFile, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], pool: ThreadPoolExecutor
) -> float:
    """Root-mean-square of (dequantized - original) over that of the original."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape
    step = max(1, _CHUNK_WEIGHTS // columns)

    def sums(start: int) -> tuple[float, float]:
        stop = min(rows, start + step)
        want = checkpoint.float_rows(name, start, stop).numpy().ravel()
        difference = file.rows(name, start, stop).ravel() - want
        return float(np.dot(difference, difference)), float(np.dot(want, want))

    found = list(pool.map(sums, range(0, rows, step)))
    checkpoint.release(name)
    square_error, square = (math.fsum(column) for column in zip(*found, strict=True))
    return math.sqrt(square_error / square) if square else math.sqrt(square_error)


# --- the checks that run the model -----------------------------------------------------------------------


def _logit_tokens(tokenizer: Tokenizer, text: str | None, context: int) -> list[int]:
    tokens = tokenizer.encode(reference_text() if text is None else text, bos=True)[
        : min(LOGIT_TOKENS, context)
    ]
    if len(tokens) < 2 * PROMPT_TOKENS:
        raise VerificationError(
            f"the text has {len(tokens)} tokens, but at least {2 * PROMPT_TOKENS} are needed"
        )
    return tokens


def _logits(
    session: Session, checkpoint: Checkpoint, text: str | None, limits: Limits, report: dict[str, Any]
) -> list[Check]:
    """Logits on real text, and the same greedy text; both need the reference, opened once."""
    reference = ReferenceScorer(checkpoint)
    try:
        tokens = _logit_tokens(checkpoint.tokenizer(), text, session.context)
        fidelity = compare(reference.logits(tokens), session.score(tokens))
    except FoxEdgeError as error:
        return [Check("logits", False, str(error))]
    report |= fidelity.to_json()
    checks = [_run("logits", lambda: _fidelity(fidelity, limits))]
    if limits.greedy_tokens:
        checks.append(_run("greedy text", lambda: _greedy(session, reference, tokens, limits.greedy_tokens)))
    return checks


def _fidelity(fidelity: Fidelity, limits: Limits) -> str:
    found = (
        f"mean KL {fidelity.mean_kl_nats:.2g} nats (p99 {fidelity.p99_kl_nats:.2g}), "
        f"top-1 agreement {fidelity.top1_agreement_percent:.1f} % over {fidelity.positions} positions"
    )
    if not fidelity.mean_kl_nats <= limits.mean_kl_nats:
        raise VerificationError(f"{found}; the limit is {limits.mean_kl_nats:g}")
    return f"{found}; limit {limits.mean_kl_nats:g}"


def _greedy(session: Session, reference: ReferenceScorer, tokens: Sequence[int], count: int) -> str:
    """The artifact's greedy text is the reference's.

    The artifact writes; the reference then reads all of it in one pass and must choose the same token at
    every place. By induction that is the same greedy text, at the price of one pass instead of `count`.
    """
    prompt = list(tokens[:PROMPT_TOKENS])
    count = min(count, session.context - len(prompt))
    session.reset()
    written = list(generate(session, prompt, Sampling(temperature=0.0), frozenset(), count))
    chosen = _last_rows(reference.logits(prompt + written[:-1]), len(written))
    ties = 0
    for place, (row, token) in enumerate(zip(chosen, written, strict=True)):
        best = int(row.argmax())
        gap = float(row[best] - row[token])
        if gap > TIE_NATS:
            raise VerificationError(
                f"token {place + 1} of {count} is {token}, the reference's {best} ({gap:.3f} nats likelier)"
            )
        ties += token != best
    return f"{count} tokens the same as the reference's" + (
        f", {ties} of them ties within {TIE_NATS} nats" if ties else ""
    )


def _last_rows(chunks: Iterator[Any], count: int) -> list[Any]:
    rows: list[Any] = []
    for chunk in chunks:
        rows = [*rows, *chunk][-count:]
    return rows
