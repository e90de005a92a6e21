"""The floors: what the card can do, what a token and a prompt need at a shape, and hence the limits.

Everything else in the study is held against these. Knows the card's rates and the model's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.machine import versions
from benchmarks.devices.card import card_state, describe_card, find_card
from benchmarks.devices.card_rates import run_job as measure_rates
from benchmarks.devices.compute import BF16, prompt_operations
from fox_edge.config import SHAPES

_BF16_BYTES = 2
# Tokens in the KV cache in the middle of the paper's answer: 234 in, half of 512 out.
_MIDDLE = 234 + 256


def floors_job(job: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{device, shape, sizes, seconds, products?, long_prompt} -> bandwidth, operations, needs, limits."""
    card, before = find_card(), card_state()
    rates = measure_rates({key: job[key] for key in job if key != "shape"}, progress)
    return {
        "card": card and describe_card(card, before, card_state()),
        "torch": _torch(job["device"]),
        **rates,
        **limits(job["shape"], rates, job["long_prompt"]),
    }


def limits(shape: str, rates: dict[str, Any], long_prompt: int) -> dict[str, Any]:
    """What one token, and a prompt, need at a shape in BF16, and how many the card could do at most."""
    config = SHAPES[shape]()
    weights = _BF16_BYTES * config.num_parameters()
    token = weights + config.kv_bytes_per_token * _MIDDLE
    operations = prompt_operations(config, long_prompt)
    bytes_per_s = max(found["bytes_per_s"] for found in rates["bandwidth"])
    per_s = next(found["operations_per_s"] for found in rates["compute"] if found["type"] == BF16)
    return {
        "weight_bytes": weights,
        "bytes_per_token": token,
        "decode_limit_tokens_per_s": bytes_per_s / token,
        "prompt_tokens": long_prompt,
        "prompt_operations": operations,
        "prompt_limit_tokens_per_s": long_prompt * per_s / operations,
    }


def _torch(device: str) -> dict[str, Any]:
    """Versions that make the numbers, and what PyTorch says of the card."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": versions().get("triton"),
    }
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(device)
        found["capability"] = [about.major, about.minor]
        found["multiprocessors"] = about.multi_processor_count
        found["memory_bytes"] = about.total_memory
        found["cache_bytes"] = getattr(about, "L2_cache_size", None)
    return found
