"""Results of a bench, of fidelity and of an evaluation, made up but of plausible size, for tests of reports.

`full_result` is Fox-1's shape with everything that schema 2 may hold, `bench_result` nano with little.
"""

from typing import Any

from benchmarks.devices.baseline import baseline

NAMES = {
    "torch:nano": "PyTorch BF16",
    "out/gguf-int8": "GGUF int8",
    "out/gguf-int4": "GGUF int4",
    "out/onnx-int8": "ONNX int8",
    "out/onnx-int4": "ONNX int4",
}
_SIZES = (13.6, 7.5, 5.2, 8.1, 5.4)
_SPEEDS = (210.0, 930.0, 1100.0, 840.0, 1010.0)
_SHARES = (5.1, 7.2, 5.0, 8.4, 5.9)
_KL = (1.2e-6, 3.1e-5, 1.4e-3, 6.2e-5, 1.1e-3)
_FORMATS = ("torch", "gguf", "gguf", "onnx", "onnx")
PROFILES = [
    {
        "name": "phone-8gb",
        "threads": 4,
        "memory_bytes": 4_000_000_000,
        "context": 4096,
        "bandwidth_bytes_per_s": 51e9,
        "source": "LPDDR5X-6400, 64 bits (data sheet)",
    },
    {
        "name": "phone-4gb",
        "threads": 4,
        "memory_bytes": 1_500_000_000,
        "context": 2048,
        "bandwidth_bytes_per_s": 29.8e9,
        "source": "LPDDR4X-3733, 64 bits (data sheet)",
    },
    {
        "name": "pi5",
        "threads": 4,
        "memory_bytes": 1_000_000_000,
        "context": 2048,
        "bandwidth_bytes_per_s": 17e9,
        "source": "LPDDR4X-4267, 32 bits (data sheet)",
    },
    {
        "name": "this",
        "threads": 8,
        "memory_bytes": 16_000_000_000,
        "context": 4096,
        "bandwidth_bytes_per_s": None,
        "source": "this machine",
    },
]


def _row(spec: str, size: float, speed: float, share: float, format: str) -> dict[str, Any]:
    return {
        "artifact": spec,
        "runtime": {"torch": "torch", "gguf": "llama.cpp", "onnx": "onnxruntime"}[format],
        "format": format,
        "quant": "bf16" if format == "torch" else spec[-4:],
        "bytes": int(size * 1e6),
        "bits_per_weight": size * 8 / 6.56,
        "bytes_per_token": int(size * 1e6),
        "load_s": 0.31,
        "time_to_first_token_s": 0.042,
        "prompt_tokens_per_s": speed * 9,
        "decode_tokens_per_s": speed,
        "peak_rss_bytes": int((300 if format == "torch" else 80) * 1e6),
        "anonymous_rss_bytes": int((180 if format == "torch" else 42) * 1e6),
        "file_rss_bytes": int((110 if format == "torch" else 36) * 1e6),
        "spread": {"decode_tokens_per_s": [speed * 0.94, speed * 1.03]},
        "runs": 3,
        "ceiling_tokens_per_s": 100 * speed / share,
        "roofline_percent": share,
    }


def bench_result() -> dict[str, Any]:
    """What an early `bench` gave: no schema, no intervals."""
    return {
        "machine": {
            "cpu": "A <processor> & friends",
            "cores": 8,
            "memory_bytes": 16_000_000_000,
            "os": "Linux 6.1 x86_64",
            "python": "3.12.1",
            "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1"},
        },
        "settings": {
            "prompt_tokens": 234,
            "decode_tokens": 64,
            "repeats": 3,
            "threads": None,
            "context": 512,
        },
        "bandwidth": [
            {
                "buffer_bytes": 4 << 20,
                "bytes_per_s": 1.4e11,
                "method": "memchr",
                "methods": {"memchr": 1.4e11},
            }
        ],
        "baseline": baseline(),
        "results": [_row(*fields) for fields in zip(NAMES, _SIZES, _SPEEDS, _SHARES, _FORMATS, strict=True)],
    }


# Fox-1's shape: MB, decode tok/s, % of the ceiling, peak MB, of it anonymous, mean KL, rank.
_FULL = {
    "torch:fox": ("torch", 3331, 9.8, 78.0, 3560, 3420, 1.1e-5, 6),
    "out/gguf-int8": ("gguf", 1770, 22.8, 92.0, 1836, 126, 6.1e-4, 5),
    "out/gguf-laptop": ("gguf", 1111, 28.8, 84.0, 1735, 658, 5.2e-3, 3),
    "out/gguf-phone": ("gguf", 1072, 32.5, 91.0, 1209, 127, 9.7e-3, 1),
    "out/onnx-int8": ("onnx", 1702, 24.1, 96.0, 1980, 1900, 9.4e-4, 4),
    "out/onnx-int4": ("onnx", 902, 31.9, 79.0, 1240, 1180, 1.3e-2, 1),
    "out/gguf-tiny": ("gguf", 640, 34.0, 61.0, 820, 100, 0.21, None),
}


def full_result(count: int = 7) -> dict[str, Any]:
    """A bench of Fox-1's shape with everything that schema 2 holds; more than 7 rows are repeated."""
    rows = []
    for n in range(count):
        spec, (format, size, speed, share, peak, own, _, rank) = list(_FULL.items())[n % len(_FULL)]
        row = _row(spec + ("" if n < len(_FULL) else f"-{n}"), size, speed, share, format)
        row |= {
            "bits_per_weight": size * 8 / 1665,
            "load_s": 1.9,
            "time_to_first_token_s": 1.4,
            "prompt_tokens_per_s": 6 * speed,
            "peak_rss_bytes": peak * 10**6,
            "anonymous_rss_bytes": own * 10**6,
            "file_rss_bytes": (peak - own) * 10**6,
            "token_p50_s": 1 / speed,
            "token_p95_s": 1.12 / speed,
            "token_p99_s": (1.3 + n / 10) / speed,
            "interval": {
                "decode_tokens_per_s": [0.97 * speed, 1.02 * speed],
                "prompt_tokens_per_s": [5.8 * speed, 6.1 * speed],
                "load_s": [1.8, 2.1],
            },
            "samples": {"decode_tokens_per_s": [0.97 * speed, speed, 1.02 * speed]},
            "rank": rank,
            "rank_shared_with": {
                "out/gguf-phone": ["out/onnx-int4"],
                "out/onnx-int4": ["out/gguf-phone"],
            }.get(row["artifact"], []),
            "baseline_ratio": {"decode_tokens_per_s": speed / 200, "peak_rss_bytes": peak / 3703},
            "projections": [
                {
                    "profile": p["name"],
                    "decode_tokens_per_s": share / 100 * p["bandwidth_bytes_per_s"] / (size * 1e6),
                    "source": p["source"],
                }
                for p in PROFILES
                if p["bandwidth_bytes_per_s"]
            ],
            "workload": "paper",
            "users": 1,
            "page_cache": "warm",
        }
        rows.append(row)
    result = bench_result()
    return result | {
        "schema": 2,
        "command": "fox-edge bench out/gguf-int8 out/gguf-phone --workload paper --report report",
        "created": "2026-11-21T12:00:00+00:00",
        "conditions": {
            "governor": "performance",
            "frequency_hz": {"before": 3.4e9, "after": 3.3e9},
            "temperature_c": {"before": 41.0, "after": 63.0},
            "load_before": 0.12,
            "noise_percent": 1.4,
            "noisy": False,
            "notes": ["The processor's frequency may change."],
        },
        "settings": result["settings"]
        | {"workload": "paper", "users": 1, "context": 1024, "page_cache": "warm", "profile": None},
        "compute": [{"type": "bf16", "operations_per_s": 7.28e11, "method": "torch matmul"}],
        "results": rows,
    }


def full_fidelity(count: int = 7) -> dict[str, Any]:
    """Fidelity of the same artifacts, with a standard error and a curve each."""
    rows = []
    for n in range(count):
        spec, (format, *_, kl, _rank) = list(_FULL.items())[n % len(_FULL)]
        rows.append(
            {
                "artifact": spec + ("" if n < len(_FULL) else f"-{n}"),
                "format": format,
                "positions": 8192,
                "mean_kl_nats": kl,
                "mean_kl_se_nats": 0.04 * kl,
                "median_kl_nats": kl / 3,
                "p99_kl_nats": 9 * kl,
                "max_kl_nats": 40 * kl,
                "top1_agreement_percent": 100 - 60 * kl**0.5,
                "top1_se_percent": 0.2,
                "top5_agreement_percent": 99.0,
                "reference_perplexity": 7.1,
                "perplexity": 7.1 + kl,
                "perplexity_ratio": 1 + kl / 7.1,
                "perplexity_ratio_se": 0.0004,
                "curve": [
                    {"from": 256 * k, "to": 256 * k + 256, "mean_kl_nats": kl * (1.6 - 0.1 * k)}
                    for k in range(8)
                ],
            }
        )
    return {
        "schema": 2,
        "task": "fidelity",
        "checkpoint": "fox",
        "text": {"source": "a <text>", "tokens": 8192, "windows": 4},
        "results": rows,
    }


def full_evaluation(count: int = 7, n: int = 100) -> dict[str, Any]:
    """GSM8K of the same artifacts, paired with the first; only the last is told to be worse."""
    rows: list[dict[str, Any]] = []
    for k in range(count):
        spec = list(_FULL)[k % len(_FULL)] + ("" if k < len(_FULL) else f"-{k}")
        correct = 36 - k if k < 6 else 11
        share = 100 * correct / n
        row = {
            "artifact": spec,
            "n": n,
            "correct": correct,
            "accuracy_percent": share,
            "ci95_percent": [max(0.0, share - 9), share + 10],
            "answers": [{"text": "…", "expected": str(i), "right": i < correct} for i in range(n)],
        }
        if k:
            row["paired_p"] = 0.4 if k < 6 else 1e-4
            row["paired"] = {
                "with": "torch:fox",
                "p": row["paired_p"],
                "difference_percent": share - 36,
                "interval_percent": [share - 43, share - 29],
                "questions_to_settle": 900,
                "verdict": "not told apart" if k < 6 else "worse",
            }
        rows.append(row)
    return {"task": "gsm8k", "description": "GSM8K, 5-shot, greedy", "n": n, "results": rows}


def fidelity() -> dict[str, Any]:
    """What verification found of each of nano's exports."""
    return {
        spec: {"mean_kl_nats": kl, "p99_kl_nats": 9 * kl, "top1_agreement_percent": 100 - 900 * kl}
        for spec, kl in zip(NAMES, _KL, strict=True)
    }


def evaluation() -> dict[str, Any]:
    """Word problems, as an early `eval` graded them."""
    return {
        "task": "word-problems",
        "results": [
            {
                "artifact": spec,
                "n": 50,
                "correct": 33 - n,
                "accuracy_percent": 66.0 - 2 * n,
                "ci95_percent": [52.0, 78.0],
                "paired_p": None if n == 0 else 0.5,
            }
            for n, spec in enumerate(NAMES)
        ],
    }


def answers() -> dict[str, str]:
    """What each said to a question."""
    return {
        spec: "Four boxes hold 4*6=<<4*6=24>>24 apples.\n24-5=<<24-5=19>>19 are left.\n#### 19"
        for spec in NAMES
    }
