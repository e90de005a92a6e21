"""The conditions under which numbers were taken: clock rate, heat, other work, noise, energy.

Reads what the system tells, under roots that a test may replace; None where it tells nothing, as most virtual
machines do. Knows Linux's files; not models, rounds or figures.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.latency.intervals import student_t
from fox_edge.processors import available_cores

SYS, PROC = Path("/sys"), Path("/proc")
# What the sensors of processors are called; others (battery, disk, board) say nothing about throttling.
_CPU_SENSORS = ("cpu", "x86_pkg_temp", "soc", "coretemp", "k10temp", "zenpower", "package")
# RAPL domains that add up: a package holds its cores and graphics; 'psys' would count packages again.
_ENERGY_DOMAINS = ("package", "dram")
# From here on a note is made, or the machine is called noisy.
NOISY_PERCENT = 10.0
_OTHERS_PERCENT, _STOLEN_PERCENT, _HOT_C, _SLOWER = 10.0, 2.0, 90.0, 0.9
# One probe: slices of about so long, so many of them, each on all processors.
_SLICE_S, _SLICES = 0.02, 10
_PROBE_BYTES = 1 << 18


@dataclass(frozen=True)
class Snapshot:
    """The machine at one moment. None where the system does not tell."""

    governor: str | None
    frequency_hz: float | None
    temperature_c: float | None
    load: float | None
    ticks: Ticks | None


@dataclass(frozen=True)
class Ticks:
    """Processor time so far, in seconds: of everybody, stolen by the host, our own, and all there was."""

    busy_s: float
    stolen_s: float
    own_s: float
    total_s: float


def snapshot(sys: Path = SYS, proc: Path = PROC) -> Snapshot:
    """What the system tells now."""
    return Snapshot(governor(sys), frequency_hz(sys), temperature_c(sys), load(proc), ticks(proc))


def governor(sys: Path = SYS) -> str | None:
    """The policy that sets clock rates ('performance', 'powersave'); several are joined by commas."""
    found = {_text(path) for path in sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    return ",".join(sorted(found - {""})) or None


def frequency_hz(sys: Path = SYS) -> float | None:
    """The mean clock rate of all processors."""
    files = sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    rates = [value for path in files if (value := _number(path)) is not None]
    return 1000 * statistics.fmean(rates) if rates else None


def temperature_c(sys: Path = SYS) -> float | None:
    """The hottest sensor of a processor."""
    zones = [(_text(zone / "type"), zone / "temp") for zone in sys.glob("class/thermal/thermal_zone*")]
    chips = sys.glob("class/hwmon/hwmon*")
    zones += [(_text(chip / "name"), path) for chip in chips for path in chip.glob("temp*_input")]
    values = [_number(path) for name, path in zones if name.lower().startswith(_CPU_SENSORS)]
    # A sensor that is switched off says 0, or less.
    return max((value / 1000 for value in values if value is not None and value > 0), default=None)


def load(proc: Path = PROC) -> float | None:
    """Processes that ran or wanted to, on average over the last minute."""
    with contextlib.suppress(ValueError, IndexError):
        return float(_text(proc / "loadavg").split()[0])
    return None


def ticks(proc: Path = PROC) -> Ticks | None:
    """Processor time as /proc/stat counts it, and what of it this process and its children had."""
    with contextlib.suppress(ValueError, IndexError, OSError):
        name, *fields = _text(proc / "stat").split("\n")[0].split()
        user, nice, system, idle, wait, irq, soft, stolen = (int(f) for f in fields[:8])
        if name != "cpu":
            return None
        each = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + irq + soft
        own = os.times()
        return Ticks(busy / each, stolen / each, sum(own[:4]), (busy + idle + wait + stolen) / each)
    return None


class EnergyMeter:
    """Joules that the processors took, where RAPL counts them and this process may read it."""

    def __init__(self, sys: Path = SYS) -> None:
        named = sorted(sys.glob("class/powercap/*/energy_uj"))
        counting = [path for path in named if _text(path.parent / "name").startswith(_ENERGY_DOMAINS)]
        self._counters = [
            (path, _number(path.parent / "max_energy_range_uj") or 0.0)
            for path in counting
            if _number(path) is not None
        ]
        self._refused = len(counting) - len(self._counters)

    def notes(self) -> list[str]:
        """What keeps the energy from being known, where this machine does count it."""
        if not self._refused:
            return []
        return ["energy is counted here (RAPL), but only the administrator may read the counters"]

    def read(self) -> list[float | None]:
        """All counters, microjoules."""
        return [_number(path) for path, _ in self._counters]

    def joules(self, before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
        """What was taken between two readings; a counter that began anew in between is put right."""
        total = 0.0
        for first, last, (_, largest) in zip(before, after, self._counters, strict=True):
            if first is None or last is None:
                return None
            total += last - first if last >= first else last - first + largest
        return total / 1e6 if self._counters else None


@dataclass
class Noise:
    """The same small work over and over, on all processors: how much its speed varies by itself.

    Every slice ends when the last processor is done, as every layer of a model does: one processor that is
    taken away by others shows.
    """

    threads: int = field(default_factory=available_cores)
    rates: list[float] = field(default_factory=list)  # passes per second of every slice
    probes: list[float] = field(default_factory=list)  # and over all slices of each probe
    _passes: int = 0

    def probe(self) -> None:
        """About a fifth of a second of it; to be called between measurements, not during one."""
        block = bytes(_PROBE_BYTES)
        with ThreadPoolExecutor(self.threads) as pool:
            self._slice(pool, block, 1)  # the threads start
            if not self._passes:
                self._passes = max(1, round(_SLICE_S * self._slice(pool, block, 8)))
            found = [self._slice(pool, block, self._passes) for _ in range(_SLICES)]
        self.rates += found
        self.probes.append(statistics.harmonic_mean(found))

    @property
    def percent(self) -> float | None:
        """By how much slow slices fall behind fast ones (5th and 95th percentile), 0 to 100."""
        if len(self.rates) < 2:
            return None
        cuts = statistics.quantiles(self.rates, n=20, method="inclusive")
        return 100 * (1 - cuts[0] / cuts[-1])

    @property
    def drift_percent(self) -> float | None:
        """How well these moments stand for the machine: by how much its mean speed may be another, 95 %.

        Student's interval of the mean of the probes' logarithms. None for fewer than three probes.
        """
        n = len(self.probes)
        if n < 3:
            return None
        error = statistics.stdev(map(math.log, self.probes)) / math.sqrt(n)
        return 100 * math.expm1(student_t(n - 1) * error)

    def _slice(self, pool: ThreadPoolExecutor, block: bytes, passes: int) -> float:
        def work(_: int) -> None:
            for _ in range(passes):
                zlib.crc32(block)

        start = time.perf_counter()
        list(pool.map(work, range(self.threads)))
        return passes / (time.perf_counter() - start)


def describe(
    before: Snapshot,
    after: Snapshot,
    noise_percent: float | None,
    drift_percent: float | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The conditions as reports carry them; equal notes are said once."""
    noisy = noise_percent is not None and noise_percent > NOISY_PERCENT
    found = [*notes, *_notes(before, after)]
    if noisy:
        found.append(
            f"the same small work varies by {noise_percent:.0f} % here: differences below that are noise"
        )
    return {
        "governor": after.governor,
        "frequency_hz": {"before": before.frequency_hz, "after": after.frequency_hz},
        "temperature_c": {"before": before.temperature_c, "after": after.temperature_c},
        "load_before": before.load,
        "noise_percent": noise_percent,
        "drift_percent": drift_percent,
        "noisy": noisy,
        "notes": list(dict.fromkeys(found)),
    }


def _notes(before: Snapshot, after: Snapshot) -> list[str]:
    """What a reader should know before believing the numbers."""
    notes = []
    if before.ticks and after.ticks and after.ticks.total_s > before.ticks.total_s:
        span = after.ticks.total_s - before.ticks.total_s
        own = after.ticks.own_s - before.ticks.own_s
        others = 100 * max(0.0, after.ticks.busy_s - before.ticks.busy_s - own) / span
        stolen = 100 * (after.ticks.stolen_s - before.ticks.stolen_s) / span
        if others > _OTHERS_PERCENT:
            notes.append(f"other processes used {others:.0f} % of the processors meanwhile")
        if stolen > _STOLEN_PERCENT:
            notes.append(f"the host took {stolen:.0f} % of the processors' time away")
    if before.frequency_hz and after.frequency_hz and after.frequency_hz < _SLOWER * before.frequency_hz:
        notes.append(
            f"clock rates fell from {before.frequency_hz / 1e9:.2f} to {after.frequency_hz / 1e9:.2f} GHz"
        )
    if after.temperature_c is not None and after.temperature_c >= _HOT_C:
        notes.append(
            f"the processor was {after.temperature_c:.0f} °C hot at the end: it may have slowed down"
        )
    return notes


def _number(path: Path) -> float | None:
    with contextlib.suppress(ValueError):
        return float(_text(path))
    return None


def _text(path: Path) -> str:
    """A small file's text without its line end; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
