"""Results from strangers: each broken file is answered in one sentence, and nothing of it is used."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import records
from benchmarks.report.compare import read_result
from benchmarks.report.document import make_report, read_report
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.sample_report import PROFILES, full_evaluation, full_fidelity, full_result


@pytest.fixture
def record() -> dict[str, Any]:
    return make_report(
        full_result(),
        checkpoint="fox",
        fidelity=full_fidelity(),
        evaluations=[full_evaluation()],
        profiles=PROFILES,
    )


def refused(tmp_path: Path, content: bytes | str | dict[str, Any] | list[Any]) -> str:
    """The one sentence about a file."""
    path = tmp_path / "report.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(FoxEdgeError) as caught:
        read_report(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < 300
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON (line 1, column 1: Expecting value)"),
        ('{"rows": [\n1,]}', "not JSON (line 2, column 3:"),
        (b"\xff\xfe{}", "not UTF-8 text (byte 0)"),
        ("[1]", "holds no result of fox-edge (a JSON list, not an object)"),
        ("7", "holds no result of fox-edge (a JSON value, not an object)"),
        ("{}", "no report of fox-edge (it has no 'rows')"),
        ('{"rows": [], "schema": NaN}', "not JSON (NaN is no number of JSON)"),
        ('{"rows": ' + "[" * 100_000, "nested too deep for a result"),
        ('{"rows": [], "n": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_report(tmp_path: Path, content: bytes | str, said: str) -> None:
    assert refused(tmp_path, content).startswith(said)


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FoxEdgeError, match=r"nothing\.json: cannot be read \(No such file"):
        read_report(tmp_path / "nothing.json")
    with pytest.raises(FoxEdgeError, match=r"cannot be read \(Is a directory"):
        read_report(tmp_path)


def test_a_huge_file_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_BYTES", 1 << 20)
    assert refused(tmp_path, "[" + " " * (1 << 20)) == "larger than the 1 MiB that a result may have"


def test_a_newer_schema_is_refused_and_says_which(tmp_path: Path, record: dict[str, Any]) -> None:
    said = refused(tmp_path, record | {"schema": 3})
    assert said == "written in schema 3 by a later fox-edge; this one reads up to 2"
    assert refused(tmp_path, record | {"schema": "2"}) == 'schema is "2", not a whole number from 1'
    assert refused(tmp_path, record | {"schema": 0}).startswith("schema is 0")
    assert refused(tmp_path, record | {"schema": True}).startswith("schema is true")


def broken(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced; the path as in 'rows.2.bytes'."""
    copy = json.loads(json.dumps(record))
    *way, last = path.split(".")
    place = copy
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("rows", {}, "rows is a JSON object, not a list"),
        ("rows.2", "x", 'rows[2] is "x", not an object'),
        ("rows.2.artifact", ..., "rows[2].artifact is missing"),
        ("rows.2.artifact", 5, "rows[2].artifact is 5, not a text"),
        ("rows.2.bytes", "many", 'rows[2].bytes is "many", not a number'),
        ("rows.2.bytes", True, "rows[2].bytes is true, not a number"),
        ("rows.2.bytes", 10**400, "rows[2].bytes is a very large number, not a number"),
        ("rows.2.bytes", 1e300, "rows[2].bytes is 1e+300, not a number"),
        ("rows.2.interval", [], "rows[2].interval is a JSON list, not an object"),
        (
            "rows.2.interval.load_s",
            [2, 1],
            "rows[2].interval.load_s is a JSON list, not two numbers, the lower first",
        ),
        ("rows.2.curve.3.from", None, "rows[2].curve[3].from is missing"),
        ("rows.0.tasks.0.paired", [], "rows[0].tasks[0].paired is a JSON list, not an object"),
        ("rows.0.tasks.0.answers.7.right", 1, "rows[0].tasks[0].answers[7].right is 1, not true or false"),
        ("rows.0.projections.1.profile", None, "rows[0].projections[1].profile is missing"),
        ("machine", None, "machine is missing"),
        ("machine.versions", {"torch": 2}, "machine.versions.torch is 2, not a text"),
        ("settings", "x" * 99, f'settings is "{"x" * 38}…, not an object'),
        ("conditions.notes", "x", 'conditions.notes is "x", not a list'),
        ("profiles.0.memory_bytes", "4 GB", 'profiles[0].memory_bytes is "4 GB", not a number'),
        ("advice.0.sentence", None, "advice[0].sentence is missing"),
        ("commands", [1], "commands[0] is 1, not a text"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(
    tmp_path: Path, record: dict[str, Any], path: str, value: Any, said: str
) -> None:
    assert refused(tmp_path, broken(record, path, value)) == said


def test_an_infinity_in_a_number_s_clothes(tmp_path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(broken(record, "rows.0.bytes", 123454321)).replace("123454321", "1e999")
    assert "rows[0].bytes is Infinity, not a number" in refused(tmp_path, text)


def test_more_rows_than_anybody_measures(tmp_path: Path, record: dict[str, Any]) -> None:
    many = record | {"rows": [{"artifact": str(n)} for n in range(1001)]}
    assert refused(tmp_path, many) == "1001 rows, more than the 1000 that a result may have"


def test_texts_are_made_fit_for_a_terminal(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(broken(record, "rows.0.name", "a\x1b[2Jb\ud800c\r\nd")), encoding="utf-8")
    assert read_report(path)["rows"][0]["name"] == "a�[2Jb�c�\nd"


def test_every_kind_of_result_is_read(tmp_path: Path) -> None:
    for number, result in enumerate((full_result(), full_evaluation(), full_fidelity())):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(result), encoding="utf-8")
        assert len(read_result(path)["rows"]) == 7
    path.write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(FoxEdgeError, match="no result of bench, eval or a report"):
        read_result(path)
    path.write_text('{"task": 7, "results": []}', encoding="utf-8")
    with pytest.raises(FoxEdgeError, match="task is no text"):
        read_result(path)
