"""Whether guessing from what came before pays, and whether it changes the text.

    python -m benchmarks.speculation ARTIFACT... --results FILE.json --data test.jsonl --train train.jsonl

Two kinds of prompts: GSM8K questions behind worked examples, whose answers repeat little, and texts that are
to be written again, which repeat everything. Each is answered greedily three times on one session: token by
token, with guesses as long as they pay ('auto'), and with a fixed number of guesses. Tokens/s: decoding.
A model with random weights runs into loops, which are easy to guess: only a trained one tells what is gained.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.accuracy.answer import encode
from benchmarks.accuracy.tasks import TaskOptions, make_task
from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.common.subject import open_subject
from benchmarks.common.table import Column, render
from benchmarks.processes.launch import run_worker
from fox_edge.nano.problems import held_out
from fox_edge.progress import say
from runtimes.base import Session, SessionOptions
from runtimes.generate import generate
from runtimes.lookup import MOST, LookupSession

MAX_TOKENS = 96
# How a prompt is answered: name -> what is put on the session.
WAYS: dict[str, Callable[[Session], Session]] = {
    "plain": lambda session: session,
    "auto": LookupSession,
    f"fixed {MOST}": lambda session: LookupSession(session, adaptive=False),
}


def prompts(kind: str, limit: int, shots: int, data: Path | None, train: Path | None) -> list[Any]:
    """The texts or conversations of a kind of prompt."""
    if kind == "gsm8k":
        return list(make_task("gsm8k", TaskOptions(limit, shots, data, train)).prompts)
    texts = [f"{problem.question} {problem.answer}" for problem in held_out(limit)]
    return [f"Text: {text}\nThe same text again: {text}\nThe same text again:" for text in texts]


def run_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The worker's task 'speculation': {subject, threads, prompts} -> every prompt's answers, one per way."""
    subject = open_subject(job["subject"])
    tokenizer = subject.tokenizer()
    encoded = [encode(tokenizer, prompt) for prompt in job["prompts"]]
    room = subject.context - MAX_TOKENS
    # The end of a prompt counts, where the model is too short for all of it.
    encoded = [tokens[-room:] for tokens in encoded]
    options = SessionOptions(context=max(map(len, encoded)) + MAX_TOKENS, threads=job["threads"], cache=False)
    answers = []
    with contextlib.closing(subject.open_session(options)) as session:
        speculating = {name: way(session) for name, way in WAYS.items()}
        for n, tokens in enumerate(encoded):
            names = list(WAYS)[n % len(WAYS) :] + list(WAYS)[: n % len(WAYS)]
            found = {name: _answer(speculating[name], tokens, tokenizer.stop_ids) for name in names}
            answers.append(found)
            progress(n + 1, len(encoded))
        counts = {name: asdict(s.counts) for name, s in speculating.items() if isinstance(s, LookupSession)}
    return {"answers": answers, "counts": counts}


def _answer(session: Session, prompt: Sequence[int], stop_ids: Any) -> dict[str, Any]:
    """Tokens, and the seconds that those after the first took."""
    session.reset()
    generation = generate(session, prompt, stop_ids=stop_ids, max_tokens=MAX_TOKENS)
    next(generation, None)
    start = time.perf_counter()
    for _ in generation:
        pass
    return {"tokens": generation.tokens, "seconds": time.perf_counter() - start}


def rows(spec: str, kind: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per way: speed, what was guessed, and how many answers are the plain ones token for token."""
    answers = found["answers"]
    made = []
    for name in WAYS:
        tokens = sum(max(0, len(answer[name]["tokens"]) - 1) for answer in answers)
        counts = found["counts"].get(name, {})
        made.append(
            {
                "artifact": Path(spec).name,
                "prompts": kind,
                "way": name,
                "answers": len(answers),
                "tokens": tokens,
                "decode_tokens_per_s": tokens / max(1e-9, sum(answer[name]["seconds"] for answer in answers)),
                **counts,
                "right_percent": 100 * counts["right"] / counts["guessed"] if counts.get("guessed") else None,
                "identical": sum(answer[name]["tokens"] == answer["plain"]["tokens"] for answer in answers),
            }
        )
    plain = made[0]["decode_tokens_per_s"]
    return [row | {"speedup": row["decode_tokens_per_s"] / plain if plain else None} for row in made]


COLUMNS = (
    Column("artifact", "artifact"),
    Column("prompts", "prompts"),
    Column("way", "way"),
    Column("decode tok/s", "decode_tokens_per_s", "{:,.1f}"),
    Column("times plain", "speedup", "{:.2f}"),
    Column("guessed", "guessed", "{:,}"),
    Column("right", "right_percent", "{:.0f} %"),
    Column("identical", "identical_text"),
)


def main() -> None:
    """Parse, measure, write the results file after every kind of prompt."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("artifact", nargs="+")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="prompts of each kind (default: 20)")
    parser.add_argument("--shots", type=int, default=2, help="worked examples before a question (default: 2)")
    parser.add_argument("--data", type=Path, help="GSM8K test.jsonl; without it, the hub is asked")
    parser.add_argument("--train", type=Path, help="GSM8K train.jsonl, for the worked examples")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for spec in args.artifact:
        for kind in ("gsm8k", "again"):
            texts = prompts(kind, args.limit, args.shots, args.data, args.train)
            job = {"task": "speculation", "subject": spec, "threads": args.threads, "prompts": texts}
            results += rows(spec, kind, run_worker(job))
            say(f"{spec}, {kind}: done")
            command = study_command("speculation")
            write_results(args.results, {"command": command, "machine": machine(), "results": results})
    print(render(COLUMNS, [r | {"identical_text": f"{r['identical']} of {r['answers']}"} for r in results]))


if __name__ == "__main__":
    main()
