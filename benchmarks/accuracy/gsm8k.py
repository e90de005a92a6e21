"""GSM8K as its authors score it (Cobbe et al., 2021): the data, the prompt, the answer's extraction.

Knows questions and texts; not models. The data comes from files that the user has, or from the hub's cache;
none of it is part of this project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fox_edge.errors import FoxEdgeError, MissingPackageError

REPOSITORY = "openai/gsm8k"
SPLIT_FILES = {"test": "main/test-00000-of-00001.parquet", "train": "main/train-00000-of-00001.parquet"}
# Where the answer to one question ends in a prompt of worked examples.
STOP_TEXTS = ("Question:",)
MAX_TOKENS = 320
_MAX_LINE_BYTES = 1 << 20
# The authors' own expression; an answer without it is invalid, and so is wrong.
_FINAL = re.compile(r"#### (\-?[0-9\.\,]+)")
# lm-evaluation-harness's "flexible-extract" (0.4.13): the last thing in the text that looks like a number.
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True)
class Question:
    """A question with its worked answer, which ends in '#### number'."""

    question: str
    answer: str


def final_number(text: str) -> str | None:
    """The number after the first '####', without commas, as the string that is compared; None if invalid."""
    found = _FINAL.search(text)
    return found[1].strip().replace(",", "") if found else None


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, without commas, dollar signs and a final point; None if invalid.

    What lm-evaluation-harness compares under "flexible-extract".
    """
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("$", "").removesuffix(".") if found else None


def judge(text: str, expected: str) -> dict[str, Any]:
    """One answer's extracted numbers, and whether they are the expected one.

    `right` is the authors' rule (`extracted`), `flexible_right` the harness's looser one.
    """
    strict, flexible = final_number(text), last_number(text)
    return {
        "extracted": strict,
        "right": strict == expected,
        "flexible": flexible,
        "flexible_right": flexible == last_number(expected),
    }


def worked(examples: Sequence[Question]) -> str:
    """What every prompt begins with: 'Question: ...\\nAnswer: ...' of each example, blank lines after."""
    return "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in examples)


def prompt(examples: Sequence[Question], question: str) -> str:
    """Worked examples, then the question: 'Question: ...\\nAnswer: ...', blank lines between."""
    return f"{worked(examples)}Question: {question}\nAnswer:"


def read_split(split: str, path: Path | None, option: str, count: int | None = None) -> list[Question]:
    """The first `count` (None: all) questions of a split: from a .jsonl file, or else from the hub.

    `option` is what a user gives the file with, for the error. Raises FoxEdgeError naming file and line,
    or saying that the hub cannot be reached.
    """
    rows = read_lines(path) if path is not None else _read_hub(split, option)
    questions = [_question(where, fields) for where, fields in islice(rows, count)]
    if not questions and count != 0:
        raise FoxEdgeError(f"{path or REPOSITORY}: holds no questions")
    return questions


def _question(where: str, fields: Any) -> Question:
    if not isinstance(fields, dict) or not all(
        isinstance(fields.get(k), str) for k in ("question", "answer")
    ):
        raise FoxEdgeError(f"{where}: not an object with the texts 'question' and 'answer'")
    if final_number(fields["answer"]) is None:
        raise FoxEdgeError(f"{where}: the answer does not end in '#### number'")
    return Question(fields["question"], fields["answer"])


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed line) of a JSON-lines file; blank lines are skipped."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise FoxEdgeError(f"{where}: longer than {_MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield where, _parse(where, line)
    except OSError as error:
        raise FoxEdgeError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(where: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FoxEdgeError(f"{where}: not JSON ({error})") from None


def _read_hub(split: str, option: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a split in the hub's parquet file, through huggingface_hub's cache."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "eval") from None
    path = _download(split, option)
    rows = parquet.read_table(path, columns=["question", "answer"]).to_pylist()
    for number, fields in enumerate(rows, 1):
        yield f"{REPOSITORY} {split}, row {number}", fields


def _download(split: str, option: str) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return str(huggingface_hub.hf_hub_download(REPOSITORY, SPLIT_FILES[split], repo_type="dataset"))
    # Network, proxy and cache failures come in many classes; the user needs the one line.
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise FoxEdgeError(
            f"GSM8K's {split} split cannot be had from the hub ({reason}); give a local file with {option}"
        ) from None
