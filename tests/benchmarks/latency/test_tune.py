"""The probe keeps its time, the rule picks what it says, and what is picked is used by bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.subject import open_subject
from benchmarks.latency import tune as module
from benchmarks.latency.bench import bench
from benchmarks.latency.tune import Figures, Probe, choose, plan, tune, tune_text
from benchmarks.processes.launch import WorkerError, run_worker
from export.gguf import export_gguf
from fox_edge import cli
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, ONNX, find_recipe
from runtimes.base import SessionOptions
from runtimes.tuning import with_tuning


@pytest.fixture
def artifact(tiny_256: Checkpoint, tmp_path: Path) -> Artifact:
    return export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, "int4"), rounding="nearest")


def row(name: str, prompt: float, decode: float, peak: int, **more: Any) -> Figures:
    return Figures({"name": name, **more.pop("choices", {})}, prompt, decode, peak, **more)


# facts of Fox-1's shape: Q4_K_M with and without repacking, and a cache of 8 bits
ROWS = [
    row("default", 173, 28.8, 1735),
    row("repack off", 266, 24.3, 1209),
    row("q8_0", 170, 28.0, 1000, choices={"kv": "q8_0"}),
    row("q4_0", 170, 28.0, 900, choices={"kv": "q4_0"}, eligible=False),
]


@pytest.mark.parametrize(
    # 234 / 173 + 128 / 28.8 = 5.80 s; 234 / 266 + 128 / 24.3 = 6.15 s, more than 5 % slower
    ("prefer", "name"),
    [("balance", "default"), ("prompt", "repack off"), ("decode", "default"), ("memory", "q8_0")],
)
def test_the_rule(prefer: str, name: str) -> None:
    rows = ROWS if prefer == "memory" else [r for r in ROWS if "kv" not in r.choices]
    assert choose(rows, prefer).choices["name"] == name


def test_within_the_noise_the_other_good_decides() -> None:
    near = [row("a", 100, 20.0, 2000), row("b", 100, 19.5, 1000), row("c", 100, 10, 500)]
    assert choose(near, "decode").choices["name"] == "b"
    small = [row("a", 100, 20.0, 1040), row("b", 50, 10, 1000)]
    assert choose(small, "memory").choices["name"] == "a"
    # So close in the other good as well that the first decides after all.
    close = [row("b", 98, 19.5, 1000), row("a", 100, 20.0, 1001), row("c", 100, 20.0, 2000)]
    assert choose(close, "balance").choices["name"] == "a"
    equal = [row("a", 100, 20.0, 1000), row("b", 100, 20.0, 1000)]
    assert choose(equal, "balance").choices["name"] == "a"


def test_what_changes_answers_must_save_more_than_noise() -> None:
    rows = [row("a", 100, 20, 1040), row("b", 200, 40, 1000, choices={"kv": "q8_0"})]
    assert choose(rows, "memory").choices["name"] == "a"


def test_a_quantized_cache_is_tried_for_memory_alone() -> None:
    for prefer in ("balance", "prompt", "decode"):
        assert all("kv" not in step for format in (GGUF, ONNX) for step in plan(format, prefer))
    assert {"kv": "q8_0"} in list(plan(GGUF, "memory")) and {"kv": "int8"} in list(plan(ONNX, "memory"))


class Clock:
    """A machine on which every process takes so many seconds."""

    def __init__(self, seconds: float, dies: tuple[int, ...] = ()) -> None:
        self.now, self.seconds, self.dies = 0.0, seconds, dies
        self.jobs: list[dict[str, Any]] = []
        self.limits: list[float | None] = []

    def __call__(self) -> float:
        return self.now

    def run(self, job: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
        self.jobs.append(job)
        self.limits.append(timeout_s)
        self.now += self.seconds
        if len(self.jobs) in self.dies:
            raise WorkerError("killed")
        speeds = {"prompt_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0}
        return {"passes": [speeds], "peak_rss_bytes": 1000, "one_s": self.seconds}


def probe(artifact: Artifact, clock: Clock, prefer: str = "balance") -> Probe:
    found = Probe(open_subject(artifact.path), prefer, 20.0, run=clock.run, clock=clock)
    found.measure_all()
    return found


@pytest.mark.parametrize(("seconds", "ran"), [(1.0, 4), (6.0, 3), (19.0, 1), (60.0, 1)])
def test_the_time_is_kept(seconds: float, ran: int, artifact: Artifact) -> None:
    clock = Clock(seconds)
    found = probe(artifact, clock)
    assert len(clock.jobs) == len(found.rows) == ran
    assert clock.now <= max(20.0, seconds)
    # Only the first may take what it needs; the others are stopped at the end of the time.
    assert clock.limits[0] is None and all(limit is not None and limit <= 20 for limit in clock.limits[1:])
    # As it comes, without repacking, without mapping, without flash attention.
    assert len(found.skipped) + ran == 4


def test_a_setting_that_dies_is_left_out(artifact: Artifact) -> None:
    found = probe(artifact, Clock(1.0, dies=(2,)))
    assert {"repack": False} in found.skipped
    assert {"mmap": False} in [r.choices for r in found.rows]
    with pytest.raises(WorkerError):
        probe(artifact, Clock(1.0, dies=(1,)))


def test_threads_of_prompts_and_of_decoding_are_chosen_apart(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "other_threads", lambda: [7])
    monkeypatch.setattr(module, "physical_cores", lambda: 4)

    def run(job: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
        speeds = [
            {"prompt_tokens_per_s": 100.0, "decode_tokens_per_s": 20.0},
            {"prompt_tokens_per_s": 200.0, "decode_tokens_per_s": 10.0},
        ]
        return {"passes": speeds, "peak_rss_bytes": 1000, "one_s": 1.0}

    found = Probe(open_subject(artifact.path), "balance", 20.0, run=run)
    found._measure({}, [7])
    best = choose(found.rows, "balance")
    assert best.choices == {"threads": 4, "prompt_threads": 7}
    assert (best.prompt_tokens_per_s, best.decode_tokens_per_s) == (200, 20)


@pytest.mark.usefixtures("known_machine")
def test_tune_measures_keeps_and_bench_uses(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "physical_cores", lambda: 1)
    monkeypatch.setattr(module, "other_threads", lambda: [])
    monkeypatch.setattr(module, "plan", lambda *_: iter([{"repack": False}]))
    # The smaller of the two, whatever else this machine says.
    monkeypatch.setattr(module, "choose", lambda rows, prefer: rows[-1])
    result = json.loads(json.dumps(tune(artifact.path, budget_s=600)))  # however busy the machine is
    assert [r["setting"] for r in result["results"]] == ["as it comes", "repack off"]
    assert all(r["prompt_tokens_per_s"] > 0 and r["decode_tokens_per_s"] > 0 for r in result["results"])
    assert result["chosen"] == {"repack": False} and result["results"][1]["chosen"]
    assert with_tuning(artifact, SessionOptions())[0] == SessionOptions(repack=False)
    assert "kept for this machine in" in tune_text(result)
    measured = bench([artifact.path], prompt_tokens=8, decode_tokens=2, repeats=1, threads=1)
    assert measured["results"][0]["session"]["repack"] is False
    assert "tuned for balance here: repack off" in capsys.readouterr().err
    plain = bench(
        [artifact.path], prompt_tokens=8, decode_tokens=2, repeats=1, threads=1, session={"cache": False}
    )
    assert plain["results"][0]["session"]["repack"] is None
    assert not list(artifact.changed_files())


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("torch:nano", "torch has no choices to tune yet"), ("nowhere", "no such artifact")],
)
def test_what_cannot_be_tuned(target: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", target]) == 2
    assert sentence in capsys.readouterr().err


def test_a_quantized_cache_is_told() -> None:
    result = {
        "results": [],
        "prefer": "memory",
        "chosen": {"kv": "q8_0"},
        "not_tried": ["repack off"],
        "seconds": 3.0,
        "file": "f",
    }
    text = tune_text(result)
    assert "a KV cache of q8_0 changes answers a little" in text
    assert "no time was left for: repack off" in text


def test_a_worker_that_takes_too_long_is_stopped() -> None:
    import sys

    with pytest.raises(WorkerError, match="SIGKILL"):
        run_worker({}, command=[sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)
