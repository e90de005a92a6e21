"""The order of the study, with workers that are scripted: what fails, what is cut off, what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import study as study_module
from benchmarks.gpu.study import JOBS, PARTS, Case, Study, measure, plan, run_job
from benchmarks.processes.launch import WorkerError
from fox_edge.errors import FoxEdgeError
from runtimes.base import load


class Script:
    """Workers that take known times, some of which fail; the clock moves with them."""

    def __init__(self, takes: dict[str, float], fails: dict[str, str]) -> None:
        self.now, self.takes, self.fails = 0.0, takes, fails
        self.limits: dict[str, float] = {}

    def __call__(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert job["task"] == "gpu"
        name = job["name"]
        self.limits[name] = timeout_s
        took = self.takes.get(name, 1.0)
        self.now += min(took, timeout_s)
        if took > timeout_s:
            raise WorkerError("the process was killed by SIGKILL")
        if name in self.fails:
            raise WorkerError(self.fails[name])
        return {"figure": name}

    def clock(self) -> float:
        return self.now


def cases(*names: str, limit_s: float = 90.0) -> list[Case]:
    return [Case("part", name, {"do": "x", "name": name}, limit_s) for name in names]


def run(
    script: Script, todo: list[Case], seconds: float = 500.0, results: Any = None
) -> tuple[Any, list[Any]]:
    results = {"parts": {}} if results is None else results
    saved: list[Any] = []
    measure(
        todo,
        results,
        lambda: saved.append(copy.deepcopy(results)),
        seconds,
        Path("x.log"),
        script,
        script.clock,
    )
    return results["parts"].get("part", {}), saved


def test_one_that_fails_says_why_and_the_others_go_on() -> None:
    found, saved = run(Script({}, {"b": "no such kernel"}), cases("a", "b", "c"))
    assert (found["a"]["figure"], found["c"]["figure"]) == ("a", "c")
    assert found["b"]["error"] == "no such kernel" and "figure" not in found["b"]
    assert [len(one["parts"]["part"]) for one in saved] == [1, 2, 3]  # after each


def test_one_that_hangs_is_ended_and_told_apart_from_one_that_was_killed() -> None:
    found, _ = run(Script({"a": 1e9}, {"b": "the process was killed by SIGKILL"}), cases("a", "b"))
    assert found["a"]["error"] == "ended after 90 s" and found["a"]["took_s"] == 90
    assert found["b"]["error"] == "the process was killed by SIGKILL"


def test_nothing_is_begun_that_there_is_no_time_for() -> None:
    script = Script({"a": 60.0, "b": 35.0}, {})
    found, _ = run(script, cases("a", "b", "c"), seconds=100.0)
    assert script.limits == {"a": 90.0, "b": 40.0}
    assert found["c"]["error"] == "not begun: 5 s were left of 100"


def test_what_an_earlier_run_found_stays_until_it_is_measured_anew() -> None:
    earlier = {"parts": {"part": {"a": {"figure": "old"}, "b": {"figure": "old"}}, "other": {"x": 1}}}
    found, _ = run(Script({"a": 95.0}, {}), cases("a", "b", limit_s=200), 100.0, earlier)
    assert found == {"a": found["a"], "b": {"figure": "old"}} and found["a"]["figure"] == "a"
    assert earlier["parts"]["other"] == {"x": 1}


def test_parts_are_planned_in_order_behind_the_checkpoint() -> None:
    study = Study(Path("w/c"), "fox-1-1.6b", "cuda")
    planned = plan(study)
    assert planned[0].part == "checkpoint"
    assert list(dict.fromkeys(case.part for case in planned[1:])) == list(PARTS)
    assert {case.job["do"] for case in planned} == set(JOBS)
    users = [case.job["users"] for case in plan(study, ["users"])[1:]]
    assert users == [4, 16, 32, 64]
    names = [(case.part, case.name) for case in planned]
    assert len(set(names)) == len(names)
    assert all(case.job.get("device", "cuda") == "cuda" for case in planned)


@pytest.mark.parametrize("job", JOBS.values())
def test_every_job_is_there(job: str) -> None:
    assert callable(load(job))


def test_what_a_library_raises_is_a_sentence_and_a_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: dict[str, Any], progress: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(study_module, "load", lambda spec: broken)
    job = {"do": "floors", "log": str(tmp_path / "x.log")}
    with pytest.raises(FoxEdgeError) as error:
        run_job(job, lambda done, total: None)
    assert str(error.value) == "RuntimeError: an illegal memory access was encountered"
    log = (tmp_path / "x.log").read_text()
    assert '"do": "floors"' in log and "Traceback" in log and "in broken" in log
