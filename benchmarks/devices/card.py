"""The graphics card that a model runs on: what it is, how it does, who else is on it, what we hold.

Asks nvidia-smi, which is there wherever an NVIDIA driver is, and sets nothing; of this process's own memory
it asks the PyTorch that is loaded already, if one is. Imports no library: looking at a card must not open it.
None where nothing tells.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_SMI = "nvidia-smi"
_TIMEOUT_S = 20
_MIB = 1 << 20
# What clocks are held back by, under the name of today's drivers and that of older ones.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of that mask (NVML's nvmlClocksEventReasons) that slow a busy card down; idle and set clocks do not.
_SLOWING = {
    0x0004: "the power limit",
    0x0008: "a hardware slowdown",
    0x0020: "heat (software)",
    0x0040: "heat (hardware)",
    0x0080: "the power brake",
}
# From here on a note is made.
_OTHERS_BYTES, _BUSY_PERCENT, _SLOWER = 64 * _MIB, 5.0, 0.95


@dataclass(frozen=True)
class Card:
    """What does not change: one NVIDIA card. Clocks are the highest that it has, power is its limit."""

    name: str
    driver: str
    memory_bytes: int | None
    sm_clock_hz: float | None
    memory_clock_hz: float | None
    power_limit_w: float | None


@dataclass(frozen=True)
class CardState:
    """The card at one moment: clocks, heat, power, memory in use by anybody, share of time that it worked."""

    sm_clock_hz: float | None
    memory_clock_hz: float | None
    temperature_c: float | None
    power_w: float | None
    used_bytes: int | None
    busy_percent: float | None
    slowed_by: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As reports carry it."""
        return asdict(self) | {"slowed_by": list(self.slowed_by)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CardState:
        """The other way round."""
        return cls(**{**fields, "slowed_by": tuple(fields["slowed_by"])})


def find_card() -> Card | None:
    """The card that CUDA programs of this process see first; None without a driver, or without a card."""
    found = _ask("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")
    if found is None:
        return None
    name, driver, *numbers = found
    memory, sm, memory_clock, power = map(_number, numbers)
    return Card(name, driver, _bytes(memory), _hertz(sm), _hertz(memory_clock), power)


def card_state() -> CardState | None:
    """The card now; None where nobody tells."""
    found = _ask("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "memory.used", "utilization.gpu")
    if found is None:
        return None
    sm, memory_clock, heat, power, used, busy = map(_number, found)
    return CardState(_hertz(sm), _hertz(memory_clock), heat, power, _bytes(used), busy, _slowed_by())


def held_bytes(pids: Collection[int] | None = None) -> int | None:
    """Memory that processes hold on the card, of `pids` alone where they are given.

    None where nobody tells: in a container the driver may name no process, or by other numbers.
    """
    rows = _lines("--query-compute-apps=pid,used_memory")
    if rows is None:
        return None
    held = [(_number(pid), _number(used)) for pid, used in (_fields(row, 2) for row in rows)]
    known = [used for pid, used in held if used is not None and (pids is None or pid in pids)]
    return round(sum(known) * _MIB) if known or not held else None


def own_peak_bytes() -> int | None:
    """Device memory that this process has reserved at most; None where it computes on no card.

    PyTorch's own count where it is what computes, which leaves out the driver's few hundred MB per process;
    else what the driver says that this process holds now.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    return held_bytes({os.getpid()}) or None


def describe_card(card: Card, before: CardState | None, after: CardState | None) -> dict[str, Any]:
    """The card as a report's conditions carry it, with notes on what a reader should know."""
    return {
        **asdict(card),
        "before": before and before.to_json(),
        "after": after and after.to_json(),
        "notes": _notes(before, after),
    }


def card_text(described: dict[str, Any]) -> str:
    """One line for a person."""
    parts = [f"card: {described['name']}, driver {described['driver']}"]
    first, last = (described[when] or {} for when in ("before", "after"))
    for name, key, scale, unit in (
        ("clock", "sm_clock_hz", 1e-6, "MHz"),
        ("temperature", "temperature_c", 1.0, "°C"),
        ("power", "power_w", 1.0, "W"),
    ):
        if first.get(key) is not None and last.get(key) is not None:
            parts.append(f"{name} {first[key] * scale:,.0f} to {last[key] * scale:,.0f} {unit}")
    return "; ".join([*parts, *described["notes"]])


def _notes(before: CardState | None, after: CardState | None) -> list[str]:
    notes = []
    if before is not None and (before.used_bytes or 0) > _OTHERS_BYTES:
        notes.append(f"others held {(before.used_bytes or 0) / 1e6:,.0f} MB of the card before")
    if before is not None and (before.busy_percent or 0) > _BUSY_PERCENT:
        notes.append(f"others kept the card busy {before.busy_percent:.0f} % of the time before")
    if after is not None and after.slowed_by:
        notes.append(f"the card was slowed down by {' and '.join(after.slowed_by)}")
    return notes


def _slowed_by() -> tuple[str, ...]:
    for name in _REASONS:
        if (found := _ask(name)) is not None:
            with contextlib.suppress(ValueError):
                mask = int(found[0], 16)
                return tuple(what for bit, what in _SLOWING.items() if mask & bit)
    return ()


def _ask(*fields: str) -> list[str] | None:
    """What nvidia-smi says of the card, field by field."""
    rows = _lines(f"--query-gpu={','.join(fields)}")
    return _fields(rows[0], len(fields)) if rows else None


def _fields(row: str, count: int) -> list[str]:
    """The fields of a line; empty ones where it has too few."""
    found = [field.strip() for field in row.split(",")]
    return [*found, *[""] * count][:count]


def _lines(query: str) -> list[str] | None:
    """Lines of nvidia-smi's answer; None where it is not there, or does not know the question."""
    command = [_SMI, query, "--format=csv,noheader,nounits", *_selection()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return None if done.returncode else [line for line in done.stdout.splitlines() if line.strip()]


def _selection() -> Sequence[str]:
    """Which card is meant, where there are several: the first that CUDA programs may see."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return ("-i", first or "0")


def _number(text: str) -> float | None:
    """A number; None for what a card does not tell ('[N/A]')."""
    with contextlib.suppress(ValueError):
        return float(text)
    return None


def _bytes(mebibytes: float | None) -> int | None:
    return None if mebibytes is None else round(mebibytes * _MIB)


def _hertz(megahertz: float | None) -> float | None:
    return None if megahertz is None else megahertz * 1e6
