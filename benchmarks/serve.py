"""The server under load: many clients, nothing lost or mixed up, memory flat; what a known prompt saves.

    python -m benchmarks.serve ARTIFACT --clients 32 --seconds 120 --results FILE

Every client asks held-out word problems under the same system prompt, greedy, and each answer must be, letter
by letter, the one that a lone client got before. `--loose-batch` does it once more, served so, which promises
less: how many then differ is a figure. `--peer URL` puts the same load on another server that speaks OpenAI's
interface, after ours has ended. Knows the command line and figures; how clients ask is
latency/server_load.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.common.table import Column, render
from benchmarks.latency.server_load import Endpoint, Messages, load
from fox_edge.errors import FoxEdgeError
from fox_edge.nano.problems import held_out
from fox_edge.progress import say

SYSTEM = "You solve word problems. Write each step on a line of its own, then the result after four signs. "
# The share of a cold first token that one may take whose system prompt is known.
KNOWN_PROMPT_GOAL = 0.2
# Different answers that are kept in the results, to look at.
_SHOWN = 3


def questions(count: int, system: str = SYSTEM) -> list[Messages]:
    """Word problems, each a conversation of its own under one system prompt."""
    return [
        [{"role": "system", "content": system}, {"role": "user", "content": problem.question}]
        for problem in held_out(count)
    ]


@contextlib.contextmanager
def our_server(
    artifact: str, slots: int, queue: int, threads: int | None, loose: bool = False
) -> Iterator[tuple[Endpoint, dict[str, Any]]]:
    """`fox-edge serve` in a process of its own, and what it said when it was ready."""
    command = [sys.executable, "-m", "fox_edge.cli", "serve", artifact, "--port", "0", "--json"]
    command += ["--slots", str(slots), "--queue", str(queue)]
    command += ["--threads", str(threads)] if threads else []
    command += ["--loose-batch"] if loose else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise FoxEdgeError(f"the server did not start (exit status {process.wait()})")
        ready = json.loads(line)
        yield Endpoint(ready["url"], ready["model"]), ready
        process.terminate()
        if process.wait(60) != 0:
            raise FoxEdgeError(f"the server ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def rss_of(pid: int | None) -> int | None:
    """Resident memory of a process, bytes; None where that cannot be told."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return None


def known_prompt(endpoint: Endpoint, rounds: int, words: int) -> dict[str, Any]:
    """Time to the first token under a system prompt that is new, and under the same one a second time.

    Each round has a system prompt of its own and two questions; nobody else asks.
    """
    problems = held_out(2 * rounds)
    cold: list[float] = []
    known: list[float] = []
    cached: list[int] = []
    for n in range(rounds):
        filler = (f"Rule {n}: count with care. " + SYSTEM) * (1 + words // len(SYSTEM.split()))
        system = " ".join(filler.split()[:words])
        for problem, times in ((problems[2 * n], cold), (problems[2 * n + 1], known)):
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": problem.question},
            ]
            reply = endpoint.ask(messages, 1)
            times.append(reply.first_token_s)
        cached.append(reply.cached_tokens or 0)
    return {
        "rounds": rounds,
        "system_prompt_words": words,
        "cached_tokens": int(median(cached)),
        "cold_first_token_s": median(cold),
        "known_first_token_s": median(known),
        "ratio": median(known) / median(cold),
        "goal": KNOWN_PROMPT_GOAL,
    }


def measure(endpoint: Endpoint, pid: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """A lone client first, whose answers are what all others must get; then all at once."""
    asked = questions(args.questions)
    say(f"{endpoint.url}: one client, {len(asked)} questions")
    alone = [endpoint.ask(messages, args.max_tokens) for messages in asked]
    expected = [reply.text for reply in alone]
    say(f"{endpoint.url}: {args.clients} clients, {args.seconds:g} s")
    tally = load(endpoint, asked, expected, args.clients, args.seconds, args.max_tokens, lambda: rss_of(pid))
    say(f"{endpoint.url}: known system prompts")
    decoding_s = sum(reply.total_s - reply.first_token_s for reply in alone)
    return {
        "clients": args.clients,
        **tally.summary(),
        "alone_tokens_per_s": sum(reply.tokens - 1 for reply in alone) / decoding_s,
        "alone_first_token_p50_s": median(reply.first_token_s for reply in alone),
        "distinct_answers": len(set(expected)),
        "known_prompt": known_prompt(endpoint, args.rounds, args.system_words),
        "failures": tally.failures[:_SHOWN],
        "differences": tally.different[:_SHOWN],
    }


def bench_serve(args: argparse.Namespace) -> dict[str, Any]:
    """Our server, with loose batches too where that is asked for, then the peer where there is one."""
    rows = []
    for loose in (False, True) if args.loose_batch else (False,):
        with our_server(args.artifact, args.slots, max(64, args.clients), args.threads, loose) as (at, ready):
            who = "fox-edge --loose-batch" if loose else "fox-edge"
            rows.append({"who": who, "slots": ready["slots"], **measure(at, ready["pid"], args)})
    if args.peer:
        url, _, model = args.peer.partition("=")
        peer = Endpoint(url.rstrip("/"), model or "default", args.peer_key)
        rows.append({"who": args.peer_name, **measure(peer, args.peer_pid, args)})
    return {"command": study_command("serve"), "machine": machine(), "results": rows}


COLUMNS = (
    Column("server", "who"),
    Column("clients", "clients", "{:d}"),
    Column("answers", "answers", "{:d}"),
    Column("failed", "failed", "{:d}"),
    Column("different", "different", "{:d}"),
    Column("tok/s", "tokens_per_s", "{:,.0f}"),
    Column("alone", "alone_tokens_per_s", "{:,.0f}"),
    Column("first, ms p50", "first_token_p50_s", "{:,.0f}", 1000),
    Column("p95", "first_token_p95_s", "{:,.0f}", 1000),
    Column("RSS MB, 1st q.", "rss_first_quarter_bytes", "{:,.1f}", 1e-6),
    Column("last q.", "rss_last_quarter_bytes", "{:,.1f}", 1e-6),
    Column("known / cold", "known_ratio", "{:.2f}"),
)


def main() -> None:
    """Parse, measure, print, and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="new system prompts, each used twice")
    parser.add_argument("--system-words", type=int, default=600)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--loose-batch", action="store_true", help="then the same, served so")
    parser.add_argument("--peer", metavar="URL[=MODEL]", help="another server, already running")
    parser.add_argument("--peer-name", default="peer")
    parser.add_argument("--peer-pid", type=int, help="its process, to watch its memory")
    parser.add_argument("--peer-key", help="its API key")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    try:
        results = bench_serve(args)
    except FoxEdgeError as error:
        say(f"benchmarks.serve: {error}")
        raise SystemExit(2) from None
    if args.results:
        write_results(args.results, results)
    rows = [row | {"known_ratio": row["known_prompt"]["ratio"]} for row in results["results"]]
    print(render(COLUMNS, rows, width=160))


if __name__ == "__main__":
    main()
