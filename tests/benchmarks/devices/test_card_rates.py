"""The rates of a device on made-up clocks and, in small, on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.devices import card_rates
from benchmarks.devices.card_rates import buffer_bytes, card_bandwidth, card_compute, run_job


def test_the_buffer_stands_for_the_working_set() -> None:
    assert buffer_bytes(3_330_543_616) == 2 << 30
    assert buffer_bytes(5 << 30) == 4 << 30
    assert buffer_bytes(100) == 1 << 20


def test_the_fastest_way_counts_and_moves_the_whole_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way takes a known time for one call; the rate is the buffer's bytes over it."""
    times = iter((0.5, 0.25, 2.0, 1.0, 4.0))
    monkeypatch.setattr(card_rates, "_best_seconds", lambda way, device, seconds: next(times))
    found = card_bandwidth(1 << 20, 0.1, "cpu")
    assert found.bytes_per_s == (1 << 20) / 0.25 and found.method == "largest int32"
    assert found.device == "cpu" and len(found.methods) == 5


def test_operations_are_counted_twice_per_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_rates, "_best_seconds", lambda way, device, seconds: 0.001)
    bf16, float32 = card_compute(0.1, "cpu", [(8, 16, 32), (16, 16, 32)])
    assert (bf16.type, float32.type) == ("bf16", "float32")
    assert bf16.operations_per_s == pytest.approx(2 * 16 * 16 * 32 / 0.001)
    assert bf16.method == "16 x 16 x 32"


def test_a_job_measures_everything_here_too() -> None:
    job = {"sizes": [1 << 20], "seconds": 0.02, "device": "cpu", "products": [[32, 64, 64]]}
    found = run_job(job, lambda done, total: None)
    assert found["bandwidth"][0]["bytes_per_s"] > 1e7
    assert [compute["type"] for compute in found["compute"]] == ["bf16", "float32"]
    assert all(compute["operations_per_s"] > 1e6 for compute in found["compute"])


class Event:
    """An event of a card on which every call takes 2 ms; the card's time is its own."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = Event.now_ms

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


def test_a_card_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def work() -> None:
        Event.now_ms += 2.0

    assert card_rates.timed(work, "cuda", 5) == pytest.approx(0.010)
    assert card_rates._best_seconds(work, "cuda:0", 0.01) == pytest.approx(0.002)
