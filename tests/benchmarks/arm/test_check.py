"""The order of the check, with scripted runs: what fails says so in its row, and the others go on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import benchmarks.arm.__main__ as command
from benchmarks.arm import guest, runs
from benchmarks.arm.emulator import Ended
from benchmarks.arm.processors import PROCESSORS
from benchmarks.arm.runs import EXPORTS, Found
from fox_edge.errors import FoxEdgeError

DEAD = "died of an instruction that this processor does not have (SIGILL)"
LOGITS = np.eye(3, dtype=np.float32)
FOUND = Found(
    {"runtime": "r", "version": "1", "says": None, "answers": [[1]], "margins": [[1.0]]}, LOGITS, {"sdot": 1}
)
# Every export on x86, and on three processors of its format's.
RUNS = len(EXPORTS) * (1 + 3)
RECIPE = {"limits": {"mean_kl_nats": 0.1, "greedy_tokens": 0}}


class Emulated:
    """An emulator whose processors are what they should be."""

    qemu = "true"

    def __init__(self, *_: object) -> None: ...

    def probe(self, processor: Any) -> dict[str, Any]:
        names = ["asimddp"] * processor.dotprod + ["i8mm"] * processor.i8mm
        return {"features": names, "runs": {"sdot": processor.dotprod, "smmla": processor.i8mm}}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[tuple[str, str], str]:
    """A check without an emulator; what is put in here, by export and processor, fails."""
    fails: dict[tuple[str, str], str] = {}

    def export(_work: Path, format: str, quant: str) -> Any:
        if said := fails.get((f"nano-{format}-{quant}", "export")):
            raise FoxEdgeError(said)
        path = tmp_path / f"nano-{format}-{quant}"
        return SimpleNamespace(path=path, manifest=SimpleNamespace(format=format, recipe=RECIPE))

    def on_arm(_work: Path, _emulator: Any, processor: Any, artifact: Any, _job: Any) -> Found:
        if said := fails.get((artifact.path.name, processor.name)):
            raise FoxEdgeError(said)
        return FOUND

    monkeypatch.setattr(command, "need_tools", lambda: None)
    monkeypatch.setattr(command, "qemu", lambda: "qemu")
    monkeypatch.setattr(command, "userland", lambda work: work)
    monkeypatch.setattr(command, "run", lambda *_: "qemu-aarch64 version 1\n")
    monkeypatch.setattr(command, "Emulator", Emulated)
    reference = SimpleNamespace(passing_logits=lambda _: iter([LOGITS]))
    monkeypatch.setattr(command, "ReferenceScorer", lambda _: reference)
    monkeypatch.setattr(command, "export", export)
    monkeypatch.setattr(command, "job_of", lambda *_: {"text": [1, 2, 3]})
    monkeypatch.setattr(command, "on_x86", lambda *_: FOUND)
    monkeypatch.setattr(command, "on_arm", on_arm)
    return fails


def checked(tmp_path: Path) -> tuple[int, dict[str, Any]]:
    results = tmp_path / "results.json"
    status = command.main([str(tmp_path / "work"), "--results", str(results)])
    return status, json.loads(results.read_text())


def test_all_pass(scripted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, results = checked(tmp_path)
    assert status == 0 and results["passed"]
    assert len(results["rows"]) == RUNS
    assert results["command"] == "python -m benchmarks.arm work --results results.json"
    assert capsys.readouterr().out.splitlines()[-1] == "passed"


def test_only_some_exports_can_be_asked_for(scripted: Any, tmp_path: Path) -> None:
    words = [str(tmp_path / "work"), "--results", str(tmp_path / "r.json")]
    assert command.main([*words, "--export", "gguf-q4_0", "--export", "onnx-int4"]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert sorted({row["artifact"] for row in rows}) == ["nano-gguf-q4_0", "nano-onnx-int4"]
    with pytest.raises(SystemExit):
        command.main([*words, "--export", "onnx-int3"])


def test_a_run_that_dies_says_so_and_the_others_go_on(scripted: Any, tmp_path: Path) -> None:
    scripted["nano-onnx-int8", "cortex-a76"] = DEAD
    status, results = checked(tmp_path)
    assert status == 2 and not results["passed"]
    assert len(results["rows"]) == RUNS
    (bad,) = [row for row in results["rows"] if not row["passed"]]
    assert (bad["artifact"], bad["processor"], bad["why"]) == ("nano-onnx-int8", "cortex-a76", DEAD)


def test_a_wheel_that_is_missing_fails_its_format_only(scripted: Any, tmp_path: Path) -> None:
    said = "python failed: ERROR: No matching distribution found for onnxruntime==1.31.1"
    for processor in PROCESSORS:
        scripted["nano-onnx-int4", processor.name] = said
    _, results = checked(tmp_path)
    bad = [row for row in results["rows"] if not row["passed"]]
    assert [row["why"] for row in bad] == [said] * 3


def test_an_export_that_fails_is_one_row(scripted: Any, tmp_path: Path) -> None:
    scripted["nano-gguf-int4", "export"] = "no"
    _, results = checked(tmp_path)
    (bad,) = [row for row in results["rows"] if not row["passed"]]
    assert (bad["processor"], bad["why"]) == ("x86-64", "no")


def test_a_processor_that_is_not_what_it_should_be_fails_the_check(
    scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"features": [], "runs": {"sdot": False, "smmla": False}}
    monkeypatch.setattr(Emulated, "probe", lambda *_: dict(old))
    status, results = checked(tmp_path)
    assert status == 2
    assert [bool(row["why"]) for row in results["processors"]] == [False, False, True, True]


def test_what_cannot_begin_is_one_sentence_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def need() -> None:
        raise FoxEdgeError("missing here: qemu-user-static")

    monkeypatch.setattr(command, "need_tools", need)
    assert command.main([str(tmp_path / "w"), "--results", str(tmp_path / "r.json")]) == 2
    assert capsys.readouterr().err == "benchmarks.arm: missing here: qemu-user-static\n"
    assert list(tmp_path.iterdir()) == []


# --- runs that are kept ------------------------------------------------------------------------------------


class Program:
    """guest.py's place: counts how often it is started, and writes what it would."""

    def __init__(self, status: int = 0) -> None:
        self.started, self.status = 0, status

    def __call__(self, words: Any) -> Ended:
        self.started += 1
        out = Path(words[-1])
        assert json.loads(Path(words[-2]).read_text()) == {"text": [1]}
        np.save(out / guest.LOGITS, LOGITS)
        (out / guest.SAID).write_text('{"answers": []}')
        return Ended(self.status, "", "", {"sdot": 7})


def test_a_check_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    artifact: Any = SimpleNamespace(path=tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    program = Program()
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        found = runs._kept(folder, artifact, {"text": [1]}, "max", program)
        assert found.instructions == {"sdot": 7} and (found.logits == LOGITS).all()
    assert program.started == 1
    # Another processor, or an export that was made anew, is another run.
    runs._kept(folder, artifact, {"text": [1]}, "cortex-a53", program)
    (tmp_path / "manifest.json").write_text('{"quant": "int4"}')
    runs._kept(folder, artifact, {"text": [1]}, "cortex-a53", program)
    assert program.started == 3


def test_a_run_that_died_leaves_nothing(tmp_path: Path) -> None:
    artifact: Any = SimpleNamespace(path=tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(FoxEdgeError, match="SIGILL"):
        runs._kept(tmp_path / "runs" / "one", artifact, {"text": [1]}, "max", Program(status=-4))
    assert list((tmp_path / "runs").iterdir()) == []
