"""A bench result and its companions, made up but of plausible size, for tests of the report."""

from benchmarks.baseline import baseline

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


def bench_result() -> dict:
    rows = []
    for spec, size, speed, share, format in zip(NAMES, _SIZES, _SPEEDS, _SHARES, _FORMATS, strict=True):
        rows.append(
            {
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
        )
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
        "results": rows,
    }


def fidelity() -> dict:
    return {
        spec: {"mean_kl_nats": kl, "p99_kl_nats": 9 * kl, "top1_agreement_percent": 100 - 900 * kl}
        for spec, kl in zip(NAMES, _KL, strict=True)
    }


def evaluation() -> dict:
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


def answers() -> dict:
    return {
        spec: "Four boxes hold 4*6=<<4*6=24>>24 apples.\n24-5=<<24-5=19>>19 are left.\n#### 19"
        for spec in NAMES
    }
