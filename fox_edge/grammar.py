"""What can be said to `fox-edge`: verbs, their words, and the help. Knows no verb's work.

A mistake is answered in one line, with exit status 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from fox_edge import __version__
from fox_edge.progress import say

EXIT_MISTAKE = 2

# Does a verb's work; returns the exit status (None: 0).
Verb: TypeAlias = Callable[[argparse.Namespace], int | None]
# llama.cpp's choices that are on, off, or its own.
SWITCHES = {
    "repack": "copy weights into the layout of this processor's kernels at load (default: on)",
    "flash_attention": "attention in one pass over the KV cache (default: where it pays)",
    "mmap": "map the model file instead of reading it (default: on)",
}


class _Parser(argparse.ArgumentParser):
    """Argparse that answers a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message} (see {self.prog} --help)")
        raise SystemExit(EXIT_MISTAKE)


def parse(argv: Sequence[str] | None, verbs: Mapping[str, Verb]) -> argparse.Namespace:
    """The arguments, `run` among them: what the verb does. A mistake ends the process with one line."""
    parser = _parser(verbs)
    args, rest = parser.parse_known_args(argv)
    # Argparse gives up on an optional last word once options have come before it.
    if args.verb == "chat" and args.question is None and len(rest) == 1 and not rest[0].startswith("-"):
        args.question = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser(runs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fox-edge", description="Take a Fox-1 checkpoint to laptops and phones, and prove it got there."
    )
    parser.add_argument("--version", action="version", version=f"fox-edge {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(run=runs[name])
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        return sub

    export = verb("export", "write a verified GGUF, ONNX or ExecuTorch model from a checkpoint")
    export.add_argument("checkpoint", help="'nano', a Hugging Face folder, or a hub id like owner/name")
    export.add_argument("out", help="folder to create")
    export.add_argument("--format", choices=("gguf", "onnx", "pte"), required=True)
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
        "--context",
        type=_positive,
        metavar="N",
        help="ExecuTorch: positions that its caches hold, memory taken at load (default: at most 2,048)",
    )
    export.add_argument(
        "--kv",
        choices=("float32", "int8"),
        help="ExecuTorch: what its caches store, fixed by the export (default: float32)",
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

    imatrix = verb("imatrix", "measure which columns of each matrix matter, for llama.cpp's tools too")
    imatrix.add_argument("checkpoint", help="'nano', a Hugging Face folder, or a hub id like owner/name")
    imatrix.add_argument("out", metavar="FILE.gguf", help="file to create")
    imatrix.add_argument("--replace", action="store_true", help="replace a file of this name")
    _calibrate(imatrix)

    verify = verb("verify", "check that an artifact is still the model it was made from")
    verify.add_argument("artifact", help="an artifact, or an ONNX folder that another tool exported")
    verify.add_argument("--checkpoint", required=True, help="the checkpoint it was exported from")
    _verification(verify)
    _threads(verify)

    inspect = verb("inspect", "show what is in a checkpoint or artifact, and the memory it will take")
    inspect.add_argument(
        "target",
        metavar="CHECKPOINT|ARTIFACT",
        help="with torch: or cuda: before it, the memory that it takes there",
    )
    inspect.add_argument("--context", type=_positive, help="tokens of context to reckon with")
    _session_options(inspect)

    chat = verb("chat", "talk to a model in the terminal, or let a script ask it one question")
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

    serve = verb("serve", "answer over HTTP as OpenAI's servers do, and on a chat page")
    serve.add_argument(
        "artifact", help="an artifact, another tool's ONNX folder, or torch:CHECKPOINT (BF16 in PyTorch)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only; others need a key")
    serve.add_argument("--port", type=int, default=8080, help="default: 8080; 0: any that is free")
    serve.add_argument("--api-key", metavar="KEY", help="default: the environment's FOX_EDGE_API_KEY")
    serve.add_argument("--name", help="the model's id in requests (default: the folder's name)")
    serve.add_argument("--slots", type=_positive, default=4, help="answers at once (default: 4)")
    _loose_batch(serve)
    serve.add_argument("--queue", type=_count, default=64, help="requests that may wait (default: 64)")
    serve.add_argument("--max-tokens", type=_positive, help="the most per answer (default: the context)")
    serve.add_argument("--timeout", type=float, default=600.0, help="seconds per answer (default: 600)")
    serve.add_argument(
        "--grace", type=float, default=30.0, help="seconds for running answers at the end (default: 30)"
    )
    _context(serve)
    _session_options(serve)
    _threads(serve)

    bench = verb("bench", "measure latency and memory, each artifact in a fresh process")
    bench.add_argument(
        "artifact",
        nargs="+",
        help="artifacts, other tools' ONNX folders, torch:CHECKPOINT (BF16 in PyTorch) or browser:ARTIFACT",
    )
    bench.add_argument(
        "--runtime",
        action="append",
        choices=("browser",),
        help="open every artifact there too, as one more row: browser (a page in a headless Chromium)",
    )
    bench.add_argument(
        "--workload",
        default="custom",
        metavar="NAME",
        help="custom (default), paper (the report's: 234 tokens on average, 512 out), short, long (4,000) or "
        "chat (six turns)",
    )
    bench.add_argument("--prompt-tokens", type=_positive, help="custom: of the prompt (default: 234)")
    bench.add_argument(
        "--decode-tokens", type=_positive, help="of an answer (default: 64, the paper's workload 512)"
    )
    bench.add_argument(
        "--users",
        type=_counts,
        default=[1],
        metavar="N[,N...]",
        help="conversations at once on the same weights, a row for each number (default: 1)",
    )
    _loose_batch(bench)
    bench.add_argument(
        "--page-cache",
        choices=("warm", "cold"),
        default="warm",
        help="whether the model's files are in memory before each load (default: warm)",
    )
    bench.add_argument(
        "--repeats", type=_positive, default=5, help="rounds, a fresh process each (default: 5)"
    )
    bench.add_argument(
        "--profile",
        metavar="NAME",
        help="keep to a device's threads, context and memory: laptop, phone-8gb, phone-4gb, pi5 or this",
    )
    bench.add_argument(
        "--baseline",
        metavar="FILE",
        help="a result of bench or its report.json to compare with, not the paper's H100 (FILE#NAME: a row)",
    )
    bench.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write report.html, .md and .json there: which artifact to ship to each device, and why",
    )
    bench.add_argument("--checkpoint", help="report: measure fidelity against it")
    bench.add_argument("--task", metavar="NAME", help="report: questions to answer, as eval's --task")
    bench.add_argument("--limit", type=_positive, help="report: questions of --task (default: 50)")
    bench.add_argument("--data", type=Path, help="report: as eval's --data")
    bench.add_argument("--train", type=Path, help="report: as eval's --train")
    _context(bench)
    _speculation(bench, "off")
    _session_options(bench)
    _threads(bench)

    tune = verb("tune", "find the choices that suit this machine, in 20 seconds, and keep them")
    tune.add_argument("artifact")
    tune.add_argument(
        "--prefer",
        choices=("balance", "prompt", "decode", "memory"),
        default="balance",
        help="balance (default): time for a question and its answer; memory may quantize the KV cache",
    )

    evaluate = verb(
        "eval", "measure accuracy: GSM8K, built-in word problems, and five tasks of lm-evaluation-harness"
    )
    evaluate.add_argument(
        "artifact",
        nargs="+",
        help="artifacts, other tools' ONNX folders, or torch:CHECKPOINT (BF16 in PyTorch)",
    )
    evaluate.add_argument(
        "--task",
        default="gsm8k",
        help="gsm8k (default), word-problems; through lm-evaluation-harness: arc-challenge, hellaswag, "
        "truthfulqa, mmlu, winogrande, gsm8k-harness; fidelity: KL divergence from --checkpoint",
    )
    evaluate.add_argument("--limit", type=_positive, default=50, help="questions to ask (default: 50)")
    evaluate.add_argument(
        "--seed",
        type=_count,
        help="ask a random subset, the same for the same seed (default: the first ones)",
    )
    evaluate.add_argument(
        "--shots", type=int, help="worked examples before each question (default: the paper's)"
    )
    evaluate.add_argument(
        "--data", help="GSM8K test.jsonl, or a folder of the task's files; without it, the hub is asked"
    )
    evaluate.add_argument("--train", help="GSM8K train.jsonl, for the worked examples")
    evaluate.add_argument(
        "--batch",
        type=_positive,
        metavar="N",
        help="answer N questions at once, in one pass over the weights (default: GGUF one by one, a GPU 64)",
    )
    evaluate.add_argument(
        "--answers", metavar="FILE", help="keep every answer in this .jsonl, and go on where it was cut off"
    )
    _fidelity(evaluate)
    _session_options(evaluate)
    _threads(evaluate)

    sweep = verb("sweep", "export, measure and question many artifacts; goes on where it was cut off")
    sweep.add_argument("sweep", metavar="SWEEP.toml", help="what to do (docs/sweep.md)")
    sweep.add_argument("--out", metavar="DIR", help="folder for everything (default: out/NAME-OF-THE-FILE)")
    sweep.add_argument(
        "--ray", metavar="ADDRESS", help="a Ray cluster: HOST:PORT, auto (the one here), local (a new one)"
    )
    sweep.add_argument("--retry", action="store_true", help="try again what failed before")

    compare = verb("compare", "tell regressions and improvements between two results from the noise")
    compare.add_argument("before", help="a report.json, or what bench --json or eval --json printed")
    compare.add_argument("after", help="the same of later")
    compare.add_argument(
        "--tolerance",
        type=_percent,
        default=3.0,
        metavar="PERCENT",
        help="smaller changes do not count (default: 3); exit status 2 when there is a regression",
    )

    verb("doctor", "tell which runtimes work here, and how to add the others")

    new = verb("new", "write a random checkpoint of a real shape, to rehearse with")
    new.add_argument("folder")
    new.add_argument("--shape", default="fox-1-1.6b", help="fox-1-1.6b (default) or nano")
    new.add_argument("--seed", type=int, default=0)

    demo = verb("demo", "export, verify, measure and question the embedded model, four ways")
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


def _fidelity(parser: argparse.ArgumentParser) -> None:
    words = parser.add_argument_group("--task fidelity")
    words.add_argument(
        "--checkpoint", help="what the artifacts are held to, in float32; an artifact can be, too"
    )
    words.add_argument("--text", metavar="FILE", help="UTF-8 text (default: built-in word problems)")
    words.add_argument("--tokens", type=_positive, help="how much of the text (default: 4096 tokens)")
    words.add_argument("--window", type=_positive, help="tokens that stand alone (default: 512)")
    words.add_argument(
        "--score-from",
        type=_count,
        metavar="N",
        help="first position of a window to compare (default: its half)",
    )


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, help="default: the processors this process may use")


def _loose_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loose-batch",
        action="store_true",
        help="GGUF, GPU: take the next tokens of all answers in one pass over the weights, even where an "
        "answer's last bits then depend on the others",
    )


def _session_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv",
        metavar="TYPE",
        help="what the KV cache stores: GGUF f16 (default), q8_0 or q4_0; ONNX float32 (default) or int8",
    )
    for name, help in SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", choices=("on", "off"), help=f"GGUF: {help}")
    parser.add_argument(
        "--prompt-threads", type=_positive, help="GGUF: threads for prompts (default: as --threads)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="what computes (default: the GPU for cuda:..., else the CPU); cuda takes libraries built for it",
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


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is no percentage from 0 to 1000")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number from 0")
    return value


def _counts(text: str) -> list[int]:
    """Whole numbers from 1, by commas; each once."""
    try:
        return list(dict.fromkeys(_positive(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not whole numbers, like 1,4") from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number from 1")
    return value
