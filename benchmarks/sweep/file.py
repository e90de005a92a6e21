"""The grammar of sweep.toml: which checkpoints, which exports of them, which tasks, and how they are run.

    checkpoints = ["nano", "../fox-instruct"]     # 'nano', a folder, or a hub id
    reference = true                              # PyTorch BF16 beside the exports (default)

    [[exports]]                                   # as many as wanted; each is the product of its lists
    format = "gguf"
    quant = ["int8", "int4", "recipes/mine.toml"]
    rounding = ["nearest", "compensated"]         # optional

    [tasks.word-problems]                         # as many as wanted
    limit = 200

    [run]                                         # optional
    threads = 4                                   # of each step

Paths are relative to the file. Knows words and their kinds; opens no checkpoint and runs nothing. Anything
that is not understood is refused in one sentence that names the file, the table and the key.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.lm_eval_tasks import HARNESS_TASKS
from benchmarks.devices.profiles import PROFILES
from benchmarks.latency.page_cache import STATES
from benchmarks.latency.workloads import WORKLOADS
from fox_edge.errors import FoxEdgeError, RecipeError
from fox_edge.locate import NANO
from fox_edge.quant import FORMATS, ROUNDINGS, find_recipe

MAX_BYTES = 1 << 20
MAX_EXPORTS = 1000
QUESTIONS_PER_STEP = 25
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Export:
    """One export to make of every checkpoint; `quant` is a name or an absolute path of a recipe."""

    format: str
    quant: str
    rounding: str | None = None
    calibrate: Path | None = None
    imatrix: Path | None = None
    max_mean_kl: float | None = None


@dataclass(frozen=True)
class Run:
    """How steps are run, which changes no result: threads and memory of each, questions in one.

    None: threads as many as there are; memory reckoned from the weights.
    """

    threads: int | None = None
    memory_bytes: int | None = None
    questions: int = QUESTIONS_PER_STEP


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read. `tasks` maps a task's name to its settings, in the file's order."""

    path: Path
    checkpoints: tuple[str, ...]
    reference: bool
    exports: tuple[Export, ...]
    tasks: dict[str, dict[str, Any]]
    run: Run


# Reads a value or raises ValueError saying what it must be.
Kind = Callable[[Any], Any]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; raises FoxEdgeError."""
    top = _read(
        path,
        "",
        _parse(path),
        {
            "checkpoints": _texts,
            "reference": _flag,
            "exports": _tables,
            "tasks": _table,
            "run": _table,
        },
    )
    if not top.get("checkpoints"):
        raise FoxEdgeError(f"{path}: 'checkpoints' is missing: name one at least, such as \"{NANO}\"")
    exports = [
        export
        for number, fields in enumerate(top.get("exports", []), 1)
        for export in _exports(path, f"[[exports]] {number}: ", fields)
    ]
    if len(exports) > MAX_EXPORTS:
        raise FoxEdgeError(f"{path}: {len(exports)} exports of each checkpoint; {MAX_EXPORTS} at most")
    twice = next((e for n, e in enumerate(exports) if e in exports[:n]), None)
    if twice is not None:
        told = " ".join(filter(None, (twice.format, twice.quant, twice.rounding)))
        raise FoxEdgeError(f"{path}: [[exports]] ask for {told} twice")
    reference = top.get("reference", True)
    if not exports and not reference:
        raise FoxEdgeError(f"{path}: nothing to do: there are no [[exports]], and reference is false")
    return Sweep(
        path=path,
        checkpoints=tuple(_checkpoint(path, word) for word in top["checkpoints"]),
        reference=reference,
        exports=tuple(exports),
        tasks=_tasks(path, top.get("tasks", {})),
        run=_run(path, top.get("run", {})),
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FoxEdgeError(
                f"{path}: {path.stat().st_size} bytes, but a sweep file has at most {MAX_BYTES}"
            )
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FoxEdgeError(f"{path}: no such sweep file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FoxEdgeError(f"{path}: not readable as TOML ({error})") from None


def _read(path: Path, where: str, fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The values of a table; `where` is how it is called in errors."""
    for key in fields:
        if key not in kinds:
            known = ", ".join(kinds) or "none"
            raise FoxEdgeError(f"{path}: {where}unknown key '{key}'; known: {known}")
    found = {}
    for key, value in fields.items():
        try:
            found[key] = kinds[key](value)
        except ValueError as error:
            raise FoxEdgeError(f"{path}: {where}{key} is {_shown(value)}, but must be {error}") from None
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _exports(path: Path, where: str, fields: Mapping[str, Any]) -> list[Export]:
    """One table of [[exports]], multiplied out."""
    values = _read(
        path,
        where,
        fields,
        {
            "format": _one_of(FORMATS),
            "quant": _texts,
            "rounding": _one_of(ROUNDINGS),
            "calibrate": _file(path),
            "imatrix": _file(path),
            "max_mean_kl": _number,
        },
    )
    for key in ("format", "quant"):
        if key not in values:
            raise FoxEdgeError(f"{path}: {where}'{key}' is missing")
    beside = {key: values.get(key) for key in ("calibrate", "imatrix", "max_mean_kl")}
    found = []
    for format, quant, rounding in itertools.product(
        values["format"], values["quant"], values.get("rounding", (None,))
    ):
        word = str((path.parent / quant).resolve()) if quant.endswith(".toml") else quant
        try:
            find_recipe(format, word)
        except RecipeError as error:
            raise FoxEdgeError(f"{path}: {where}{error}") from None
        found.append(Export(format, word, rounding, **beside))
    return found


def _checkpoint(path: Path, word: str) -> str:
    """A folder beside the file as an absolute path; 'nano' and hub ids as they are."""
    beside = path.parent / Path(word).expanduser()
    if word == NANO or not (beside.exists() or word.startswith((".", "/", "~"))):
        return word
    return str(beside.resolve())


def _tasks(path: Path, fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    known = task_keys(path)
    for name, settings in fields.items():
        if name not in known:
            raise FoxEdgeError(f"{path}: unknown task '{name}'; known: {', '.join(known)}")
        if not isinstance(settings, dict):
            raise FoxEdgeError(f"{path}: task '{name}' must be a table: [tasks.{name}]")
    return {name: _read(path, f"[tasks.{name}] ", fields[name], known[name]) for name in fields}


def task_keys(path: Path) -> dict[str, dict[str, Kind]]:
    """Task -> what may be said about it: the keys, and what their values must be."""
    file, there = _file(path), _file(path, folder=True)
    questions: dict[str, Kind] = {"limit": _positive, "seed": _count}
    harness: dict[str, Kind] = {**questions, "shots": _count, "data": there}
    return {
        "bench": {
            "workload": _text_of(WORKLOADS),
            "prompt_tokens": _positive,
            "decode_tokens": _positive,
            "users": _positives,
            "page_cache": _text_of(STATES),
            "repeats": _positive,
            "context": _positive,
            "profile": _text_of(PROFILES),
            "baseline": file,
        },
        "fidelity": {"text": file, "tokens": _positive, "window": _positive, "score_from": _count},
        "gsm8k": {**questions, "shots": _count, "data": file, "train": file},
        "word-problems": questions,
        **dict.fromkeys(HARNESS_TASKS, harness),
    }


def _run(path: Path, fields: Mapping[str, Any]) -> Run:
    values = _read(
        path,
        "[run] ",
        fields,
        {"threads": _positive, "memory": _bytes, "questions_per_step": _positive},
    )
    return Run(
        values.get("threads"), values.get("memory"), values.get("questions_per_step", QUESTIONS_PER_STEP)
    )


# --- kinds of values -------------------------------------------------------------------------------------


def _texts(value: Any) -> tuple[str, ...]:
    """One text or a list of different ones."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
        raise ValueError("a text or a list of texts")
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise ValueError(f"a list of different texts ('{twice}' is there twice)")
    return tuple(words)


def _one_of(known: tuple[str, ...]) -> Kind:
    def read(value: Any) -> tuple[str, ...]:
        words = _texts(value)
        if not set(words) <= set(known):
            raise ValueError(f"of {', '.join(known)}")
        return words

    return read


def _text_of(known: Collection[str]) -> Kind:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return value

    return read


def _file(sweep: Path, folder: bool = False) -> Kind:
    what = "a folder" if folder else "a file"

    def read(value: Any) -> Path:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{what}'s path")
        path = (sweep.parent / Path(value).expanduser()).resolve()
        if not (path.is_dir() if folder else path.is_file()):
            raise ValueError(f"{what}, and {path} is none")
        return path

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("a whole number from 1")
    return value


def _positives(value: Any) -> tuple[int, ...]:
    """One number from 1 or a list of different ones."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or len(set(map(str, numbers))) < len(numbers):
        raise ValueError("a whole number from 1, or a list of different ones")
    return tuple(map(_positive, numbers))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a whole number from 0")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError("a number above 0")
    return float(value)


def _bytes(value: Any) -> int:
    """'6 GB' in bytes."""
    number, _, unit = value.partition(" ") if isinstance(value, str) else ("", "", "")
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"a number and a unit, such as '6 GB' (known units: {', '.join(_UNITS)})")
    return size


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a table")
    return value


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise ValueError("tables, written [[exports]]")
    return value
