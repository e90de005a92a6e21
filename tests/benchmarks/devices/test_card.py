"""What nvidia-smi says, read; what it does not say, null; and what of it a reader must know."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.devices import card, card_energy
from benchmarks.devices.card import (
    card_state,
    card_text,
    describe_card,
    find_card,
    held_bytes,
    own_peak_bytes,
)
from benchmarks.devices.card_energy import CardEnergy
from tests.benchmarks.fake_card import ANSWERS, CARD, STATE, put_card, put_samples

MIB = 1 << 20


def test_a_card_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = put_card(tmp_path, monkeypatch)
    assert find_card() == card.Card("NVIDIA H200", "580.159.03", 143771 * MIB, 1.98e9, 3.201e9, 700.0)
    state = card_state()
    assert state is not None
    assert (state.sm_clock_hz, state.temperature_c, state.power_w) == (1.755e9, 41, 412.5)
    assert (state.used_bytes, state.busy_percent) == (5120 * MIB, 97)
    # The newer name of the question was not known; the mask has the power limit's bit and heat's.
    assert state.slowed_by == ("the power limit", "heat (software)")
    assert asked.read_text().splitlines()[0].endswith("--format=csv,noheader,nounits -i 0")


def test_of_several_cards_the_one_that_programs_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = put_card(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-77,GPU-12")
    find_card()
    assert asked.read_text().splitlines()[0].endswith("-i GPU-77")


def test_what_a_card_does_not_tell_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        f"--query-gpu={CARD}": "NVIDIA X, 535.1, [N/A], [Not Supported], , 70",
        f"--query-gpu={STATE}": "[N/A], 1, 2",
        "--query-compute-apps=pid,used_memory": "1, [N/A]",
    }
    put_card(tmp_path, monkeypatch, answers)
    assert find_card() == card.Card("NVIDIA X", "535.1", None, None, None, 70.0)
    state = card_state()
    assert state is not None and state.sm_clock_hz is None and state.used_bytes is None
    assert state.slowed_by == ()
    assert held_bytes() is None


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 9\n"])
def test_without_a_driver_there_is_nothing(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_card() is None and card_state() is None and held_bytes() is None
    assert own_peak_bytes() is None


def test_memory_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_card(tmp_path, monkeypatch)
    assert held_bytes() == 4608 * MIB
    assert held_bytes({4343, 1}) == 512 * MIB
    assert held_bytes({1}) is None


def test_own_memory_is_pytorch_s_count_where_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, max_memory_reserved=lambda: 3_550_000_000
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert own_peak_bytes() == 3_550_000_000


def test_own_memory_is_the_driver_s_word_for_other_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {**ANSWERS, "--query-compute-apps=pid,used_memory": f"{os.getpid()}, 2048\n7, 1"}
    put_card(tmp_path, monkeypatch, answers)
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert own_peak_bytes() == 2048 * MIB


def test_what_a_reader_must_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_card(tmp_path, monkeypatch)
    found, state = find_card(), card_state()
    assert found is not None and state is not None
    described = describe_card(found, state, state)
    assert described["notes"] == [
        "others held 5,369 MB of the card before",
        "others kept the card busy 97 % of the time before",
        "the card was slowed down by the power limit and heat (software)",
    ]
    assert card_text(described).startswith(
        "card: NVIDIA H200, driver 580.159.03; clock 1,755 to 1,755 MHz; temperature 41 to 41 °C; power 412"
    )
    calm = replace(state, used_bytes=4 * MIB, busy_percent=0.0, slowed_by=())
    assert describe_card(found, calm, calm)["notes"] == []
    assert card_text(describe_card(found, None, None)) == "card: NVIDIA H200, driver 580.159.03"


# --- energy ----------------------------------------------------------------------------------------------


class Counter:
    """NVML, of a card that has taken so many millijoules."""

    def __init__(self, millijoules: list[int], missing: bool = False) -> None:
        self.millijoules, self.missing = millijoules, missing

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: object) -> int:
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, card: object, found: object) -> int:
        if self.missing:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        found._obj.value = self.millijoules.pop(0)  # type: ignore[attr-defined]
        return 0


def test_the_driver_s_counter_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_energy.ctypes, "CDLL", lambda name: Counter([1, 5_000, 29_000]))
    meter = CardEnergy()
    before, after = meter.read(), meter.read()
    assert meter.joules(before, after) == 24.0
    meter.close()


def test_power_is_summed_up_where_there_is_no_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_energy.ctypes, "CDLL", lambda name: Counter([], missing=True))
    put_samples(tmp_path, monkeypatch, [100.0, 300.0])
    now = [0.0]
    monkeypatch.setattr(card_energy.time, "monotonic", lambda: now[0])
    samples = card_energy._Samples(["false"])
    for at, watts in ((1.0, 100.0), (2.0, 300.0), (4.0, 200.0)):
        samples._take(watts, at)
    now[0] = 4.5
    assert samples._joules + samples._watts * 0.5 == 100 + 600 + 100
    samples.close()


def test_samples_of_a_running_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_energy, "_counter", lambda: None)
    put_samples(tmp_path, monkeypatch, [250.0])
    meter = CardEnergy()
    first = meter.read()
    while (last := meter.read()) == first:
        pass
    assert first is not None and last is not None and last > first
    meter.close()
    assert meter.read() is None


def test_without_a_card_there_is_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(card_energy.ctypes, "CDLL", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    meter = CardEnergy()
    assert meter.read() is None
    assert meter.joules(None, None) is None
    meter.close()
