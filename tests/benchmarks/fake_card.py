"""An nvidia-smi that answers as it is told, first on the path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CARD = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
STATE = "clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used,utilization.gpu"
POWER = "power.draw"
OLD_REASONS = "clocks_throttle_reasons.active"

ANSWERS = {
    f"--query-gpu={CARD}": "NVIDIA H200, 580.159.03, 143771, 1980, 3201, 700.00",
    f"--query-gpu={STATE}": "1755, 3201, 41, 412.50, 5120, 97",
    "--query-compute-apps=pid,used_memory": "4242, 4096\n4343, 512",
    f"--query-gpu={OLD_REASONS}": "0x0000000000000024",
}


def put_card(folder: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str] | None = None) -> Path:
    """A folder with an nvidia-smi in it, first on the path; it notes what it was asked in asked.txt.

    It knows no other question, and says so as the real one does.
    """
    known = ANSWERS if answers is None else answers
    cases = "\n".join(f"'{query}') cat <<'END'\n{text}\nEND\n;;" for query, text in known.items())
    asked = folder / "asked.txt"
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\ncase "$1" in\n{cases}\n'
        "*) echo 'Field is not a valid field to query.'; exit 2;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return asked


def put_samples(folder: Path, monkeypatch: pytest.MonkeyPatch, watts: list[float]) -> None:
    """An nvidia-smi that tells the power every 50 ms, the last value for ever."""
    lines = "\n".join(f"echo {w}; sleep 0.05" for w in watts)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{lines}\nwhile :; do echo {watts[-1]}; sleep 0.05; done\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
