"""How programs end, with a shell script in qemu's place that does what a processor might."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.arm.emulator import Emulator, Ended
from benchmarks.arm.processors import PROCESSORS
from benchmarks.arm.userland import last_words, run
from fox_edge.errors import FoxEdgeError

A53 = PROCESSORS[0]


def emulator(tmp_path: Path, script: str) -> Emulator:
    """An emulator whose program is a script; it finds its log's name in $log."""
    path = tmp_path / "qemu"
    find = 'while [ $# -gt 0 ]; do [ "$1" = -D ] && log=$2; last=$1; shift; done\n'
    path.write_text(f"#!/bin/sh\n{find}{script}\n")
    path.chmod(0o755)
    (tmp_path / "proc").mkdir()
    return Emulator(str(path), tmp_path)


def test_output_and_instructions_come_back(tmp_path: Path) -> None:
    machine = emulator(
        tmp_path,
        'echo "0x55:  4e87a509  .byte    0x09, 0xa5, 0x87, 0x4e" > $log; echo out; echo err >&2; exit 3',
    )
    ended = machine.python(A53, ["program"], count=True)
    assert ended == Ended(3, "out\n", "err\n", {"smmla": 1})
    assert ended.complaint() == "err"


def test_nothing_is_logged_unless_asked(tmp_path: Path) -> None:
    ended = emulator(tmp_path, 'echo "log: $log, last: $last"').python(A53, ["-m", "program"])
    assert ended == Ended(0, "log: , last: program\n", "")
    assert ended.complaint() == ""


def test_an_illegal_instruction_is_named(tmp_path: Path) -> None:
    ended = emulator(tmp_path, "kill -ILL $$").python(A53, ["program"], count=True)
    assert ended.complaint() == "died of an instruction that this processor does not have (SIGILL)"


def test_other_deaths(tmp_path: Path) -> None:
    assert emulator(tmp_path, "kill -SEGV $$").python(A53, []).complaint() == "died of SIGSEGV"
    assert Ended(2, "", "Traceback\n  x\nValueError: 7\n").complaint() == "ValueError: 7"
    assert Ended(2, "", "").complaint() == "it said nothing"


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(FoxEdgeError, match=r"did not end within 0\.2 s"):
        emulator(tmp_path, "exec sleep 60").python(A53, [], count=True, timeout_s=0.2)


def test_a_program_sees_nothing_that_is_meant_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/here")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/here")
    ended = emulator(tmp_path, "env").python(A53, [], environment={"PYTHONPATH": "/there"})
    assert "/here" not in ended.stdout and "PYTHONPATH=/there" in ended.stdout


def test_a_probe_puts_the_processors_own_description_in_place(tmp_path: Path) -> None:
    said = '{"hwcap": 2299, "hwcap2": 0, "midr": 1091555380, "runs": {"sdot": false, "smmla": false}}'
    found = emulator(tmp_path, f"echo '{said}'").probe(A53)
    assert found["features"][:2] == ["fp", "asimd"]
    assert "CPU part\t: 0xd03" in (tmp_path / "proc" / "cpuinfo").read_text()


def test_a_processor_that_qemu_does_not_know(tmp_path: Path) -> None:
    machine = emulator(tmp_path, "echo \"qemu: unable to find CPU model 'x'\" >&2; exit 1")
    with pytest.raises(FoxEdgeError, match="qemu -cpu cortex-a53: qemu: unable to find CPU model 'x'"):
        machine.probe(A53)


def test_no_pipe_is_left_open(tmp_path: Path) -> None:
    machine = emulator(tmp_path, "exit 0")
    machine.python(A53, [], count=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    machine.python(A53, [], count=True)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_tool_that_fails_is_told_by_its_first_error() -> None:
    with pytest.raises(FoxEdgeError, match=r"python\S* failed: ERROR: no matching wheel"):
        run(sys.executable, "-c", "raise SystemExit('WARNING: x\\nERROR: no matching wheel\\nlast')")
    assert last_words("a\n\nb\n") == "b"
    assert last_words("reading\nE: Unable to fetch\nmore") == "E: Unable to fetch"
    assert last_words("") == "it said nothing"
