"""How fast a model would decode on a device that is not here: reckoned, never measured.

    tokens/s = min(share, 1) x bandwidth / bytes per token

`bandwidth` is the device's published one, `bytes per token` what decoding reads (common/subject.py), and
`share` how much of this machine's own ceiling the same model reached here. So a projection supposes that the
device's processors keep up with its memory as well as this machine's do: an upper guess where they are
slower, or where heat slows them. It is never above the device's ceiling. Prompts are not projected: they are
bound by operations, which nobody publishes for processors. Knows arithmetic only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.devices.fit import Needs, misfit, need_at
from benchmarks.devices.profiles import Profile


def project(
    row: Mapping[str, Any], profile: Profile, need: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """A measured row on a device; None without a published bandwidth.

    `need` is the sum of memory at the device's context. No speed where the model does not fit or was not
    measured here.
    """
    if profile.bandwidth_bytes_per_s is None:
        return None
    ceiling = profile.bandwidth_bytes_per_s / row["bytes_per_token"]
    trouble = None if need is None else misfit(need, profile)
    share = row.get("roofline_percent")
    return {
        "profile": profile.name,
        "computed": True,
        "decode_tokens_per_s": None if trouble or share is None else ceiling * min(share / 100, 1),
        "ceiling_tokens_per_s": ceiling,
        "needed_bytes": None if need is None else need["total_bytes"],
        "memory_cap_bytes": profile.memory_bytes,
        "fits": None if need is None else trouble is None,
        "source": trouble or _source(share, profile),
    }


def projections(row: Mapping[str, Any], profiles: Iterable[Profile], needs: Needs) -> list[dict[str, Any]]:
    """A row on every device that has a published bandwidth."""
    found = (project(row, p, need_at(needs, p.context) if p.context else None) for p in profiles)
    return [projection for projection in found if projection is not None]


def _source(share: float | None, profile: Profile) -> str:
    bandwidth = f"{(profile.bandwidth_bytes_per_s or 0) / 1e9:.1f} GB/s published for {profile.device}"
    if share is None:
        return f"computed: {bandwidth}; nothing was measured here, so only the ceiling is known"
    return f"computed: {bandwidth}, times the {min(share, 100):.3g} % of the ceiling reached here"
