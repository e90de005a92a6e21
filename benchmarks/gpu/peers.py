"""Hugging Face's own `generate` on the same checkpoint and card: what most people would run instead.

BF16, scaled-dot-product attention, its KV cache, greedy, one user; and once more with its static cache, which
transformers then compiles. Works with transformers 4.57 and 5. Knows transformers; nothing of fox-edge's
runtimes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.latency.rows import figures
from benchmarks.latency.workloads import find_workload, waves
from fox_edge.errors import FoxEdgeError, MissingPackageError
from fox_edge.tokenizer import Tokenizer


def peer_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{checkpoint, device, static, prompt_tokens, decode_tokens, passes} -> a row of medians.

    The decode rate is that of all tokens but the first: the time of a whole answer, less that of an answer of
    one token. Raises FoxEdgeError where transformers cannot do it.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise MissingPackageError("transformers", "optimum") from None
    folder, device = Path(job["checkpoint"]), job["device"]
    prompt, count = _prompt(folder, job["prompt_tokens"]), job["decode_tokens"]
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    load_s = time.perf_counter() - start
    settings = model.generation_config
    settings.eos_token_id = None  # a random model's answer is over when it is long enough
    settings.pad_token_id, settings.do_sample = 0, False
    settings.cache_implementation = "static" if job["static"] else None
    tokens = torch.tensor([prompt], device=device)

    def answer(length: int) -> float:
        """Seconds of an answer of so many tokens."""
        begun = time.perf_counter()
        with torch.inference_mode():
            # The same room for every length: a static cache of another one would be compiled anew.
            made = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, use_cache=True
            )
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if made.shape[1] != len(prompt) + length:
            raise FoxEdgeError(f"generate gave {made.shape[1] - len(prompt)} tokens, not {length}")
        return time.perf_counter() - begun

    cold = answer(count + 1) if job["static"] else answer(min(count, 8))
    runs = []
    for n in range(job["passes"]):
        first, whole = statistics.median(answer(1) for _ in range(3)), answer(count + 1)
        runs.append(
            {
                "time_to_first_token_s": first,
                "prompt_tokens_per_s": len(prompt) / first,
                "decode_tokens_per_s": count / (whole - first),
            }
        )
        progress(n + 1, job["passes"])
    reserved = torch.cuda.max_memory_reserved() if device.startswith("cuda") else None
    return {
        **figures(runs),
        "runtime": "transformers " + transformers.__version__,
        "cache": "static" if job["static"] else "dynamic",
        "compiled": getattr(model, "_compiled_call", None) is not None,
        "users": 1,
        "prompt_tokens": len(prompt),
        "decode_tokens": count,
        "passes": len(runs),
        "load_s": load_s,
        "cold_s": cold,
        "peak_device_bytes": reserved,
    }


def _prompt(folder: Path, length: int) -> list[int]:
    """The tokens that the others are asked, too."""
    work = find_workload("custom", length, 1)
    tokens: list[int] = waves(work, Tokenizer.from_folder(folder))[0][0][0]
    return tokens
