"""The published BF16 baseline, as data with its provenance. Nothing here was measured by this project."""

from __future__ import annotations

from typing import Any

# Section 3 of the report: vLLM with BF16 weights on one H100, several users at once. "Over 200" output tokens
# per second is what one user sees; the memory is the GPU's.
# The share of the ceiling is our arithmetic: 200 tokens/s x 3,330,543,616 bytes over the H100's 3.35 TB/s.
H100: dict[str, Any] = {
    "name": "Fox-1 1.6B BF16, H100",
    "ours": False,
    "model": "Fox-1-1.6B",
    "hardware": "one NVIDIA H100",
    "runtime": "vLLM",
    "format": "safetensors",
    "quant": "bf16",
    "prompt_tokens": 234,
    "output_tokens": 512,
    "decode_tokens_per_s": 200,
    "decode_is_at_least": True,
    "roofline_percent": 100 * 200 * 3_330_543_616 / 3.35e12,
    "peak_rss_bytes": 3_703_000_000,
    "memory_is": "GPU memory",
    "gsm8k_5_shot_percent": 36.39,
    "source": "Fox-1 technical report, section 3 (speed, memory) and table 6 (GSM8K)",
}


def baseline() -> dict[str, Any]:
    """A copy of the published row."""
    return dict(H100)
