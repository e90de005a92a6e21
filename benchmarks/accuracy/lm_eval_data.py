"""The files of lm-evaluation-harness's tasks, in a local folder laid out as on the hub.

A split is SPLIT.jsonl, SPLIT.parquet or the hub's SPLIT-00000-of-00001.parquet, in the folder itself, in
`data`, or in the folder of the task's configuration. Knows files and columns; not what is asked. Files come
from anywhere: every row is checked before a model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.accuracy.gsm8k import read_lines
from fox_edge.errors import FoxEdgeError, MissingPackageError

Row = dict[str, Any]
# A column and what its value must be; the sentence says it to the user.
Check = tuple[str, Callable[[Any, Row], bool], str]


def _text(value: Any, row: Row) -> bool:
    return isinstance(value, str)


def _texts(value: Any, row: Row) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) and v for v in value)


def _choices(value: Any, row: Row) -> bool:
    return (
        isinstance(value, dict)
        and _texts(value.get("text"), row)
        and _texts(value.get("label"), row)
        and len(value["text"]) == len(value["label"])
    )


def _targets(value: Any, row: Row) -> bool:
    return (
        isinstance(value, dict)
        and _texts(value.get("choices"), row)
        and isinstance(value.get("labels"), list)
        and len(value["labels"]) == len(value["choices"])
        and all(label in (0, 1) for label in value["labels"])
        and 1 in value["labels"]
    )


def _index_of(column: str) -> Callable[[Any, Row], bool]:
    def check(value: Any, row: Row) -> bool:
        text = str(value)
        return type(value) in (int, str) and text.isdecimal() and int(text) < len(row[column])

    return check


ARC: tuple[Check, ...] = (
    ("question", _text, "a text"),
    ("choices", _choices, "an object with as many texts under 'text' as under 'label'"),
    ("answerKey", lambda value, row: value in row["choices"]["label"], "one of the labels"),
)
HELLASWAG: tuple[Check, ...] = (
    ("activity_label", _text, "a text"),
    ("ctx_a", _text, "a text"),
    ("ctx_b", _text, "a text"),
    ("endings", _texts, "a list of texts"),
    ("label", _index_of("endings"), "the number of an ending"),
)
TRUTHFULQA: tuple[Check, ...] = (
    ("question", _text, "a text"),
    ("mc1_targets", _targets, "an object with as many texts under 'choices' as 0 and 1 under 'labels'"),
    ("mc2_targets", _targets, "an object with as many texts under 'choices' as 0 and 1 under 'labels'"),
)
MMLU: tuple[Check, ...] = (
    ("question", _text, "a text"),
    ("choices", lambda value, row: _texts(value, row) and len(value) == 4, "a list of four texts"),
    ("answer", lambda value, row: type(value) is int and 0 <= value < 4, "a number from 0 to 3"),
)
WINOGRANDE: tuple[Check, ...] = (
    ("sentence", lambda value, row: isinstance(value, str) and "_" in value, "a text with a '_' in it"),
    ("option1", _text, "a text"),
    ("option2", _text, "a text"),
    ("answer", lambda value, row: value in ("1", "2"), "'1' or '2'"),
)
GSM8K: tuple[Check, ...] = (("question", _text, "a text"), ("answer", _text, "a text"))


def split_path(folder: Path, configuration: str, split: str) -> Path | None:
    """The file of a split, or None; raises FoxEdgeError where several could be meant."""
    for place in (folder / configuration, folder / "data", folder) if configuration else (folder,):
        found = sorted(
            path
            for path in (place.iterdir() if place.is_dir() else ())
            if path.suffix in (".jsonl", ".parquet") and path.name.replace("-", ".").split(".")[0] == split
        )
        if len(found) > 1:
            raise FoxEdgeError(
                f"{place}: {len(found)} files of the split '{split}' ({found[0].name}, {found[1].name}); "
                "one is needed"
            )
        if found:
            return found[0]
    return None


def read_rows(path: Path, checks: tuple[Check, ...]) -> list[Row]:
    """The checked columns of every row; raises FoxEdgeError naming the file and the line or row."""
    rows = []
    for where, fields in read_lines(path) if path.suffix == ".jsonl" else _parquet(path, checks):
        if not isinstance(fields, dict):
            raise FoxEdgeError(f"{where}: not an object")
        for column, check, wanted in checks:
            if column not in fields or not check(fields[column], fields):
                raise FoxEdgeError(f"{where}: '{column}' is not {wanted}")
        rows.append({column: fields[column] for column, _, _ in checks})
    if not rows:
        raise FoxEdgeError(f"{path}: holds no questions")
    return rows


def _parquet(path: Path, checks: tuple[Check, ...]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "lm-eval") from None
    try:
        rows = parquet.read_table(path, columns=[column for column, _, _ in checks]).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FoxEdgeError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    for number, fields in enumerate(rows, 1):
        yield f"{path}, row {number}", fields
