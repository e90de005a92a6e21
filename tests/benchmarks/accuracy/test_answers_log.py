"""A file of answers: kept, gone on with, locked, and never half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy.answers_log import AnswersLog, appending
from fox_edge.errors import FoxEdgeError

IDENTITY = {"digest": "ab" * 32, "task": "gsm8k", "shots": 5, "seed": None, "options": {}}


def kept(path: Path, count: int = 3) -> Path:
    """A file with answers to questions 0 to `count` - 1 of the artifact 'a'."""
    with AnswersLog(path) as log:
        log.begin("a", IDENTITY)
        with appending(log.path, "a") as write:
            for n in range(count):
                write(str(n), {"text": f"answer {n}\n"})
    return path


def taken(path: Path, artifact: str = "a", identity=IDENTITY) -> list[str]:
    with AnswersLog(path) as log:
        return [fields["text"] for fields in log.begin(artifact, identity).values()]


def refused(path: Path, artifact: str = "a", identity=IDENTITY) -> str:
    with pytest.raises(FoxEdgeError) as error:
        taken(path, artifact, identity)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_answers_are_taken_over_line_by_line(tmp_path):
    path = kept(tmp_path / "answers.jsonl")
    assert [json.loads(line).get("question") for line in path.read_text().splitlines()] == [
        None,
        "0",
        "1",
        "2",
    ]
    assert taken(path) == ["answer 0\n", "answer 1\n", "answer 2\n"]
    assert taken(path, "b") == []  # another artifact begins anew, in the same file
    assert taken(path) == ["answer 0\n", "answer 1\n", "answer 2\n"]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_half_written_last_line_is_dropped(tmp_path, cut):
    path = kept(tmp_path / "answers.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    assert taken(path) == ["answer 0\n", "answer 1\n"]
    assert path.read_bytes().endswith(b"\n")
    with appending(path, "a") as write:
        write("2", {"text": "again"})
    assert taken(path) == ["answer 0\n", "answer 1\n", "again"]


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seed": 3}, "under seed null, but this run has seed 3"), ({"shots": 0}, "shots 5.*shots 0"),
     ({"digest": "cd" * 32}, "digest abab.*digest cdcd"), ({"options": {"kv": "q8_0"}}, "options")],
)  # fmt: skip
def test_other_circumstances_are_told_and_nothing_is_written(tmp_path, change, told):
    path = kept(tmp_path / "answers.jsonl")
    before = path.read_bytes()
    with pytest.raises(FoxEdgeError, match=told):
        taken(path, identity={**IDENTITY, **change})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{broken\n", "line 3: not JSON"),
        (b"[" * 9999 + b"\n", "line 3: not JSON"),
        (b"[1]\n", "line 3: neither"),
        (b'{"artifact": "stranger", "question": "1"}\n', "line 3: neither"),
        (b'{"artifact": "a", "question": 1}\n', "line 3: neither"),
        (b'{"artifact": ["a"], "identity": {}}\n', "line 3: neither"),
        (b'{"schema": 9, "artifact": "c", "identity": {}}\n', "line 3: schema 9, but this version reads 1"),
        (b"long", "line 3: longer than 4194304 bytes"),
    ],
    ids=range(8),
)
def test_files_that_are_not_ours_are_told_with_the_line_and_left_alone(tmp_path, line, told):
    path = kept(tmp_path / "answers.jsonl", count=1)
    line = b"x" * (5 << 20) + b"\n" if line == b"long" else line
    path.write_bytes(path.read_bytes() + line + b'{"artifact": "a"')
    before = path.read_bytes()
    assert told in refused(path)
    assert path.read_bytes() == before


def test_of_two_answers_to_one_question_the_first_counts(tmp_path):
    path = kept(tmp_path / "answers.jsonl", count=1)
    with appending(path, "a") as write:
        write("0", {"text": "later"})
    assert taken(path) == ["answer 0\n"]


def test_two_runs_on_one_file_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    hold = "import sys; from pathlib import Path; from benchmarks.accuracy.answers_log import AnswersLog\n"
    hold += f"with AnswersLog(Path({str(path)!r})): print('held', flush=True); sys.stdin.read()"
    root = Path(__file__).parents[3]
    other = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    assert "another run is writing its answers there" in refused(path)
    other.kill()  # as with kill -9: the lock goes with the process
    other.communicate()
    assert taken(path) == []


def test_a_full_disk_is_one_sentence():
    with pytest.raises(FoxEdgeError, match=r"^/dev/full: cannot be written \(No space left on device\)$"):
        taken(Path("/dev/full"))
    with (
        appending(Path("/dev/full"), "a") as write,
        pytest.raises(FoxEdgeError, match="No space left on device"),
    ):
        write("0", {"text": "x"})


def test_a_disk_that_fills_up_in_mid_line_keeps_whole_lines_only(tmp_path, monkeypatch):
    path = kept(tmp_path / "answers.jsonl")
    before, write_some = path.read_bytes(), os.write

    def full(fd, data):
        if len(data) > 20:
            return write_some(fd, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        appending(path, "a") as write,
        pytest.raises(FoxEdgeError, match=r"answers\.jsonl: cannot be written \(No space left on device\)"),
    ):
        write("3", {"text": "x"})
    assert path.read_bytes() == before


def test_places_where_nothing_can_be_written(tmp_path):
    assert "cannot be written (No such file or directory)" in refused(tmp_path / "none" / "answers.jsonl")
    assert "cannot be written (Is a directory)" in refused(tmp_path)
    with appending(None, "a") as write:
        write("0", {"text": "nobody keeps it"})
