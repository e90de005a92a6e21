"""Is the export still the model? Checks an artifact, or another tool's export, against its checkpoint.

Runs at the end of every export, before the artifact gets its name, and again whenever a user asks.
Each check (checks.py) is one row of the report; all are run, so that one failure does not hide another.
Knows which checks a model gets, and how they are told.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.machine import peak_rss_bytes
from benchmarks.fidelity.checks import (
    Check,
    Choices,
    check_activations,
    check_chat_template,
    check_files,
    check_logits,
    check_manifest,
    check_runners,
    check_source,
    check_special_tokens,
    check_tensors,
    check_tokenizer,
    run_check,
)
from benchmarks.processes.peak import AnonymousPeak
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, FoxEdgeError, VerificationError
from fox_edge.processors import available_cores
from fox_edge.quant import INT4_LIMITS, ONNX, PTE, TYPES, Limits
from fox_edge.tokenizer import Tokenizer
from runtimes.base import (
    SCORE_CHUNK,
    SessionOptions,
    TokenFile,
    open_model_file,
    open_session,
)

if TYPE_CHECKING:
    from runtimes.onnx.foreign import ForeignOnnx

# What is demanded of another tool's export, which has no recipe: as of an int4 export of ours.
FOREIGN_LIMITS = INT4_LIMITS


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
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    figures: dict[str, Any] = {}
    checks = [
        run_check("files", lambda: check_files(artifact)),
        run_check("source", lambda: check_source(artifact, checkpoint)),
        run_check("manifest", lambda: check_manifest(artifact, checkpoint)),
    ]
    try:
        with contextlib.closing(open_model_file(artifact)) as file:
            checks += [
                *_token_checks(file, tokenizer),
                *_phone_checks(artifact, tokenizer),
                run_check("tie", lambda: file.tie() if config.tied else "the checkpoint is not tied"),
                run_check(
                    "tensors", lambda: check_tensors(file, artifact, checkpoint, threads or available_cores())
                ),
            ]
        options, choices = SessionOptions(threads=threads, cache=False), Choices()
        with contextlib.closing(open_session(artifact, options)) as session:
            checks += check_logits(session, checkpoint, text, limits, figures, choices)
        if choices.best and _rounds_activations(artifact):
            exact = replace(options, accuracy_level=1)
            with contextlib.closing(open_session(artifact, exact)) as session:
                checks.append(check_activations(session, choices, figures))
    except FoxEdgeError as error:
        checks.append(Check("opens", False, str(error)))
    return _report(str(artifact.path), limits, figures, checks, start)


def _rounds_activations(artifact: Artifact) -> bool:
    """Whether its runtime rounds what quantized matrices read to int8, unless told otherwise."""
    manifest = artifact.manifest
    kinds = (TYPES.get((ONNX, tensor.type)) for tensor in manifest.tensors)
    return manifest.format == ONNX and any(kind is not None and kind.bits for kind in kinds)


def verify_foreign(
    foreign: ForeignOnnx,
    checkpoint: Checkpoint,
    limits: Limits = FOREIGN_LIMITS,
    *,
    text: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """What can be checked of an ONNX folder that another tool exported; the report is as `verify`'s.

    Whether the tie survived is a finding, not a failure: no such tool promises it. Two more keys:
    `tied_copies` (None where embedding or head was not found), `second_copy_bytes`.
    """
    from runtimes.side_files import SideFiles

    start = time.monotonic()
    figures: dict[str, Any] = {
        "tied_copies": None if foreign.tie is None else 1 if foreign.tie.one_copy else 2,
        "second_copy_bytes": None if foreign.tie is None else foreign.tie.second_bytes,
    }
    checks = [Check("manifest", True, _UNCHECKED.format(foreign.producer), finding=True)]
    try:
        checks += _token_checks(SideFiles(foreign.folder), checkpoint.tokenizer())
        checks.append(_foreign_tie(foreign, checkpoint))
        if foreign.interface.joint_scales:
            checks.append(Check("activations", True, _JOINT_SCALES, finding=True))
        with contextlib.closing(open_session(foreign, SessionOptions(threads=threads))) as session:
            checks += check_logits(session, checkpoint, text, limits, figures)
    except FoxEdgeError as error:
        checks.append(Check("opens", False, str(error)))
    return _report(str(foreign.path), limits, figures, checks, start)


_UNCHECKED = (
    "none, written by {}: not checked are the files' sha256, which checkpoint they were made from, and each "
    "tensor's own error"
)


_JOINT_SCALES = (
    "rounded with one scale for all tokens that are fed at once, so that the logits depend on how many those "
    f"are; here {SCORE_CHUNK}"
)


def _foreign_tie(foreign: ForeignOnnx, checkpoint: Checkpoint) -> Check:
    tie = foreign.tie
    if not checkpoint.config.tied:
        return Check("tie", True, "the checkpoint is not tied")
    if tie is None:
        return Check("tie", True, "no embedding or no head was found in the graph", finding=True)
    return Check("tie", True, tie.sentence(), finding=not tie.one_copy or tie.is_copied_at_load)


def _token_checks(file: TokenFile, tokenizer: Tokenizer) -> list[Check]:
    return [
        run_check("tokenizer", lambda: check_tokenizer(file, tokenizer)),
        run_check("special tokens", lambda: check_special_tokens(file, tokenizer)),
        run_check("chat template", lambda: check_chat_template(file, tokenizer)),
    ]


def _phone_checks(artifact: Artifact, tokenizer: Tokenizer) -> list[Check]:
    if artifact.manifest.format != PTE:
        return []
    return [run_check("phone tokenizer", lambda: check_runners(artifact, tokenizer))]


def _report(
    name: str, limits: Limits, figures: dict[str, Any], checks: list[Check], start: float
) -> dict[str, Any]:
    return {
        "artifact": name,
        "limits": asdict(limits),
        **figures,
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "seconds": round(time.monotonic() - start, 2),
    }


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
    lines = [f"{_mark(check)}  {check['name']:<15} {check['detail']}" for check in report["checks"]]
    verdict = "verified: it is still the model" if report["passed"] else "NOT the model any more"
    return "\n".join([*lines, f"{report['artifact']}: {verdict} ({report['seconds']:.1f} s)"])


def _mark(check: dict[str, Any]) -> str:
    if not check["passed"]:
        return "FAIL"
    return "note" if check["finding"] else "ok  "
