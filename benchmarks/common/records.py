"""Reading results that somebody hands in: report.json, `bench --json`, `eval --json`, fidelity's JSON.

Such a file may come from a stranger or from a later release. It is read whole and checked before any of it
is used: size, JSON, schema, and the type of every figure that is used. One sentence says what is wrong, and
where. Knows the shape of the records, not what their figures mean.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from fox_edge.errors import FoxEdgeError

SCHEMA = 2
MAX_BYTES = 64 << 20
MAX_ROWS = 1000
_LARGEST = 1e30  # no figure of ours is; a larger one breaks the arithmetic of a drawing

# A specification is "text", "number", "flag", "interval" (two numbers in order), [one of the entries],
# {"key": ...} or {"*": of every value}. Null is allowed everywhere but at keys that end in "!", which must
# be there. Keys that are not named may hold anything: nobody reads them.
_FIGURES = {
    name: "number"
    for name in (
        *("bytes", "bits_per_weight", "bytes_per_token", "load_s", "time_to_first_token_s"),
        *("cold_time_to_first_token_s", "prompt_tokens_per_s", "decode_tokens_per_s"),
        *("total_tokens_per_s", "token_p50_s", "token_p95_s", "token_p99_s", "peak_rss_bytes"),
        *("anonymous_rss_bytes", "file_rss_bytes", "empty_rss_bytes", "ceiling_tokens_per_s"),
        *("roofline_percent", "prompt_ceiling_tokens_per_s", "prompt_roofline_percent"),
        *("energy_joules_per_token", "memory_cap_bytes", "rank", "runs", "users", "together"),
        *("peak_device_bytes", "device_energy_joules_per_token"),
        *("positions", "mean_kl_nats", "mean_kl_se_nats", "median_kl_nats", "p99_kl_nats", "max_kl_nats"),
        *("top1_agreement_percent", "top1_se_percent", "top5_agreement_percent", "reference_perplexity"),
        *("perplexity", "perplexity_ratio", "perplexity_ratio_se"),
        *("accuracy_percent", "correct", "n", "paired_p", "flexible_percent"),
    )
}
_GRADES = {
    "task": "text",
    "n": "number",
    "correct": "number",
    "accuracy_percent": "number",
    "ci95_percent": "interval",
    "flexible_percent": "number",
    "paired_p": "number",
    "paired": {
        "with": "text",
        "p": "number",
        "difference_percent": "number",
        "interval_percent": "interval",
        "questions_to_settle": "number",
        "verdict": "text",
    },
    "error": "text",
    "answers": [{"question": "text", "expected": "text", "right": "flag", "score": "number"}],
}
_ROW = _FIGURES | {
    "artifact!": "text",
    "name": "text",
    "runtime": "text",
    "format": "text",
    "quant": "text",
    "workload": "text",
    "page_cache": "text",
    "device": "text",
    "profile": "text",
    "error": "text",
    "answer": "text",
    "fidelity_from": "text",
    "memory_is": "text",
    "ci95_percent": "interval",
    "interval": {"*": "interval"},
    "spread": {"*": "interval"},
    "samples": {"*": ["number"]},
    "rank_shared_with": ["text"],
    "baseline_ratio": {"decode_tokens_per_s": "number", "peak_rss_bytes": "number"},
    "projections": [
        {
            "profile!": "text",
            **dict.fromkeys(("decode_tokens_per_s", "ceiling_tokens_per_s"), "number"),
            **dict.fromkeys(("needed_bytes", "memory_cap_bytes"), "number"),
            "fits": "flag",
            "source": "text",
        }
    ],
    "memory": [
        {
            "profile!": "text",
            **dict.fromkeys(("context", "weights_bytes", "kv_bytes", "buffers_bytes"), "number"),
            **dict.fromkeys(("tokenizer_bytes", "process_bytes", "total_bytes"), "number"),
        }
    ],
    "curve": [{"from!": "number", "to!": "number", "mean_kl_nats!": "number"}],
    "tasks": [_GRADES],
}
_CARD = dict.fromkeys(("sm_clock_hz", "temperature_c", "power_w"), "number")
_AROUND: dict[str, Any] = {
    "created": "text",
    "command": "text",
    "machine": {
        "cpu": "text",
        "cores": "number",
        "memory_bytes": "number",
        "os": "text",
        "python": "text",
        "versions": {"*": "text"},
    },
    "conditions": {
        "governor": "text",
        "frequency_hz": {"before": "number", "after": "number"},
        "temperature_c": {"before": "number", "after": "number"},
        "load_before": "number",
        "noise_percent": "number",
        "drift_percent": "number",
        "noisy": "flag",
        "notes": ["text"],
        "card": {"name!": "text", "driver!": "text", "before": _CARD, "after": _CARD, "notes!": ["text"]},
    },
    "settings": {
        "workload": "text",
        **dict.fromkeys(("prompt_tokens", "decode_tokens", "repeats"), "number"),
        **dict.fromkeys(("context", "threads"), "number"),
        "page_cache": "text",
        "profile": "text",
        "session": {},
    },
    "bandwidth": [{"buffer_bytes!": "number", "bytes_per_s!": "number", "method": "text", "device": "text"}],
    "compute": [{"type!": "text", "operations_per_s!": "number", "method": "text", "device": "text"}],
    "baseline": _FIGURES
    | dict.fromkeys(("name", "model", "hardware", "runtime", "source", "memory_is", "format"), "text")
    | {"ours": "flag", "decode_is_at_least": "flag"},
}
_PROFILE = {
    "name!": "text",
    "device": "text",
    **dict.fromkeys(("threads", "memory_bytes", "context", "bandwidth_bytes_per_s"), "number"),
    "source": "text",
}
REPORT: dict[str, Any] = {
    **{k: v for k, v in _AROUND.items() if k not in ("machine", "settings", "baseline")},
    "machine!": _AROUND["machine"],
    "settings!": _AROUND["settings"],
    "baseline!": _AROUND["baseline"],
    "created!": "text",
    "checkpoint": "text",
    "profiles": [_PROFILE],
    "rows!": [_ROW],
    "tasks": [{"task!": "text", "description": "text", "n": "number"}],
    "text": {"source": "text", "tokens": "number", "windows": "number"},
    "advice": [{"profile!": "text", "artifact": "text", "name": "text", "sentence!": "text"}],
    "question": "text",
    "commands": ["text"],
}
BENCH = _AROUND | {"results!": [_ROW]}
FIDELITY = _AROUND | {"results!": [_ROW], "text": REPORT["text"]}
EVALUATION = _AROUND | {
    "results!": [_GRADES | {"artifact!": "text", "format": "text"}],
    "description": "text",
    "n": "number",
}


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, its texts fit to be shown; raises FoxEdgeError with one sentence."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FoxEdgeError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise FoxEdgeError(f"{path}: larger than the {MAX_BYTES >> 20} MiB that a result may have")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise FoxEdgeError(
            f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    except UnicodeDecodeError as error:
        raise FoxEdgeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise FoxEdgeError(f"{path}: nested too deep for a result") from None
    except ValueError as error:
        raise FoxEdgeError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FoxEdgeError(f"{path}: holds no result of fox-edge (a JSON {_kind(value)}, not an object)")
    cleaned: dict[str, Any] = clean(value)
    return cleaned


def check_schema(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record, when it is of a schema that this version reads; raises FoxEdgeError."""
    schema = record.get("schema", 1)
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise FoxEdgeError(f"{path}: schema is {_said(schema)}, not a whole number from 1")
    if schema > SCHEMA:
        raise FoxEdgeError(
            f"{path}: written in schema {schema} by a later fox-edge; this one reads up to {SCHEMA}"
        )
    return record


def check(record: dict[str, Any], shape: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record, when its schema is known and every figure has its type; raises FoxEdgeError."""
    check_schema(record, path)
    wrong = _fault(record, shape, "")
    if wrong:
        raise FoxEdgeError(f"{path}: {wrong}")
    rows = record.get("rows", record.get("results")) or ()
    if len(rows) > MAX_ROWS:
        raise FoxEdgeError(f"{path}: {len(rows)} rows, more than the {MAX_ROWS} that a result may have")
    return record


def clean(value: Any) -> Any:
    """The same value with every text fit for a terminal and for UTF-8: no escapes, no lone surrogates."""
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _fault(value: Any, spec: Any, where: str) -> str | None:
    """What is wrong with a value, as the end of a sentence; None when nothing is."""
    if value is None:
        return None
    if isinstance(spec, str):
        return None if _TESTS[spec](value) else f"{where} is {_said(value)}, not {_NOUNS[spec]}"
    if isinstance(spec, list):
        if not isinstance(value, list):
            return f"{where} is {_said(value)}, not a list"
        return _first((v, spec[0], f"{where}[{n}]") for n, v in enumerate(value))
    if not isinstance(value, dict):
        return f"{where} is {_said(value)}, not an object"
    dot = f"{where}." if where else ""
    if "*" in spec:
        return _first((v, spec["*"], f"{dot}{k}") for k, v in value.items())
    missing = next((k[:-1] for k in spec if k.endswith("!") and value.get(k[:-1]) is None), None)
    if missing:
        return f"{dot}{missing} is missing"
    return _first((value.get(k.rstrip("!")), inner, f"{dot}{k.rstrip('!')}") for k, inner in spec.items())


def _first(parts: Any) -> str | None:
    return next((wrong for part in parts if (wrong := _fault(*part))), None)


def is_number(value: Any) -> bool:
    """Whether a value can be a figure: a number that is finite and of this world."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= _LARGEST
        and math.isfinite(value)
    )


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]


_TESTS = {
    "text": lambda v: isinstance(v, str),
    "number": is_number,
    "flag": lambda v: isinstance(v, bool),
    "interval": _is_interval,
}
_NOUNS = {
    "text": "a text",
    "number": "a number",
    "flag": "true or false",
    "interval": "two numbers, the lower first",
}


def _said(value: Any) -> str:
    """A value in a sentence: short."""
    if isinstance(value, dict | list):
        return f"a JSON {_kind(value)}"
    words = json.dumps(value, ensure_ascii=False) if not isinstance(value, int) else _integer(value)
    return words if len(words) <= 40 else words[:39] + "…"


def _integer(value: int) -> str:
    return str(value).lower() if abs(value) < 10**40 else "a very large number"


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "list"
    return "text" if isinstance(value, str) else "value"
