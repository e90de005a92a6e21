"""A cap on memory, with real processes that stay below it, pass it, or ask for too much at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import caps
from benchmarks.processes.caps import GROUPED, WATCHED, Guard, group_of, most_held_bytes
from benchmarks.processes.launch import WorkerError, run_worker

MB = 1 << 20
CAP = 120 * MB


def python(code: str) -> list[str]:
    """A worker that does this once it was given its job."""
    return [sys.executable, "-c", f"import json, sys, time, mmap; json.load(sys.stdin)\n{code}"]


DONE = "print(json.dumps({'result': {'done': True}}), flush=True)"
GROW = f"held = []\nfor _ in range(2000):\n    held.append(b'x' * (1 << 20)); time.sleep(0.0005)\n{DONE}"


def test_a_process_below_its_cap_is_left_alone() -> None:
    code = f"held = b'x' * (40 << 20)\ntime.sleep(0.05)\n{DONE}"
    assert run_worker({}, command=python(code), cap_bytes=CAP) == {"done": True}


def test_a_process_that_grows_past_its_cap_is_ended_with_the_numbers() -> None:
    with pytest.raises(
        WorkerError, match=r"ended at its memory cap: it held 1\d\d\.\d MB, the cap is 125\.8 MB"
    ):
        run_worker({}, command=python(GROW), cap_bytes=CAP)


def test_a_peak_between_two_looks_is_seen_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system keeps the peak: what was given back before anybody looked counts too."""
    if sys.platform != "linux":
        pytest.skip("only Linux keeps it")
    monkeypatch.setattr(caps, "_LOOK_S", 0.2)
    code = f"held = b'x' * (200 << 20)\ndel held\ntime.sleep(1)\n{DONE}"
    with pytest.raises(WorkerError, match=r"ended at its memory cap: it held [12]\d\d\.\d MB"):
        run_worker({}, command=python(code), cap_bytes=CAP)


def test_pages_of_a_mapped_file_count(tmp_path: Path) -> None:
    """Weights are such pages: a model that does not keep them in memory is of no use."""
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (200 * MB))
    code = (
        f"source = open({str(path)!r}, 'rb')\n"
        f"file = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)\n"
        f"sum(file[n] for n in range(0, len(file), 4096))\ntime.sleep(1)\n{DONE}"
    )
    with pytest.raises(WorkerError, match="ended at its memory cap"):
        run_worker({}, command=python(code), cap_bytes=CAP)


def test_one_allocation_larger_than_the_machine_fails_in_the_process() -> None:
    """Twice the cap and a GiB is the limit on data, so this never gets as far as to be touched."""
    if sys.platform != "linux":
        pytest.skip("only Linux counts a process's data")
    code = f"held = bytearray(3 << 30)\n{DONE}"
    with pytest.raises(
        WorkerError, match=r"status 1: MemoryError; it held \d+\.\d MB under a cap of 125\.8 MB"
    ):
        run_worker({}, command=python(code), cap_bytes=CAP)


def test_how_a_capped_process_died_is_told_with_what_it_held() -> None:
    code = "time.sleep(0.1); sys.exit(3)"
    with pytest.raises(WorkerError, match=r"status 3: it said nothing; it held \d+\.\d MB under a cap of"):
        run_worker({}, command=python(code), cap_bytes=CAP)
    assert "cap" not in str(pytest.raises(WorkerError, run_worker, {}, command=python(code)).value)


def test_what_a_process_holds_is_read_from_outside() -> None:
    code = f"import sys; held = b'x' * ({64 * MB}); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        assert 64 * MB < (most_held_bytes(process.pid) or 0) < 100 * MB
        process.stdin.close()
    assert most_held_bytes(process.pid) is None


# --- control groups: the files of the kernel's interface, in a folder ------------------------------------


def groups(tmp_path: Path, controllers: str) -> tuple[Path, Path]:
    """A tree of groups in which this process is in /session/app, and its /proc/self/cgroup."""
    root = tmp_path / "cgroup"
    (root / "session" / "app").mkdir(parents=True)
    (root / "session" / "cgroup.subtree_control").write_text(controllers)
    (root / "session" / "app" / "cgroup.subtree_control").write_text("")
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/other\n0::/session/app\n")
    return root, membership


def test_a_process_gets_a_group_beside_ours_where_memory_is_dealt_out_there(tmp_path: Path) -> None:
    root, membership = groups(tmp_path, "cpu memory pids\n")
    found = group_of(4242, 5000, root, membership)
    assert found is not None and found.parent == root / "session"
    assert (found / "memory.max").read_text() == "5000"
    assert (found / "memory.swap.max").read_text() == "0"
    assert (found / "cgroup.procs").read_text() == "4242"


@pytest.mark.parametrize("controllers", ["", "cpu pids\n"])
def test_no_group_where_memory_is_not_dealt_out(controllers: str, tmp_path: Path) -> None:
    root, membership = groups(tmp_path, controllers)
    assert group_of(4242, 5000, root, membership) is None
    assert [path.name for path in (root / "session").iterdir() if path.is_dir()] == ["app"]


def test_no_group_without_version_2(tmp_path: Path) -> None:
    assert group_of(4242, 5000, tmp_path, tmp_path / "nothing") is None
    (tmp_path / "membership").write_text("4:memory:/other\n")
    assert group_of(4242, 5000, tmp_path, tmp_path / "membership") is None


def test_a_process_that_the_system_ended_in_its_group_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n")
    monkeypatch.setattr(caps, "group_of", lambda *_: group)
    with subprocess.Popen([sys.executable, "-c", ""], text=True) as process, Guard(process, CAP) as guard:
        process.wait()
    assert guard.exceeded and guard.way == GROUPED
    assert f"it held 125.8 MB, the cap is 125.8 MB ({GROUPED})" in guard.sentence()


def test_how_the_cap_is_kept_is_said() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], text=True) as process, Guard(process, CAP) as guard:
        process.wait()
    assert guard.way in (WATCHED, GROUPED) and not guard.exceeded
