"""The parsers on made-up /sys and /proc trees, the noise probe on made-up rates, notes by hand."""

import math
from dataclasses import replace

import pytest

from benchmarks.latency import conditions
from benchmarks.latency.conditions import (
    EnergyMeter,
    Noise,
    Snapshot,
    Ticks,
    describe,
    snapshot,
)
from benchmarks.latency.conditions_text import conditions_text


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def laptop(tmp_path):
    """Two processors, a battery that is hotter than they are, a chip's sensor that is off."""
    write(
        tmp_path / "sys",
        {
            "devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
            "devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave",
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2000000",
            "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "3000000",
            "class/thermal/thermal_zone0/type": "battery",
            "class/thermal/thermal_zone0/temp": "99000",
            "class/thermal/thermal_zone1/type": "x86_pkg_temp",
            "class/thermal/thermal_zone1/temp": "61500",
            "class/hwmon/hwmon0/name": "coretemp",
            "class/hwmon/hwmon0/temp1_input": "63000",
            "class/hwmon/hwmon0/temp2_input": "-1",
            "class/hwmon/hwmon1/name": "nvme",
            "class/hwmon/hwmon1/temp1_input": "80000",
        },
    )
    write(
        tmp_path / "proc",
        {"loadavg": "1.25 0.5 0.3 1/234 5678", "stat": "cpu  100 20 30 800 50 5 5 40 7 0\ncpu0 1 2 3"},
    )
    return tmp_path


def test_a_laptop_s_files_are_read(laptop, monkeypatch):
    monkeypatch.setattr(conditions.os, "sysconf", lambda name: 100)
    found = snapshot(laptop / "sys", laptop / "proc")
    assert (found.governor, found.frequency_hz, found.temperature_c) == ("powersave", 2.5e9, 63.0)
    assert found.load == 1.25
    # User, nice, system and both interrupts; what was stolen is nobody's work here.
    assert (found.ticks.busy_s, found.ticks.stolen_s, found.ticks.total_s) == (1.6, 0.4, 10.5)


def test_governors_that_differ_are_all_named(laptop):
    write(laptop / "sys", {"devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance"})
    assert conditions.governor(laptop / "sys") == "performance,powersave"


def test_a_system_that_tells_nothing_leaves_nothing(tmp_path):
    assert snapshot(tmp_path, tmp_path) == Snapshot(None, None, None, None, None)
    empty = describe(snapshot(tmp_path, tmp_path), snapshot(tmp_path, tmp_path), None, None)
    assert empty == {
        "governor": None,
        "frequency_hz": {"before": None, "after": None},
        "temperature_c": {"before": None, "after": None},
        "load_before": None,
        "noise_percent": None,
        "drift_percent": None,
        "noisy": False,
        "notes": [],
    }
    assert conditions_text(empty) == "conditions: this system tells nothing"
    meter = EnergyMeter(tmp_path)
    assert meter.joules(meter.read(), meter.read()) is None


def test_files_that_hold_no_numbers_are_nothing(laptop):
    write(
        laptop / "sys",
        {
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unknown>",
            "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "",
            "class/thermal/thermal_zone1/temp": "hot",
            "class/hwmon/hwmon0/temp1_input": "0",
        },
    )
    write(laptop / "proc", {"loadavg": "", "stat": "cpu 1 2 x"})
    found = snapshot(laptop / "sys", laptop / "proc")
    assert (found.frequency_hz, found.temperature_c, found.load, found.ticks) == (None, None, None, None)


def test_energy_is_of_packages_and_memory_counted_once(tmp_path):
    counters = {
        "intel-rapl:0": ("package-0", 1_000_000, 9_000_000),
        "intel-rapl:0:0": ("core", 500_000, 9_000_000),  # part of the package
        "intel-rapl:0:1": ("dram", 100_000, 9_000_000),
        "intel-rapl:1": ("psys", 7_000_000, 9_000_000),  # the package again, with all the rest
    }
    for folder, (name, value, largest) in counters.items():
        write(
            tmp_path / "class/powercap" / folder,
            {"name": name, "energy_uj": value, "max_energy_range_uj": largest},
        )
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    assert before == [1_000_000, 100_000]
    write(tmp_path / "class/powercap/intel-rapl:0", {"energy_uj": 3_500_000})
    write(tmp_path / "class/powercap/intel-rapl:0:1", {"energy_uj": 50_000})  # ran over: 8.95 J more
    assert meter.joules(before, meter.read()) == pytest.approx(2.5 + 8.95)
    assert meter.notes() == []
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").unlink()
    assert meter.joules(before, meter.read()) is None


def test_counters_that_may_not_be_read_are_said_to_be_there(tmp_path):
    write(tmp_path / "class/powercap/intel-rapl:0", {"name": "package-0"})
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").mkdir()  # root may read any file, but no folder
    meter = EnergyMeter(tmp_path)
    assert meter.joules(meter.read(), meter.read()) is None
    assert meter.notes() == [
        "energy is counted here (RAPL), but only the administrator may read the counters"
    ]


QUIET = Snapshot("performance", 3e9, 50.0, 0.1, Ticks(10.0, 0.0, 5.0, 100.0))


def test_other_work_stolen_time_heat_and_falling_clocks_are_noted():
    later = Snapshot("performance", 2.4e9, 93.0, 2.0, Ticks(90.0, 5.0, 45.0, 200.0))
    found = describe(QUIET, later, 4.0, 1.0, ["not quite cold", "not quite cold"])
    assert found["notes"] == [
        "not quite cold",
        "other processes used 40 % of the processors meanwhile",
        "the host took 5 % of the processors' time away",
        "clock rates fell from 3.00 to 2.40 GHz",
        "the processor was 93 °C hot at the end: it may have slowed down",
    ]
    assert not found["noisy"]
    line = conditions_text(found)
    assert line.startswith(
        "conditions: noise 4.0 % between equal pieces of work: quiet; governor performance; "
        "clock 3 to 2.4 GHz; temperature 50 to 93 °C; load 0.10 before; not quite cold; "
    )
    assert line.count("not quite cold") == 1


def test_a_quiet_machine_needs_no_notes():
    assert describe(QUIET, replace(QUIET, ticks=Ticks(52.0, 0.5, 45.0, 200.0)), 3.0, 1.0)["notes"] == []


def test_noise_is_how_far_slow_and_fast_slices_lie_apart():
    assert Noise(1).percent is None
    assert Noise(1, rates=[100.0] * 30).percent == 0
    # 101 evenly spaced rates from 90 to 110: their 5th and 95th percentiles are 91 and 109.
    assert Noise(1, rates=[90 + n / 5 for n in range(101)]).percent == pytest.approx(100 * (1 - 91 / 109))
    # However bad it is, there is no more than all to lose.
    assert 90 < Noise(1, rates=[1.0] * 9 + [1000.0] * 3).percent < 100
    found = describe(QUIET, QUIET, 18.0, 9.0)
    assert found["noisy"]
    assert "varies by 18 % here" in found["notes"][0]
    assert "between equal pieces of work: noisy;" in conditions_text(found)


def test_a_probe_measures_something():
    noise = Noise(2)
    noise.probe()
    noise.probe()
    assert (len(noise.rates), len(noise.probes)) == (20, 2)
    assert min(noise.rates) <= min(noise.probes) <= max(noise.probes) <= max(noise.rates)
    assert 0 <= noise.percent < 100


def test_drift_is_student_s_interval_of_the_mean_of_the_probes():
    # Logarithms -d, 0, d: their deviation is d, and Student's t for three of them 4.3027.
    probes = [100 * math.exp(-0.1), 100.0, 100 * math.exp(0.1)]
    assert Noise(1, probes=probes).drift_percent == pytest.approx(
        100 * math.expm1(0.430265 / math.sqrt(3)), rel=1e-4
    )
    assert Noise(1, probes=[7.0] * 5).drift_percent == 0
    assert Noise(1, probes=[1.0, 2.0]).drift_percent is None
