"""Devices that a model may be meant for: what an app can have there, and how fast their memory is.

Knows published figures and says where each is from; measures nothing. What a run here takes from a profile is
threads, context and a cap on memory (processes/caps.py); what is reckoned for a device that is not here is
projection.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common.machine import cpu_name, memory_bytes
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores

_GIB = 1 << 30
THIS = "this"


@dataclass(frozen=True)
class Profile:
    """A device. `memory_bytes`: what one process may hold there, not what is built in.

    `context`: tokens that a session is opened for; None: as many as the work needs. `bandwidth_bytes_per_s`:
    the memory's published one; None for a machine that is measured instead. `device` is the one that stands
    for its kind, `source` says where its figures are from and what is assumed.
    """

    name: str
    device: str
    threads: int
    memory_bytes: int
    context: int | None
    bandwidth_bytes_per_s: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """As reports carry it."""
        return asdict(self)


def bus_bytes_per_s(transfers_per_s: float, bits: int) -> float:
    """The most that a memory bus carries: every transfer moves all of its bits."""
    return transfers_per_s * bits / 8


def this_machine() -> Profile:
    """The machine that measures: its own processors and memory; its bandwidth is measured, not looked up."""
    return Profile(
        name=THIS,
        device=cpu_name(),
        threads=available_cores(),
        memory_bytes=memory_bytes(),
        context=None,
        bandwidth_bytes_per_s=None,
        source="this machine: the processors that this process may use, all memory of machine or container",
    )


_PUBLISHED = (
    Profile(
        name="laptop",
        device="Framework Laptop 13 (AMD Ryzen 7 7840U), 16 GB",
        threads=8,
        memory_bytes=8 * _GIB,
        context=8192,
        bandwidth_bytes_per_s=bus_bytes_per_s(5600e6, 128),
        source="AMD's specification of the 7840U: 8 cores, two channels (128 bits) of DDR5-5600; assumed: "
        "the system and a browser leave half of 16 GB",
    ),
    Profile(
        name="phone-8gb",
        device="Samsung Galaxy S24, 8 GB (Snapdragon 8 Gen 3)",
        threads=4,
        memory_bytes=4 * _GIB,
        context=4096,
        bandwidth_bytes_per_s=bus_bytes_per_s(9600e6, 64),
        source="Qualcomm's product brief: LPDDR5X up to 4,800 MHz (9,600 million transfers per second) over "
        "64 bits; assumed: half of 8 GB for the app in front, 4 of the fast cores",
    ),
    Profile(
        name="phone-4gb",
        device="Samsung Galaxy A15, 4 GB (MediaTek Helio G99)",
        threads=2,
        memory_bytes=3 * _GIB // 2,
        context=2048,
        bandwidth_bytes_per_s=bus_bytes_per_s(4266e6, 32),
        source="MediaTek's specification of the G99: LPDDR4X at 2,133 MHz over two channels of 16 bits, 2 of "
        "its 8 cores fast (Cortex-A76); assumed: Android and what it keeps alive take more than half of 4 GB",
    ),
    Profile(
        name="pi5",
        device="Raspberry Pi 5, 8 GB",
        threads=4,
        memory_bytes=6 * _GIB,
        context=4096,
        bandwidth_bytes_per_s=bus_bytes_per_s(4267e6, 32),
        source="Raspberry Pi's specification: 4 Cortex-A76, LPDDR4X-4267 over 32 bits; assumed: a system "
        "without a desktop leaves three quarters of 8 GB",
    ),
)

# By name, in the order in which they are shown.
PROFILES: Mapping[str, Profile] = {p.name: p for p in (*_PUBLISHED, this_machine())}


def find_profile(name: str) -> Profile:
    """The profile of this name; raises FoxEdgeError listing those that there are."""
    if name not in PROFILES:
        raise FoxEdgeError(f"no device profile is called '{name}'; there are {', '.join(PROFILES)}")
    return PROFILES[name]


def threads_here(profile: Profile) -> int:
    """The profile's threads, or as many as this machine has processors where these are fewer."""
    return min(profile.threads, available_cores())
