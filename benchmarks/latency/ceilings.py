"""How fast each subject's memory can be read: this machine's, or the graphics card's that it computes on.

Measured before and after the rounds, of each the better; for every size of working set, since what fits a
cache has the cache's ceiling. The card is measured in a process of its own, which leaves nothing on it. Knows
devices and sizes; not rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.subject import Subject
from benchmarks.devices import card_rates
from benchmarks.devices.compute import Compute, best_of
from benchmarks.devices.roofline import Bandwidth, buffer_bytes, read_bandwidth
from benchmarks.processes.launch import WorkerError, run_worker
from runtimes.base import CPU, CUDA

_CPU_S, _CARD_S = 0.5, 1.0


def device_of(subject: Subject, session: Mapping[str, Any]) -> str:
    """What a subject computes on: what was asked for, else the card for a runtime of that name."""
    asked: str | None = session.get("device")
    return asked or (CUDA if subject.runtime == CUDA else CPU)


@dataclass
class Ceilings:
    """Bandwidths of all that is to be measured, by (device, size of buffer), and the card's rate of products.

    `subjects` come with their devices; `positions` are in the KV cache in the middle of an answer.
    """

    subjects: Sequence[tuple[Subject, str]]
    positions: int
    threads: int | None
    found: dict[tuple[str, int], Bandwidth] = field(default_factory=dict)
    compute: list[Compute] = field(default_factory=list)

    def measure(self) -> None:
        """Measure everything; to be done again later, since the better of both counts."""
        keys = sorted({self._key(subject, device) for subject, device in self.subjects})
        for device, size in keys:
            if device == CPU:
                self._keep((device, size), read_bandwidth(size, self.threads, seconds=_CPU_S))
        if sizes := [size for device, size in keys if device == CUDA]:
            self._measure_card(sizes)

    def of(self, subject: Subject, device: str) -> Bandwidth | None:
        """The ceiling of one subject; None where its card could not be measured."""
        return self.found.get(self._key(subject, device))

    def to_json(self) -> list[dict[str, Any]]:
        """What a report carries about all of them."""
        kept = ("device", "buffer_bytes", "bytes_per_s", "method", "methods")
        return [{key: found.to_json()[key] for key in kept} for found in self.found.values()]

    def _measure_card(self, sizes: Sequence[int]) -> None:
        job = {"task": "card-rates", "sizes": list(sizes), "seconds": _CARD_S}
        try:
            found = run_worker(job)
        except WorkerError:
            return  # whoever needs the card will say what is wrong with it
        for size, bandwidth in zip(sizes, found["bandwidth"], strict=True):
            self._keep((CUDA, size), Bandwidth(**bandwidth))
        self.compute = best_of(self.compute, [Compute(**one) for one in found["compute"]])

    def _keep(self, key: tuple[str, int], new: Bandwidth) -> None:
        if key not in self.found or new.bytes_per_s > self.found[key].bytes_per_s:
            self.found[key] = new

    def _key(self, subject: Subject, device: str) -> tuple[str, int]:
        size = subject.bytes_per_token(self.positions)
        return device, card_rates.buffer_bytes(size) if device == CUDA else buffer_bytes(size)
