"""Measure a nano folder: held-out word problems answered greedily, and perplexity on GSM8K's test split.

    python -m fox_edge.nano.evaluate FOLDER --gsm8k test.jsonl

Weights are the BF16-rounded ones of the folder; the arithmetic is float32. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fox_edge.config import FoxConfig
from fox_edge.model import Fox, KVCache
from fox_edge.nano import data
from fox_edge.nano.make_tokenizer import BOS, EOS, PAD
from fox_edge.nano.problems import Problem, final_answer, held_out

MAX_NEW_TOKENS = 160


@torch.inference_mode()
def greedy(model: Fox, prompts: Sequence[Sequence[int]], stop: frozenset[int]) -> list[list[int]]:
    """Greedy continuations of prompts (ids), each up to its stop token (left out) or MAX_NEW_TOKENS.

    Prompts of one length share a batch, so that no padding is needed.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for n, prompt in enumerate(prompts):
        by_length[len(prompt)].append(n)
    replies: list[list[int]] = [[] for _ in prompts]
    for length, members in by_length.items():
        cache = KVCache(model.config, len(members), length + MAX_NEW_TOKENS)
        logits = model(torch.tensor([prompts[n] for n in members]), cache, last_only=True)
        running = set(members)
        for _ in range(MAX_NEW_TOKENS):
            tokens = logits[:, -1].argmax(-1)
            for n, token in zip(members, tokens.tolist(), strict=True):
                if token in stop:
                    running.discard(n)
                elif n in running:
                    replies[n].append(token)
            if not running:
                break
            logits = model(tokens[:, None], cache, last_only=True)
    return replies


def accuracy(
    model: Fox, processor: spm.SentencePieceProcessor, problems: Sequence[Problem], chat: bool = True
) -> float:
    """Percent of problems whose `#### n` is right, asked in the chat format or in the plain one."""
    if chat:
        prompts = [data.dialogue(processor, (problem.question, ""))[0] for problem in problems]
    else:
        prompts = [[BOS, *processor.encode(data.question_text(problem.question))] for problem in problems]
    stop = frozenset({PAD, EOS, BOS, processor.piece_to_id("<end_of_turn>")})
    replies = [processor.decode(reply) for reply in greedy(model, prompts, stop)]
    right = sum(
        final_answer(reply) == str(problem.result) for reply, problem in zip(replies, problems, strict=True)
    )
    return 100 * right / len(problems)


@torch.inference_mode()
def perplexity(
    model: Fox, processor: spm.SentencePieceProcessor, documents: Sequence[data.Pair]
) -> dict[str, float]:
    """Per-token perplexity and bits per UTF-8 byte of documents in plain form, each on its own."""
    nats, tokens, size_bytes = 0.0, 0, 0
    for pair in documents:
        text = data.plain_text(pair)
        ids = torch.tensor([[BOS, *processor.encode(text), EOS]])
        nats += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        size_bytes += len(text.encode())
    return {
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size_bytes,
        "tokens": tokens,
    }


def load(folder: Path) -> tuple[Fox, spm.SentencePieceProcessor]:
    """The folder's model (BF16 weights, float32 arithmetic) and its tokenizer."""
    model = Fox(FoxConfig.read(folder / "config.json"))
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model.eval(), spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def main() -> None:
    """Command line: see the module's docstring; prints one JSON document."""
    parser = argparse.ArgumentParser(description="Measure nano on held-out problems and GSM8K's test split.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's test.jsonl; without it, no perplexity")
    parser.add_argument("--limit", type=int, default=200, help="held-out problems (at most 200)")
    arguments = parser.parse_args()
    model, processor = load(arguments.folder)
    result: dict[str, object] = {
        "held_out_n": arguments.limit,
        "held_out_accuracy_percent": accuracy(model, processor, held_out(arguments.limit)),
    }
    if arguments.gsm8k:
        result["gsm8k_test"] = perplexity(model, processor, data.read_gsm8k(arguments.gsm8k))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
