"""Commands as readers type them, medians by hand, and the file that is committed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.common.results import command_text, medians, study_command, write_results


def test_a_command_can_be_typed_again() -> None:
    words = ["bench", Path("out/my model"), "--users", 4, "--profile", "phone; rm -r ."]
    text = command_text(*words)
    assert shlex.split(text) == ["fox-edge", *map(str, words)]
    assert command_text("bench", "out/int4") == "fox-edge bench out/int4"


def test_a_study_names_files_and_not_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/home/ada/work/", "--results", "a/b.json", "--rounds", "3", "--peer", "http://host:1/v1=model"]
    monkeypatch.setattr("sys.argv", ["/somewhere/memory.py", *words])
    assert study_command("memory") == (
        "python -m benchmarks.memory work --results b.json --rounds 3 --peer http://host:1/v1=model"
    )


def test_medians_are_of_numbers_only() -> None:
    rounds = [[{"artifact": "a", "tok": number, "cold": True}] for number in (5, 1, 2.5)]
    assert medians(rounds) == [{"artifact": "a", "tok": 2.5, "cold": True, "rounds": 3}]


def test_a_results_file_ends_in_a_line_and_needs_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, {"rows": [1.5, None]})
    assert path.read_text().endswith("}\n")
    assert json.loads(path.read_text()) == {"rows": [1.5, None]}
