"""What stands beside every number of a benchmark: the device's limits, the baseline, ceilings, projections.

A run as a device (`--profile`) takes threads, context and a cap on memory from it; what does not fit is not
started, and the sum is its result. Every row gets the share of the operations' ceiling, its ratio to the
baseline, what it would take on each device, and its projections. Knows what belongs to a row; how each of it
is found, capped or reckoned, the modules that it asks do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.subject import Subject
from benchmarks.devices.baseline import baseline, ratio
from benchmarks.devices.compute import Compute, best_of, measure_compute, operations_per_token, prompt_figures
from benchmarks.devices.fit import Needs, misfit, need_at, needs_of
from benchmarks.devices.profiles import PROFILES, Profile, find_profile, threads_here
from benchmarks.devices.projection import projections
from benchmarks.latency.workloads import Workload
from benchmarks.processes import caps
from runtimes.base import CPU

_COMPUTE_S = 0.6


@dataclass
class Bounds:
    """Limits and comparisons of one benchmark. `context`: tokens that its sessions are opened for."""

    profile: Profile | None
    baseline: dict[str, Any]
    threads: int | None
    context: int
    compute: list[Compute] = field(default_factory=list)

    @classmethod
    def choose(
        cls,
        profile: str | None,
        baseline_file: str | Path | None,
        threads: int | None,
        context: int | None,
        needed: int,
    ) -> Bounds:
        """What the user said, else what the profile says, else the default: each runtime's own threads, and
        `needed` tokens of context. Raises FoxEdgeError for a profile or a file that there is not."""
        found = None if profile is None else find_profile(profile)
        if found is not None:
            threads = threads or threads_here(found)
            context = context or found.context
        return cls(found, baseline(baseline_file), threads, context or needed)

    @property
    def cap_bytes(self) -> int | None:
        """What a run may hold in memory; None: as much as it likes."""
        return None if self.profile is None else self.profile.memory_bytes

    def measure(self, card: Sequence[Compute] = ()) -> None:
        """Measure this machine's operations per second; of several times the best counts, a `card`'s too."""
        self.compute = best_of(self.compute, measure_compute(self.threads, _COMPUTE_S), card)

    def needs(self, subject: Subject, session: Mapping[str, Any], users: int) -> Needs:
        """What a subject takes at the context of the run and of every device."""
        contexts = [self.context, *(p.context for p in PROFILES.values() if p.context)]
        return needs_of(subject, contexts, {**session, "conversations": users})

    def refusal(self, needs: Needs) -> str | None:
        """Why a run is not started: the sum that does not fit the device. None where it may be."""
        need = need_at(needs, self.context)
        return None if self.profile is None or need is None else misfit(need, self.profile)

    def beside(
        self, row: Mapping[str, Any], subject: Subject, work: Workload, needs: Needs, device: str = CPU
    ) -> dict[str, Any]:
        """What a row carries besides its own figures; `device` is what it was measured on."""
        config = subject.config
        operations = (
            None if config is None else operations_per_token(config, work.conversations, work.decode_tokens)
        )
        return {
            **prompt_figures(row, operations, [one for one in self.compute if one.device == device]),
            "baseline_ratio": ratio(row, self.baseline),
            "profile": self.profile and self.profile.name,
            "memory_cap_bytes": self.cap_bytes,
            "memory": [
                {"profile": profile.name, **need}
                for profile in PROFILES.values()
                if (need := need_at(needs, profile.context or self.context))
            ],
            # How much of its ceiling a card reaches says nothing of processors.
            "projections": projections(row, PROFILES.values(), needs) if device == CPU else [],
        }

    def to_json(self) -> dict[str, Any]:
        """What a report carries about all its rows."""
        return {
            "compute": [compute.to_json() for compute in self.compute],
            "baseline": self.baseline,
            "profiles": [profile.to_json() for profile in PROFILES.values()],
        }

    def settings(self) -> dict[str, Any]:
        """What a report's settings say of it; how a cap is kept depends on the system."""
        return {
            "profile": self.profile and self.profile.name,
            "memory_cap_bytes": self.cap_bytes,
            "memory_cap_kept_by": None if self.profile is None else caps.way(),
        }
