"""A Python program run on an emulated ARM processor: what it said, how it ended, which instructions it used.

Knows qemu's user mode. A program sees this machine's files, except where the ARM system has its own of the
same name; among these is /proc/cpuinfo, without which libraries take the processor for this machine's.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arm.processors import Processor, count_instructions, cpuinfo, features
from benchmarks.arm.userland import last_words, python_of
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores

REPOSITORY = Path(__file__).resolve().parents[2]
_PROBE = Path(__file__).with_name("probe.py")
_PROBE_S = 120.0


@dataclass(frozen=True)
class Ended:
    """How a program ended: its status as `subprocess` tells it, its output, and the instructions counted."""

    status: int
    stdout: str
    stderr: str
    instructions: dict[str, int] = field(default_factory=dict)

    def complaint(self) -> str:
        """Why it did not end well, as one sentence; '' when it did."""
        if self.status == 0:
            return ""
        if self.status == -signal.SIGILL:
            return "died of an instruction that this processor does not have (SIGILL)"
        if self.status < 0:
            known = {s.value: s.name for s in signal.Signals}
            return f"died of {known.get(-self.status, f'signal {-self.status}')}"
        return last_words(self.stderr.replace("qemu: uncaught", "\nqemu: uncaught"))


@dataclass(frozen=True)
class Emulator:
    """qemu's program, and the ARM system whose programs it runs."""

    qemu: str
    root: Path

    def python(
        self,
        processor: Processor,
        words: Sequence[object],
        *,
        environment: Mapping[str, str] | None = None,
        count: bool = False,
        timeout_s: float = 3600.0,
    ) -> Ended:
        """Run the ARM Python with these arguments; `count`: with the instructions of what was run.

        Raises FoxEdgeError when it takes longer than `timeout_s`.
        """
        command = [self.qemu, "-L", str(self.root), "-cpu", processor.qemu]
        reading, writing = os.pipe()
        if count:
            command += ["-d", "in_asm", "-D", f"/dev/fd/{writing}"]
        command += [str(python_of(self.root)), *map(str, words)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**self._bare(), **(environment or {})},
                pass_fds=(writing,) if count else (),
                preexec_fn=_no_core,
            )
        finally:
            os.close(writing)
        counted: dict[str, int] = {}
        with os.fdopen(reading, "rb") as log, process:
            counter = threading.Thread(target=lambda: counted.update(count_instructions(log)), daemon=True)
            counter.start()
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise FoxEdgeError(f"did not end within {timeout_s:g} s") from None
            finally:
                process.kill()  # whatever interrupted it; nothing to one that has ended
                counter.join()
        return Ended(process.returncode, out, err, counted)

    def _bare(self) -> dict[str, str]:
        """What a program is told of its surroundings: nothing that is meant for this machine's libraries.

        Modules are compiled by the first program that imports them, which takes longer than all else.
        """
        kept = {name: value for name in ("HOME", "TMPDIR") if (value := os.environ.get(name))}
        compiled = str(self.root / "var" / "cache" / "python")
        return {**kept, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONPYCACHEPREFIX": compiled}

    def probe(self, processor: Processor) -> dict[str, Any]:
        """What the emulated processor says it is (probe.py), with its `features` named.

        Leaves /proc/cpuinfo as it has to be for it. Raises FoxEdgeError when qemu does not know it.
        """
        ended = self.python(processor, [_PROBE], timeout_s=_PROBE_S)
        if complaint := ended.complaint():
            raise FoxEdgeError(f"qemu -cpu {processor.qemu}: {complaint}")
        found: dict[str, Any] = json.loads(ended.stdout)
        found["features"] = features(found["hwcap"], found["hwcap2"])
        text = cpuinfo(found["midr"], found["features"], available_cores())
        (self.root / "proc" / "cpuinfo").write_text(text, encoding="utf-8")
        return found


def _no_core() -> None:
    """Let a program that dies leave no image of itself behind."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
