"""The checks of verification: each looks at one thing, and says what it found or raises what is wrong.

Knows model files and sessions through their protocols, and the checkpoint that they are held to; not which
checks a model gets (verify.py decides), nor which format it looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.fidelity.divergence import Fidelity, compare, reference_text
from benchmarks.fidelity.reference import ReferenceScorer
from fox_edge.artifact import Artifact, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError, VerificationError
from fox_edge.progress import Progress
from fox_edge.quant import COMPENSATED, MOST_DRIFT, TYPES, Limits
from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits, ModelFile, Session, TokenFile
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
    """One row of the report. A finding is told without being right or wrong."""

    name: str
    passed: bool
    detail: str
    finding: bool = False


def run_check(name: str, check: Callable[[], str]) -> Check:
    """A check says what it found, or raises a FoxEdgeError that says what is wrong."""
    try:
        return Check(name, True, check())
    except FoxEdgeError as error:
        return Check(name, False, str(error))


# --- the checks that read files ------------------------------------------------------------------------


def check_files(artifact: Artifact) -> str:
    """Every file has the sha256 that the manifest gives it."""
    if not artifact.manifest.files:
        return "just written; hashed when the export is complete"
    changed = list(artifact.changed_files())
    if changed:
        raise VerificationError(f"sha256 is not the manifest's: {', '.join(changed)}")
    return f"{len(artifact.manifest.files)} files have the manifest's sha256"


def check_source(artifact: Artifact, checkpoint: Checkpoint) -> str:
    """The artifact was made from this checkpoint."""
    told, found = artifact.manifest.checkpoint_sha256, checkpoint.digest()
    if told != found:
        raise VerificationError(f"made from checkpoint {told[:12]}, but {checkpoint.name} is {found[:12]}")
    return f"made from this checkpoint ({found[:12]})"


def check_manifest(artifact: Artifact, checkpoint: Checkpoint) -> str:
    """What the manifest and config.json say of the model's shape is the checkpoint's."""
    manifest, config, shapes = artifact.manifest, checkpoint.config, checkpoint.shapes()
    told: dict[str, Any] = {
        "tied": manifest.tied,
        "parameters": manifest.parameters,
        "context": manifest.context,
        **{f"config.json's {k}": v for k, v in asdict(FoxConfig.read(artifact.path / "config.json")).items()},
        **{f"the shape of {t.name}": t.shape for t in manifest.tensors},
    }
    due: dict[str, Any] = {
        "tied": config.tied,
        "parameters": config.num_parameters(),
        "context": config.max_positions,
        **{f"config.json's {k}": v for k, v in asdict(config).items()},
        **{f"the shape of {name}": shape for name, shape in shapes.items()},
    }
    wrong = [
        f"{what} is {told.get(what)}, the checkpoint's {value}"
        for what, value in due.items()
        if told.get(what) != value
    ]
    strangers = [t.name for t in manifest.tensors if t.name not in shapes]
    if len(manifest.tensors) - len(strangers) > len(shapes):
        wrong.append(f"{len(manifest.tensors)} tensors are listed, the checkpoint has {len(shapes)}")
    wrong += [f"the checkpoint has no {name}" for name in strangers[:1]]
    if wrong:
        raise VerificationError("the manifest lies: " + "; ".join(wrong[:3]))
    return (
        f"{manifest.parameters:,} parameters, context {manifest.context}, {len(shapes)} tensors as they are"
    )


def check_tokenizer(file: TokenFile, tokenizer: Tokenizer) -> str:
    """Awkward texts and a chat become the same token ids."""
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


def check_special_tokens(file: TokenFile, tokenizer: Tokenizer) -> str:
    """The ids that a runtime is told are the tokenizer's."""
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


def check_chat_template(file: TokenFile, tokenizer: Tokenizer) -> str:
    """The chat template is the checkpoint's, to the letter."""
    got = file.chat_template()
    if got != tokenizer.chat_template:
        raise VerificationError(
            "the artifact's chat template is not the checkpoint's" if got else "no chat template"
        )
    return f"the checkpoint's, {len(got or '')} characters"


def check_runners(artifact: Artifact, tokenizer: Tokenizer) -> str:
    """What ExecuTorch's runners on phones make of the folder: their own token ids, and where answers end.

    Without a tokenizer.json they know no markup: then only plain text is compared.
    """
    from fox_edge.pte_format import read_program
    from runtimes.executorch.runner_tokenizer import RunnerTokenizer

    told = read_program(artifact.model_path).constant("get_eos_ids")
    ends = set(told) if isinstance(told, list) else {told}
    if ends != tokenizer.stop_ids:
        raise VerificationError(
            f"the program ends answers at {sorted(ends)}, the checkpoint at {sorted(tokenizer.stop_ids)}"
        )
    theirs = RunnerTokenizer(artifact.path)
    chat = tokenizer.render_chat([{"role": "user", "content": TOKENIZER_SAMPLES[0]}])
    texts = (*TOKENIZER_SAMPLES, chat) if theirs.markup else TOKENIZER_SAMPLES
    for text in texts:
        want, got = tokenizer.encode(text, bos=False, special=True), theirs.encode(text)
        if want != got:
            raise VerificationError(
                f"{theirs.path.name}: {text!r} becomes {got[:8]} in ExecuTorch's runners, "
                f"the checkpoint's {want[:8]}"
            )
    markup = "" if theirs.markup else "; a chat's markup they do not know, for want of a tokenizer.json"
    return f"{len(texts)} texts by {theirs.path.name} are the checkpoint's in ExecuTorch's own code{markup}"


def check_tensors(file: ModelFile, artifact: Artifact, checkpoint: Checkpoint, threads: int) -> str:
    """Every tensor is there, as the manifest says it is, and its error is within its type's bound."""
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
    for name in shapes:
        _as_told(file, artifact, records[name])
    # Compensation moves weights on purpose before it rounds them, to make good what came before.
    moved = MOST_DRIFT if artifact.manifest.recipe.get("rounding") == COMPENSATED else 0.0
    worst, worst_name = 0.0, ""
    total = sum(math.prod(s) for s in shapes.values())
    done = 0
    with Progress("checking tensors") as progress, ThreadPoolExecutor(threads) as pool:
        for name, shape in shapes.items():
            kind = TYPES[artifact.manifest.format, records[name].type]
            error = _relative_error(file, checkpoint, name, shape, pool)
            bound = kind.max_error + (moved if kind.bits and len(shape) == 2 else 0)
            if not error <= bound:
                raise VerificationError(
                    f"{name} ({kind.name}): relative error {error:.2g}, above {bound:.2g}"
                )
            if bound > 0 and error / bound > worst:
                worst, worst_name = error / bound, name
            done += math.prod(shape)
            progress.update(done, total)
    return f"all {len(shapes)} within their types' bounds; nearest: {worst_name} at {worst:.0%} of it"


def _as_told(file: ModelFile, artifact: Artifact, record: TensorRecord) -> None:
    """The file's own type and bytes are the manifest's: a lie would loosen the bound of the error."""
    type_name, size = file.stored(record.name)
    if type_name != record.type:
        raise VerificationError(
            f"{record.name}: the manifest says {record.type}, but the file has {type_name}"
        )
    if (artifact.manifest.format, type_name) not in TYPES:
        raise VerificationError(f"{record.name}: {type_name} is no {artifact.manifest.format} type")
    if size != record.bytes:
        raise VerificationError(
            f"{record.name}: the manifest says {record.bytes} bytes, but the file has {size}"
        )


def _relative_error(
    file: ModelFile, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], pool: ThreadPoolExecutor
) -> float:
    """Root-mean-square of (dequantized - original) over that of the original."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape
    step = max(1, _CHUNK_WEIGHTS // columns)

    def sums(start: int) -> tuple[float, float]:
        stop = min(rows, start + step)
        want = checkpoint.float_rows(name, start, stop).numpy().ravel()
        with np.errstate(all="ignore"):  # damaged weights may be anything; what is no number is no match
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


def check_logits(
    session: Session,
    checkpoint: Checkpoint,
    text: str | None,
    limits: Limits,
    report: dict[str, Any],
    choices: Choices | None = None,
) -> list[Check]:
    """Logits on real text, and the same greedy text; both need the reference, opened once.

    `choices` remembers what the session made of the text.
    """
    reference, choices = ReferenceScorer(checkpoint), choices or Choices()
    try:
        tokens = _logit_tokens(checkpoint.tokenizer(), text, session.context)
        fidelity = compare(reference.passing_logits(tokens), choices.of(session, tokens))
    except FoxEdgeError as error:
        return [Check("logits", False, str(error))]
    report |= fidelity.to_json()
    checks = [run_check("logits", lambda: _fidelity(fidelity, limits))]
    if limits.greedy_tokens:
        checks.append(
            run_check("greedy text", lambda: _greedy(session, reference, tokens, limits.greedy_tokens))
        )
    return checks


@dataclass
class Choices:
    """A text, and the likeliest token after each of its tokens, as a session has it."""

    tokens: Sequence[int] = ()
    best: list[int] = field(default_factory=list)

    def of(self, session: Session, tokens: Sequence[int]) -> Iterator[Logits]:
        """The session's logits over a text; remembers the likeliest tokens as they pass."""
        self.tokens, self.best = tokens, []
        for logits in session.score(tokens):
            self.best.extend(logits.argmax(-1).tolist())
            yield logits


def check_activations(exact: Session, choices: Choices, report: dict[str, Any]) -> Check:
    """How often int8 activations, with which `choices` were made, choose another token than float32 ones."""
    again = Choices()
    for _ in again.of(exact, choices.tokens):
        pass
    flips, count = sum(a != b for a, b in zip(choices.best, again.best, strict=True)), len(again.best)
    report["flipped_percent"] = 100 * flips / count
    return Check(
        "activations",
        True,
        f"rounding them to int8 changes the likeliest token at {flips} of {count} positions "
        f"({report['flipped_percent']:.1f} %); accuracy level 1 does not round them",
        finding=True,
    )


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
