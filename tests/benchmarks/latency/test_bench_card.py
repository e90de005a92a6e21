"""Rows of what computes on a graphics card: its memory, ceilings and conditions; workers are scripted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import records
from benchmarks.devices import card_rates
from benchmarks.devices.roofline import Bandwidth
from benchmarks.latency import bench as bench_module
from benchmarks.latency import bounds, ceilings, measure
from benchmarks.latency.bench import bench, bench_text
from benchmarks.latency.ceilings import device_of
from benchmarks.latency.rows import FIGURES
from benchmarks.processes.launch import WorkerError
from tests.benchmarks.fake_card import ANSWERS, STATE, put_card
from tests.benchmarks.fake_session import Clock, FakeSession
from tests.benchmarks.latency.test_bench import write_artifact

MIB = 1 << 20
TERA = 1e12
LEFT = {
    "sm_clock_hz": 1.98e9,
    "memory_clock_hz": 3.2e9,
    "temperature_c": 55.0,
    "power_w": 600.0,
    "used_bytes": 4 << 30,
    "busy_percent": 99.0,
    "slowed_by": [],
}


class Workers:
    """What workers would give for rounds on a card, and the card's rates, which get better once."""

    def __init__(self, rates_fail: bool = False) -> None:
        self.rates_fail, self.jobs = rates_fail, []

    def __call__(self, job: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.jobs.append(job["task"])
        if job["task"] == "card-rates":
            if self.rates_fail:
                raise WorkerError("torch is built without CUDA")
            return self.rates(job["sizes"], 3 + self.jobs.count("card-rates"))
        run: dict[str, Any] = dict.fromkeys(FIGURES, 1.0)
        return run | {
            "decode_tokens_per_s": 500.0,
            "total_tokens_per_s": 2000.0,
            "prompt_tokens_per_s": 1e4,
            "peak_rss_bytes": 900 * MIB,
            "peak_device_bytes": 3_332_700_000,
            "together": 4,
            "card": LEFT,
        }

    @staticmethod
    def rates(sizes: list[int], terabytes: int) -> dict[str, Any]:
        bandwidth = [Bandwidth(terabytes * TERA, "copy", size, 132, {}, "cuda").to_json() for size in sizes]
        compute = {"type": "bf16", "operations_per_s": 8e14, "method": "x", "threads": 132, "methods": {}}
        return {"bandwidth": bandwidth, "compute": [compute | {"device": "cuda"}]}


@pytest.fixture
def artifact(checkpoint: Any, tmp_path: Path, known_machine: None) -> str:
    return str(write_artifact(tmp_path / "out", checkpoint).path)


def on_card(artifact: str, monkeypatch: pytest.MonkeyPatch, **failing: bool) -> dict[str, Any]:
    workers = Workers(**failing)
    for module in (bench_module, ceilings):
        monkeypatch.setattr(module, "run_worker", workers)

    def refused(*_: Any) -> None:
        raise AssertionError("what a card holds is no footprint of a process")

    monkeypatch.setattr(bounds, "needs_of", refused)
    asked = {"prompt_tokens": 8, "decode_tokens": 2, "users": [4], "repeats": 2}
    return bench([artifact], session={"device": "cuda"}, **asked)


def test_a_row_is_held_against_the_card(
    artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_card(tmp_path, monkeypatch)
    result = on_card(artifact, monkeypatch)
    (row,) = result["results"]
    assert (row["device"], row["peak_device_bytes"], row["users"]) == ("cuda", 3_332_700_000, 4)
    # The second time the card was faster: that counts.
    assert [(one["device"], one["bytes_per_s"]) for one in result["bandwidth"]] == [("cuda", 5 * TERA)]
    assert result["bandwidth"][0]["buffer_bytes"] == 1 << 20
    assert row["ceiling_tokens_per_s"] == pytest.approx(5 * TERA / row["bytes_per_token"])
    assert row["roofline_percent"] == pytest.approx(100 * 2000 / row["ceiling_tokens_per_s"])
    reached = 1e4 * row["prompt_operations_per_token"] / 8e14
    assert row["prompt_roofline_percent"] == pytest.approx(100 * reached)
    # Memory is compared where the published model has its own: on the card.
    assert row["baseline_ratio"]["peak_rss_bytes"] == pytest.approx(0.9)
    assert row["projections"] == [] and row["memory"] == []


def test_the_card_s_conditions_are_told(
    artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_card(tmp_path, monkeypatch, {**ANSWERS, f"--query-gpu={STATE}": "345, 3201, 30, 75.1, 9000, 40"})
    result = on_card(artifact, monkeypatch)
    card = result["conditions"]["card"]
    assert (card["name"], card["driver"]) == ("NVIDIA H200", "580.159.03")
    assert card["before"]["sm_clock_hz"] == 345e6 and card["after"] == LEFT
    assert card["notes"][0] == "others held 9,437 MB of the card before"
    text = bench_text(result)
    assert "card MB" in text and "3,333" in text
    assert "card: NVIDIA H200, driver 580.159.03; clock 345 to 1,980 MHz; temperature 30 to 55 °C" in text
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(result))
    read = records.check(records.read_json(file), records.BENCH, file)
    assert read["results"][0]["peak_device_bytes"] == 3_332_700_000


def test_a_card_that_cannot_be_measured_leaves_shares_open(
    artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi either
    result = on_card(artifact, monkeypatch, rates_fail=True)
    (row,) = result["results"]
    assert row["ceiling_tokens_per_s"] is None and row["roofline_percent"] is None
    assert row["prompt_roofline_percent"] is None and result["bandwidth"] == []
    assert "card" not in result["conditions"]
    assert "on a card that could not be measured" in bench_text(result)


def test_on_the_processor_nothing_asks_for_a_card(
    artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = put_card(tmp_path, monkeypatch)
    workers = Workers()
    for module in (bench_module, ceilings):
        monkeypatch.setattr(module, "run_worker", workers)
    result = bench([artifact], prompt_tokens=8, decode_tokens=2, repeats=1)
    assert workers.jobs == ["measure"] and not asked.exists()
    assert result["results"][0]["device"] == "cpu"
    assert [one["device"] for one in result["bandwidth"]] == ["cpu"]


def test_a_device_is_the_user_s_word_else_the_runtime_s(checkpoint: Any) -> None:
    from dataclasses import replace

    from benchmarks.common.subject import open_subject

    torch = open_subject(f"torch:{checkpoint.path}")
    assert device_of(torch, {}) == "cpu"
    assert device_of(torch, {"device": "cuda"}) == "cuda"
    assert device_of(replace(torch, runtime="cuda"), {"device": None}) == "cuda"
    assert device_of(replace(torch, runtime="cuda"), {"device": "cpu"}) == "cpu"


def test_joules_of_the_card_are_those_of_the_measured_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """700 W all the time: 0.9 s of a pass of 9 tokens are 70 J each; warming up does not count."""
    clock = Clock()

    class Meter:
        def read(self) -> float:
            return 700 * clock.now

        def joules(self, before: float, after: float) -> float:
            return after - before

    monkeypatch.setattr(measure, "MEASURE_S", 0.0)
    session = FakeSession(clock, token_s=0.01, steps_s=(0.1,))
    found = measure.measure_waves([session], [[[[1] * 10]]], 8, clock, Meter())  # type: ignore[arg-type]
    assert found["device_energy_joules_per_token"] == pytest.approx(700 * 0.9 / 9)
    assert measure.measure_waves([session], [[[[1]]]], 1, clock)["device_energy_joules_per_token"] is None


def test_the_job_measures_what_the_ceilings_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_rates, "_best_seconds", lambda way, device, seconds: 1e-3)
    job = {"sizes": [1 << 20], "seconds": 0.1, "device": "cpu", "products": [(8, 8, 8)]}
    found = card_rates.run_job(json.loads(json.dumps(job)), lambda done, total: None)
    assert Bandwidth(**found["bandwidth"][0]).bytes_per_s == (1 << 20) / 1e-3
