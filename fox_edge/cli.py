"""The command line: one thin function per verb. The functions behind them are the API.

The only module that knows all the rooms, and it enters each one lazily, so that `--help` is instant.
Results go to stdout (with `--json`: one JSON document), progress and remarks to stderr.
Exit status: 0, or 2 for a user's mistake (one sentence), or 1 for a bug (traceback kept).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fox_edge import grammar
from fox_edge.errors import FoxEdgeError
from fox_edge.grammar import EXIT_MISTAKE, SWITCHES, Verb
from fox_edge.progress import Progress, say

if TYPE_CHECKING:
    from fox_edge.artifact import Artifact
    from fox_edge.checkpoint import Checkpoint
    from fox_edge.quant import Limits, Recipe

# 1 is Python's own, for a bug that escapes with its traceback.
EXIT_OK, EXIT_INTERRUPTED = 0, 130
# A disk or a quota that is full, wherever that shows.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    args = parse(argv)
    args.words = sys.argv[1:] if argv is None else list(argv)
    try:
        return int(args.run(args) or EXIT_OK)
    except FoxEdgeError as error:
        say(f"fox-edge {args.verb}: {error}")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _close_stdout()  # its reader left (`| head`)
        return EXIT_OK
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _close_stdout()
        where = "" if error.filename is None else f"{error.filename}: "
        say(f"fox-edge {args.verb}: {where}cannot be written ({error.strerror})")
        return EXIT_MISTAKE


def _close_stdout() -> None:
    """Keep Python from complaining again, while it shuts down, that stdout takes nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, `run` among them: the verb's function."""
    return grammar.parse(argv, VERBS)


# --- verbs ---------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> None:
    from benchmarks.fidelity.verify import Verifier
    from benchmarks.processes.peak import AnonymousPeak
    from fox_edge.artifact import export_summary, export_text

    said = ("compat", "context", "kv", "rounding", "calibrate", "imatrix")
    special = {key: getattr(args, key) for key in said if getattr(args, key)}
    for key, format in (("compat", "onnx"), ("context", "pte"), ("kv", "pte")):
        if key in special and args.format != format:
            raise FoxEdgeError(f"--{key} is for --format {format}, not {args.format}")
    recipe, text, checkpoint = _recipe(args), _text(args.text), _checkpoint(args.checkpoint)
    start, out = time.monotonic(), Path(args.out)
    with AnonymousPeak() as peak, Progress(f"exporting {args.format} {recipe.name}") as progress:
        verifier = Verifier(checkpoint, recipe.limits, out, text=text, threads=args.threads, watch=peak)
        artifact = _exporter(args.format)(
            checkpoint,
            out,
            recipe,
            replace=args.replace,
            threads=args.threads,
            progress=progress.update,
            verify=verifier,
            **special,
        )
    seconds = time.monotonic() - start - verifier.seconds
    peaks = (verifier.peak_rss_before_bytes, verifier.peak_anonymous_before_bytes)
    _print(args, export_summary(artifact, seconds, *peaks), export_text)


def _imatrix(args: argparse.Namespace) -> None:
    from export.guidance import importance_of
    from export.imatrix import write_imatrix
    from fox_edge.calibration import read_calibration

    checkpoint, out = _checkpoint(args.checkpoint), Path(args.out)
    text = read_calibration(checkpoint.tokenizer(), checkpoint.config.max_positions, args.calibrate)
    start = time.monotonic()
    with Progress("measuring importance") as progress:
        importance = importance_of(checkpoint, text, progress.update)
    write_imatrix(out, importance, checkpoint.config, replace=args.replace)
    result = {
        "imatrix": str(out),
        "matrices": len(importance.sums),
        "tokens": text.tokens,
        "calibration": text.to_json(),
        "bytes": out.stat().st_size,
        "seconds": time.monotonic() - start,
    }
    _print(
        args,
        result,
        lambda r: (
            f"{r['imatrix']}: what {r['matrices']} matrices read in {r['tokens']:,} tokens, "
            f"{r['seconds']:.1f} s"
        ),
    )


def _verify(args: argparse.Namespace) -> int:
    from benchmarks.fidelity.verify import FOREIGN_LIMITS, limits_of, verify, verify_foreign, verify_text
    from fox_edge.artifact import Artifact
    from runtimes.base import is_foreign

    path, text = Path(args.artifact), _text(args.text)
    if is_foreign(path):
        from runtimes.onnx.foreign import ForeignOnnx

        foreign, limits = ForeignOnnx.open(path), _limits(FOREIGN_LIMITS, args)
        report = verify_foreign(
            foreign, _checkpoint(args.checkpoint), limits, text=text, threads=args.threads
        )
    else:
        artifact = Artifact.open(path)
        limits = _limits(limits_of(artifact), args)
        report = verify(artifact, _checkpoint(args.checkpoint), limits, text=text, threads=args.threads)
    _print(args, report, verify_text)
    return EXIT_OK if report["passed"] else EXIT_MISTAKE


def _inspect(args: argparse.Namespace) -> None:
    from fox_edge.errors import MissingPackageError
    from fox_edge.inspection import inspect, inspect_text
    from runtimes.base import SessionOptions, is_foreign, open_model, split_prefix
    from runtimes.footprint import footprint, footprint_text

    _, target = split_prefix(args.target)
    path = Path(target)
    try:
        # First, while this process holds nothing that a session's would not.
        memory = footprint(args.target, SessionOptions(context=args.context, **_session(args)))
        lines = ["", *footprint_text(memory)]
    except MissingPackageError as error:
        memory, lines = None, [f"what memory it takes is not known: {error}"]
    model: Any = open_model(path) if is_foreign(path) else None
    result = model.inspect() if model else inspect(target)
    _print(args, result | {"memory": memory}, lambda r: "\n".join([inspect_text(r), *lines]))


def _chat(args: argparse.Namespace) -> None:
    from runtimes.base import SessionOptions
    from runtimes.chat.talk import Wishes, talk

    if args.question is not None and args.prompt is not None:
        raise FoxEdgeError("a question and --prompt are two questions; give one")
    names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
    sampling = {name: value for name in names if (value := getattr(args, name)) is not None}
    talk(
        args.artifact,
        SessionOptions(context=args.context, threads=args.threads, **_session(args)),
        Wishes(args.system, sampling, args.max_tokens, args.stop),
        question=args.question if args.prompt is None else args.prompt,
        as_json=args.json,
    )


def _serve(args: argparse.Namespace) -> None:
    from runtimes.base import SessionOptions
    from runtimes.server.server import ServeOptions, ready_text, serve

    serve(
        args.artifact,
        SessionOptions(context=args.context, threads=args.threads, **_session(args)),
        ServeOptions(
            host=args.host,
            port=args.port,
            slots=args.slots,
            queue=args.queue,
            max_tokens=args.max_tokens,
            timeout_s=args.timeout,
            grace_s=args.grace,
            api_key=args.api_key,
            name=args.name,
        ),
        lambda ready: _print(args, ready, ready_text),
    )


def _bench(args: argparse.Namespace) -> None:
    from benchmarks.common.results import command_text
    from benchmarks.latency.bench import bench, bench_text

    measure = partial(
        bench,
        args.artifact,
        runtimes=args.runtime or (),
        workload=args.workload,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        users=args.users,
        page_cache=args.page_cache,
        repeats=args.repeats,
        threads=args.threads,
        context=args.context,
        session=_session(args),
        profile=args.profile,
        baseline=args.baseline,
        command=command_text(*args.words),
    )
    if args.report is None:
        _need_report(args)
        _print(args, measure(), bench_text)
    else:
        _study(args, measure)


def _need_report(args: argparse.Namespace) -> None:
    """Words that only a report has a use for are a mistake without one."""
    said = [
        word for word in ("checkpoint", "task", "limit", "data", "train") if getattr(args, word) is not None
    ]
    if said:
        raise FoxEdgeError(f"--{said[0]} is for --report DIR, which is missing")


def _study(args: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> None:
    from benchmarks.study import study, study_json, study_text

    questions = [word for word in ("limit", "data", "train") if getattr(args, word) is not None]
    if questions and args.task is None:
        raise FoxEdgeError(f"--{questions[0]} is for --task, which is missing")
    found = study(
        args.artifact,
        args.report,
        measure,
        checkpoint=args.checkpoint,
        task=args.task,
        limit=args.limit or 50,
        data=args.data,
        train=args.train,
        threads=args.threads,
        session=_session(args),
    )
    _print(args, study_json(found), lambda _: study_text(found))


def _tune(args: argparse.Namespace) -> None:
    from benchmarks.latency.tune import tune, tune_text

    _print(args, tune(args.artifact, args.prefer), tune_text)


def _eval(args: argparse.Namespace) -> None:
    if args.task == "fidelity":
        return _eval_fidelity(args)
    from benchmarks.accuracy.evaluate import evaluate, evaluate_text

    for word in ("checkpoint", "text", "tokens", "window", "score_from"):
        if getattr(args, word) is not None:
            raise FoxEdgeError(f"--{word.replace('_', '-')} is for --task fidelity, not {args.task}")
    result = evaluate(
        args.artifact,
        task=args.task,
        limit=args.limit,
        seed=args.seed,
        shots=args.shots,
        data=Path(args.data) if args.data else None,
        train=Path(args.train) if args.train else None,
        answers=Path(args.answers) if args.answers else None,
        threads=args.threads,
        session=_session(args),
        batch=args.batch,
    )
    _print(args, result, evaluate_text)


def _eval_fidelity(args: argparse.Namespace) -> None:
    from benchmarks.fidelity.task import evaluate_fidelity, fidelity_text

    if args.checkpoint is None:
        raise FoxEdgeError("--task fidelity compares with --checkpoint; give one")
    if args.batch is not None:
        raise FoxEdgeError(f"--batch {args.batch} is for questions, not for --task fidelity")
    said = ("tokens", "window", "score_from")
    result = evaluate_fidelity(
        args.artifact,
        checkpoint=args.checkpoint,
        text=Path(args.text) if args.text else None,
        threads=args.threads,
        session=_session(args),
        **{word: value for word in said if (value := getattr(args, word)) is not None},
    )
    _print(args, result, fidelity_text)


def _sweep(args: argparse.Namespace) -> None:
    from benchmarks.sweep.rows import sweep_text
    from benchmarks.sweep.run import sweep

    out = Path(args.out) if args.out else None
    _print(args, sweep(Path(args.sweep), out=out, ray=args.ray, retry=args.retry), sweep_text)


def _compare(args: argparse.Namespace) -> int:
    from benchmarks.report.compare import compare, compare_text

    result = compare(Path(args.before), Path(args.after), tolerance_percent=args.tolerance)
    _print(args, result, compare_text)
    return EXIT_MISTAKE if result["regressions"] else EXIT_OK


def _doctor(args: argparse.Namespace) -> None:
    from fox_edge.doctor import doctor_text, examine

    _print(args, examine(), doctor_text)


def _new(args: argparse.Namespace) -> None:
    from fox_edge.new import new_checkpoint

    with Progress("writing random weights") as progress:
        checkpoint = new_checkpoint(Path(args.folder), args.shape, args.seed, progress=progress.update)
    parameters = checkpoint.config.num_parameters()
    result = {
        "checkpoint": str(checkpoint.path),
        "shape": args.shape,
        "seed": args.seed,
        "parameters": parameters,
    }
    _print(
        args,
        result,
        lambda r: f"{r['checkpoint']}: {r['parameters']:,} random weights of the shape {r['shape']}",
    )


def _demo(args: argparse.Namespace) -> None:
    from benchmarks.demo import demo

    demo(Path(args.out), checkpoint=args.checkpoint, problems=args.problems)


# --- what the verbs share --------------------------------------------------------------------------------


def _checkpoint(name: str) -> Checkpoint:
    """Open a checkpoint and pass on what it has to remark."""
    from fox_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(name)
    for note in checkpoint.notes:
        say(f"note: {note}")
    return checkpoint


def _recipe(args: argparse.Namespace) -> Recipe:
    from fox_edge.quant import find_recipe

    recipe = find_recipe(args.format, args.quant)
    return replace(recipe, limits=_limits(recipe.limits, args))


def _limits(limits: Limits, args: argparse.Namespace) -> Limits:
    """A recipe's limits, with what the user said instead."""
    said = {"mean_kl_nats": args.max_mean_kl, "greedy_tokens": args.greedy_tokens}
    return replace(limits, **{name: value for name, value in said.items() if value is not None})


def _exporter(format: str) -> Callable[..., Artifact]:
    if format == "gguf":
        from export.gguf import export_gguf

        return export_gguf
    if format == "pte":
        from export.pte import export_pte

        return export_pte
    from export.onnx import export_onnx

    return export_onnx


def _session(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SessionOptions that the grammar asks for."""
    choices = {name: {"on": True, "off": False, None: None}[getattr(args, name)] for name in SWITCHES}
    return {
        "kv": args.kv,
        "prompt_threads": args.prompt_threads,
        **choices,
        "accuracy_level": args.accuracy_level,
        "device": args.device,
        "speculate": getattr(args, "speculate", None),
        **({"fixed_batch": False} if getattr(args, "loose_batch", False) else {}),
        "cache": not args.no_cache,
    }


def _text(path: str | None) -> str | None:
    """The user's own text to compare logits on, or None for the built-in one."""
    if path is None:
        return None
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        raise FoxEdgeError(f"{path}: not readable as UTF-8 text ({error})") from None


def _print(args: argparse.Namespace, result: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    print(json.dumps(result, ensure_ascii=False) if args.json else render(result), flush=True)


VERBS: dict[str, Verb] = {
    "export": _export,
    "imatrix": _imatrix,
    "verify": _verify,
    "inspect": _inspect,
    "chat": _chat,
    "serve": _serve,
    "bench": _bench,
    "tune": _tune,
    "eval": _eval,
    "sweep": _sweep,
    "compare": _compare,
    "doctor": _doctor,
    "new": _new,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
