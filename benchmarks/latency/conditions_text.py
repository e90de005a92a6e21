"""The conditions of a run in words, for the terminal and the report. Knows the keys of a report's conditions.

A key may be missing or null: results may be older, or from a system that tells nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def conditions_text(conditions: Mapping[str, Any]) -> str:
    """One line for a person: what is known, and the notes."""
    noise = noise_text(conditions)
    parts = [f"noise {noise}"] if noise else []
    parts += surroundings(conditions)
    return "conditions: " + "; ".join(
        [*(parts or ["this system tells nothing"]), *(conditions.get("notes") or ())]
    )


def noise_text(conditions: Mapping[str, Any]) -> str:
    """How much the speed of the same work varied; '' when it was not probed."""
    if conditions.get("noise_percent") is None:
        return ""
    word = "noisy" if conditions.get("noisy") else "quiet"
    return f"{conditions['noise_percent']:.1f} % between equal pieces of work: {word}"


def surroundings(conditions: Mapping[str, Any]) -> list[str]:
    """What the system told of itself, a few words each."""
    said = []
    if conditions.get("governor"):
        said.append(f"governor {conditions['governor']}")
    said += _change("clock", conditions.get("frequency_hz"), 1e-9, "GHz")
    said += _change("temperature", conditions.get("temperature_c"), 1.0, "°C")
    if conditions.get("load_before") is not None:
        said.append(f"load {conditions['load_before']:.2f} before")
    return said


def _change(name: str, values: Mapping[str, Any] | None, scale: float, unit: str) -> list[str]:
    first, last = ((values or {}).get(when) for when in ("before", "after"))
    if first is None or last is None:
        return []
    return [f"{name} {first * scale:.3g} to {last * scale:.3g} {unit}"]
