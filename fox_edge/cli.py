"""The command line: one thin function per verb. The functions behind them are the API.

The only module that knows all the rooms, and it enters each one lazily, so that `--help` is instant.
Results go to stdout (with `--json`: one JSON document), progress and remarks to stderr.
Exit status: 0, or 2 for a user's mistake (one sentence), or 1 for a bug (traceback kept).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fox_edge import __version__
from fox_edge.errors import FoxEdgeError
from fox_edge.progress import Progress, say

if TYPE_CHECKING:
    from fox_edge.artifact import Artifact
    from fox_edge.checkpoint import Checkpoint
    from fox_edge.quant import Limits, Recipe

# 1 is Python's own, for a bug that escapes with its traceback.
EXIT_OK, EXIT_MISTAKE, EXIT_INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    args = _parse(argv)
    try:
        return int(args.run(args) or EXIT_OK)
    except FoxEdgeError as error:
        say(f"fox-edge {args.verb}: {error}")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout left (`| head`); keep Python from complaining again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


# --- verbs ---------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> None:
    from benchmarks.peak import AnonymousPeak
    from benchmarks.verify import Verifier
    from fox_edge.artifact import export_summary, export_text

    said = ("compat", "rounding", "calibrate", "imatrix")
    special = {key: getattr(args, key) for key in said if getattr(args, key)}
    if args.compat and args.format != "onnx":
        raise FoxEdgeError(f"--compat is for --format onnx, not {args.format}")
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
    from export.imatrix import write_imatrix
    from export.rounding import importance_of
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
    from benchmarks.verify import FOREIGN_LIMITS, limits_of, verify, verify_foreign, verify_text
    from fox_edge.artifact import Artifact
    from runtimes.base import is_foreign

    path, text = Path(args.artifact), _text(args.text)
    if is_foreign(path):
        from runtimes.onnx_foreign import ForeignOnnx

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
    from runtimes.base import SessionOptions, is_foreign, open_model
    from runtimes.footprint import footprint, footprint_text

    path = Path(args.target)
    try:
        # First, while this process holds nothing that a session's would not.
        memory = footprint(args.target, SessionOptions(context=args.context, **_session(args)))
        lines = ["", *footprint_text(memory)]
    except MissingPackageError as error:
        memory, lines = None, [f"what memory it takes is not known: {error}"]
    model: Any = open_model(path) if is_foreign(path) else None
    result = model.inspect() if model else inspect(args.target)
    _print(args, result | {"memory": memory}, lambda r: "\n".join([inspect_text(r), *lines]))


def _chat(args: argparse.Namespace) -> None:
    from runtimes.base import SessionOptions
    from runtimes.talk import Wishes, talk

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
    from benchmarks.bench import bench, bench_text

    result = bench(
        args.artifact,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        repeats=args.repeats,
        threads=args.threads,
        context=args.context,
        session=_session(args),
    )
    _print(args, result, bench_text)


def _tune(args: argparse.Namespace) -> None:
    from benchmarks.tune import tune, tune_text

    _print(args, tune(args.artifact, args.prefer), tune_text)


def _eval(args: argparse.Namespace) -> None:
    from benchmarks.evaluate import evaluate, evaluate_text

    result = evaluate(
        args.artifact,
        task=args.task,
        limit=args.limit,
        shots=args.shots,
        data=Path(args.data) if args.data else None,
        train=Path(args.train) if args.train else None,
        threads=args.threads,
        session=_session(args),
    )
    _print(args, result, evaluate_text)


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
    from export.onnx import export_onnx

    return export_onnx


def _session(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SessionOptions that `_session_options` asks for."""
    choices = {name: {"on": True, "off": False, None: None}[getattr(args, name)] for name in _SWITCHES}
    return {
        "kv": args.kv,
        "prompt_threads": args.prompt_threads,
        **choices,
        "accuracy_level": args.accuracy_level,
        "speculate": getattr(args, "speculate", None),
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


# --- the grammar -------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Argparse that answers a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message} (see {self.prog} --help)")
        raise SystemExit(EXIT_MISTAKE)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; a mistake ends the process with one line."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # Argparse gives up on an optional last word once options have come before it.
    if args.verb == "chat" and args.question is None and len(rest) == 1 and not rest[0].startswith("-"):
        args.question = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fox-edge", description="Take a Fox-1 checkpoint to laptops and phones, and prove it got there."
    )
    parser.add_argument("--version", action="version", version=f"fox-edge {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        return sub

    export = verb("export", _export, "write a verified GGUF or ONNX model from a checkpoint")
    export.add_argument("checkpoint", help="'nano', a Hugging Face folder, or a hub id like owner/name")
    export.add_argument("out", help="folder to create")
    export.add_argument("--format", choices=("gguf", "onnx"), required=True)
    export.add_argument(
        "--quant",
        default="int4",
        help="int4 (default), int8; GGUF also laptop, phone, tiny; a type's name; or a recipe.toml",
    )
    export.add_argument(
        "--replace", action="store_true", help="replace an artifact that exists under this name"
    )
    export.add_argument(
        "--compat",
        action="append",
        choices=("optimum",),
        default=[],
        help="ONNX: also serve what this client does and others need not pay for (docs/onnx-clients.md)",
    )
    export.add_argument(
        "--rounding",
        choices=("nearest", "search", "compensated"),
        help="from quick to good (default: compensated where a type has at most 4 bits, else nearest)",
    )
    _calibrate(export)
    export.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="round by an importance matrix, ours or llama.cpp's"
    )
    _verification(export)
    _threads(export)

    imatrix = verb(
        "imatrix", _imatrix, "measure which columns of each matrix matter, for llama.cpp's tools too"
    )
    imatrix.add_argument("checkpoint", help="'nano', a Hugging Face folder, or a hub id like owner/name")
    imatrix.add_argument("out", metavar="FILE.gguf", help="file to create")
    imatrix.add_argument("--replace", action="store_true", help="replace a file of this name")
    _calibrate(imatrix)

    verify = verb("verify", _verify, "check that an artifact is still the model it was made from")
    verify.add_argument("artifact", help="an artifact, or an ONNX folder that another tool exported")
    verify.add_argument("--checkpoint", required=True, help="the checkpoint it was exported from")
    _verification(verify)
    _threads(verify)

    inspect = verb(
        "inspect", _inspect, "show what is in a checkpoint or artifact, and the memory it will take"
    )
    inspect.add_argument("target", metavar="CHECKPOINT|ARTIFACT")
    inspect.add_argument("--context", type=_positive, help="tokens of context to reckon with")
    _session_options(inspect)

    chat = verb("chat", _chat, "talk to a model in the terminal, or let a script ask it one question")
    chat.add_argument(
        "artifact", help="an artifact, another tool's ONNX folder, or torch:CHECKPOINT (BF16 in PyTorch)"
    )
    chat.add_argument("question", nargs="?", help="ask this, print the answer and leave; or use --prompt")
    chat.add_argument("--prompt", metavar="TEXT", help="the question; what is piped in is put after it")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--max-tokens", type=_positive, default=512, help="of one answer (default: 512)")
    chat.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="a text that ends an answer; repeatable"
    )
    _sampling_options(chat)
    _context(chat)
    _speculation(chat, "auto")
    _session_options(chat)
    _threads(chat)

    serve = verb("serve", _serve, "answer over HTTP as OpenAI's servers do, and on a chat page")
    serve.add_argument(
        "artifact", help="an artifact, another tool's ONNX folder, or torch:CHECKPOINT (BF16 in PyTorch)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only; others need a key")
    serve.add_argument("--port", type=int, default=8080, help="default: 8080; 0: any that is free")
    serve.add_argument("--api-key", metavar="KEY", help="default: the environment's FOX_EDGE_API_KEY")
    serve.add_argument("--name", help="the model's id in requests (default: the folder's name)")
    serve.add_argument("--slots", type=_positive, default=4, help="answers at once (default: 4)")
    serve.add_argument("--queue", type=_count, default=64, help="requests that may wait (default: 64)")
    serve.add_argument("--max-tokens", type=_positive, help="the most per answer (default: the context)")
    serve.add_argument("--timeout", type=float, default=600.0, help="seconds per answer (default: 600)")
    serve.add_argument(
        "--grace", type=float, default=30.0, help="seconds for running answers at the end (default: 30)"
    )
    _context(serve)
    _session_options(serve)
    _threads(serve)

    bench = verb("bench", _bench, "measure latency and memory, each artifact in a fresh process")
    bench.add_argument(
        "artifact",
        nargs="+",
        help="artifacts, other tools' ONNX folders, or torch:CHECKPOINT (BF16 in PyTorch)",
    )
    bench.add_argument("--prompt-tokens", type=_positive, default=234)
    bench.add_argument("--decode-tokens", type=_positive, default=64)
    bench.add_argument("--repeats", type=_positive, default=3)
    _context(bench)
    _speculation(bench, "off")
    _session_options(bench)
    _threads(bench)

    tune = verb("tune", _tune, "find the choices that suit this machine, in 20 seconds, and keep them")
    tune.add_argument("artifact")
    tune.add_argument(
        "--prefer",
        choices=("balance", "prompt", "decode", "memory"),
        default="balance",
        help="balance (default): time for a question and its answer; memory may quantize the KV cache",
    )

    evaluate = verb("eval", _eval, "measure accuracy on GSM8K or on built-in word problems")
    evaluate.add_argument(
        "artifact",
        nargs="+",
        help="artifacts, other tools' ONNX folders, or torch:CHECKPOINT (BF16 in PyTorch)",
    )
    evaluate.add_argument("--task", default="gsm8k", help="gsm8k (5-shot) or word-problems (0-shot chat)")
    evaluate.add_argument("--limit", type=_positive, default=50, help="problems to ask (default: 50)")
    evaluate.add_argument("--shots", type=int, default=5, help="worked examples before each GSM8K question")
    evaluate.add_argument("--data", help="GSM8K test.jsonl; without it, the hub is asked")
    evaluate.add_argument("--train", help="GSM8K train.jsonl, for the worked examples")
    _session_options(evaluate)
    _threads(evaluate)

    verb("doctor", _doctor, "tell which runtimes work here, and how to add the others")

    new = verb("new", _new, "write a random checkpoint of a real shape, to rehearse with")
    new.add_argument("folder")
    new.add_argument("--shape", default="fox-1-1.6b", help="fox-1-1.6b (default) or nano")
    new.add_argument("--seed", type=int, default=0)

    demo = verb("demo", _demo, "export, verify, measure and question the embedded model, four ways")
    demo.add_argument("--checkpoint", default="nano")
    demo.add_argument("--out", default="out", help="folder for the artifacts and the report (default: out)")
    demo.add_argument("--problems", type=_positive, default=50, help="word problems to ask each model")
    return parser


def _calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="UTF-8 text to round for (default: built-in)"
    )


def _verification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-mean-kl", type=float, help="nats; default: the recipe's (int8 0.005, int4 0.1)"
    )
    parser.add_argument("--greedy-tokens", type=int, help="tokens of greedy text that must agree (int8: 32)")
    parser.add_argument("--text", help="UTF-8 file to compare logits on (default: built-in word problems)")


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, help="default: the processors this process may use")


# Choices of llama.cpp's that are on, off, or its own.
_SWITCHES = {
    "repack": "copy weights into the layout of this processor's kernels at load (default: on)",
    "flash_attention": "attention in one pass over the KV cache (default: where it pays)",
    "mmap": "map the model file instead of reading it (default: on)",
}


def _session_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv",
        metavar="TYPE",
        help="what the KV cache stores: GGUF f16 (default), q8_0 or q4_0; ONNX float32 (default) or int8",
    )
    for name, help in _SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", choices=("on", "off"), help=f"GGUF: {help}")
    parser.add_argument(
        "--prompt-threads", type=_positive, help="GGUF: threads for prompts (default: as --threads)"
    )
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=(1, 4),
        help="ONNX: 1 computes in float32, 4 (default) on activations rounded to int8",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="use and keep nothing beside the artifact: no packed weights (ONNX), no tuned choices",
    )


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=float,
        help="0: always the likeliest token (default: what the model's generation_config.json asks, else 0)",
    )
    parser.add_argument("--top-p", type=float, help="sample the likeliest tokens of this share of the mass")
    parser.add_argument("--top-k", type=int, help="sample this many likeliest tokens")
    parser.add_argument("--min-p", type=float, help="sample tokens of this share of the likeliest's chance")
    parser.add_argument("--repeat-penalty", type=float, help="above 1: tokens seen of late are less likely")
    parser.add_argument("--seed", type=int, help="the same answers again (default: a new one, told)")


def _speculation(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--speculate",
        type=_guesses,
        default=default,
        metavar="auto|off|N",
        help="guess tokens from what came before, greedy answers only: as many as pay, none, or N at once "
        f"(default: {default})",
    )


def _guesses(text: str) -> int | str | None:
    if text in ("auto", "off"):
        return text if text == "auto" else None
    return _positive(text)


def _context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=_positive, help="tokens of context to open")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number from 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number from 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
