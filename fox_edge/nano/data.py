"""Training data for nano: GSM8K's train split and generated problems, as token ids ready to be read.

Everything follows from the seed, and a longer stage begins with the same data as a shorter one.
Knows nothing of the model, the optimizer or the schedule.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm

from fox_edge.nano.make_tokenizer import BOS, EOS, PAD
from fox_edge.nano.plan import Stage
from fox_edge.nano.problems import Problem, generate, practice_sheets

IGNORE = -100
TOKENIZER_PROBLEMS = 20_000
# No document of ours is shorter, so this many per token are always enough.
LEAST_TOKENS_PER_PROBLEM = 45

Pair = tuple[str, str]  # question, worked answer


def read_gsm8k(path: Path) -> list[Pair]:
    """The (question, answer) pairs of a GSM8K split in its original JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def pairs(problems: Iterable[Problem]) -> list[Pair]:
    """Generated problems as (question, answer) pairs."""
    return [(problem.question, problem.answer) for problem in problems]


def tokenizer_texts(gsm8k: Sequence[Pair], seed: int) -> list[str]:
    """What the tokenizer is trained on: all of GSM8K's train split and 20,000 generated problems."""
    generated = pairs(generate(seed, TOKENIZER_PROBLEMS, drills=True))
    return [text for pair in [*gsm8k, *generated] for text in pair]


def question_text(question: str) -> str:
    """The plain form in which pre-training and GSM8K's few-shot prompts ask."""
    return f"Question: {question}\nAnswer:"


def plain_text(pair: Pair) -> str:
    """A whole pre-training document, without its `<bos>` and `<eos>`."""
    return f"{question_text(pair[0])} {pair[1]}"


def mixture(gsm8k: Sequence[Pair], generated: Sequence[Pair], stage: Stage, seed: int) -> Iterator[Pair]:
    """Documents in training order: GSM8K (shuffled passes) and sheets of sums among all of `generated`."""
    rng = random.Random(f"nano mixture {seed}")
    sheets = practice_sheets(seed)
    books: list[Pair] = []
    for made in generated:
        while stage.gsm8k_share and rng.random() < stage.gsm8k_share:
            if not books:
                books = rng.sample(list(gsm8k), len(gsm8k))
            yield books.pop()
        while stage.sheets_share and rng.random() < stage.sheets_share:
            yield next(sheets)
        yield made


def chunks(
    processor: spm.SentencePieceProcessor, documents: Iterable[Pair], length: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (count, length), int32: `<bos>` document `<eos>` packed; targets are one ahead."""
    needed = count * length + 1
    tokens: list[int] = []
    for pair in documents:
        tokens += [BOS, *processor.encode(plain_text(pair)), EOS]
        if len(tokens) >= needed:
            stream = np.array(tokens[:needed], dtype=np.int32)
            return stream[:-1].reshape(count, length), stream[1:].reshape(count, length)
    raise ValueError(f"{count} chunks of {length} need {needed} tokens; the documents have {len(tokens)}")


def dialogue(processor: spm.SentencePieceProcessor, pair: Pair) -> tuple[list[int], list[int]]:
    """One exchange in the chat format: its prompt's ids (with `<bos>`) and the model's ids that answer it."""
    prompt = f"<start_of_turn>user\n{pair[0]}<end_of_turn>\n<start_of_turn>model\n"
    return [BOS, *processor.encode(prompt)], processor.encode(f"{pair[1]}<end_of_turn>\n")


def chat_rows(
    processor: spm.SentencePieceProcessor, documents: Iterable[Pair], length: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (count, length), int32: whole exchanges; only the model's turns are targets."""
    inputs = np.full((count, length), PAD, dtype=np.int32)
    targets = np.full((count, length), IGNORE, dtype=np.int32)
    row = used = 0
    for pair in documents:
        prompt, reply = dialogue(processor, pair)
        size = len(prompt) + len(reply)
        if size > length:
            continue
        if used + size > length:
            row, used = row + 1, 0
        if row == count:
            return inputs, targets
        inputs[row, used : used + size] = prompt + reply
        first = used + len(prompt) - 1
        targets[row, first : first + len(reply)] = reply
        used += size
    raise ValueError(f"the exchanges filled {row} of {count} rows of {length}")


def stage_batches(
    stage: Stage, processor: spm.SentencePieceProcessor, gsm8k: Sequence[Pair], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets of a stage, (steps * rows, chunk) int32; the instruction stage has no drills."""
    generated = pairs(generate(seed, stage.tokens // LEAST_TOKENS_PER_PROBLEM + 1000, drills=not stage.chat))
    documents = mixture(gsm8k, generated, stage, seed)
    count = stage.steps * stage.rows
    return (chat_rows if stage.chat else chunks)(processor, documents, stage.chunk, count)
