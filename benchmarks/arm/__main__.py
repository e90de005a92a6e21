"""The exports of the embedded model really run on ARM, emulated: correctness only, no figure of speed.

    python -m benchmarks.arm WORK --results FILE.json [--export FORMAT-QUANT]...        (make arm-check)

On a Debian or Ubuntu on x86_64 with qemu-user-static, g++-aarch64-linux-gnu and cmake. WORK, 2 GB, is filled
with a small Debian for ARM, the runtimes' ARM wheels from PyPI and llama.cpp's libraries, built here; none of
it is installed. The whole takes half an hour to an hour, of which the first part is not needed again. A check
that was cut off goes on where it was; one that came to its end begins anew. What fails says why in its row,
and the others go on; the status is 0 when all passed, else 2.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.arm.emulator import Emulator
from benchmarks.arm.processors import PROCESSORS, Processor, deviation
from benchmarks.arm.runs import EXPORTS, X86, Found, export, job_of, on_arm, on_x86
from benchmarks.arm.tools import need_tools, qemu
from benchmarks.arm.userland import SUITE, run, userland
from benchmarks.arm.verdicts import Row, compared, failed, text_of
from benchmarks.common.machine import machine
from benchmarks.common.results import study_command, write_results
from benchmarks.fidelity.reference import ReferenceScorer
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.grammar import EXIT_MISTAKE
from fox_edge.progress import say


def main(argv: list[str] | None = None) -> int:
    """Parse, run everything, print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for the ARM system, wheels, libraries and exports")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.json")
    known = {f"{format}-{quant}": (format, quant) for format, quant in EXPORTS}
    parser.add_argument("--export", action="append", choices=tuple(known), help="only this; repeatable")
    args = parser.parse_args(argv)
    try:
        need_tools()
        results = check(args.work, [known[name] for name in args.export or known])
        results["command"] = study_command("arm", sys.argv[1:] if argv is None else argv)
        write_results(args.results, results)
    except FoxEdgeError as error:
        say(f"benchmarks.arm: {error}")
        return EXIT_MISTAKE
    print(text_of(results))
    return 0 if results["passed"] else EXIT_MISTAKE


def check(work: Path, exports: Sequence[tuple[str, str]] = EXPORTS) -> dict[str, Any]:
    """Exports, by format and --quant, on every processor; what a results file holds.

    Raises FoxEdgeError where nothing can be run at all.
    """
    work.mkdir(parents=True, exist_ok=True)
    emulator = Emulator(qemu(), userland(work).resolve())
    version = run(emulator.qemu, "--version").splitlines()[0]
    processors = [_probed(emulator, processor) for processor in PROCESSORS]
    checkpoint = Checkpoint.open("nano")
    reference = ReferenceScorer(checkpoint)
    rows: list[Row] = []
    for format, quant in exports:
        rows += _rows(work, emulator, checkpoint, reference, format, quant)
    for folder in ("runs", "exports"):
        shutil.rmtree(work / folder, ignore_errors=True)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "emulator": version,
        "system": f"Debian {SUITE}, arm64",
        "processors": processors,
        "rows": rows,
        "passed": all(not row["why"] for row in (*processors, *rows)),
    }


def _probed(emulator: Emulator, processor: Processor) -> Row:
    """What a processor says it is, and what of it is not as it should be."""
    row: Row = {"name": processor.name, "qemu": processor.qemu, "llama_cpp_march": processor.march}
    try:
        found = emulator.probe(processor)
    except FoxEdgeError as error:
        return {**row, "why": str(error)}
    return {**row, **found, "why": deviation(processor, found)}


def _rows(
    work: Path,
    emulator: Emulator,
    checkpoint: Checkpoint,
    reference: ReferenceScorer,
    format: str,
    quant: str,
) -> list[Row]:
    """One export on x86 and on every processor."""
    head: Row = {"artifact": f"nano-{format}-{quant}", "format": format, "quant": quant}
    try:
        artifact = export(work, format, quant)
        job = job_of(checkpoint, artifact)
        x86 = on_x86(work, artifact, job)
    except FoxEdgeError as error:
        return [{**head, "processor": X86, **failed(error)}]
    rows = [{**head, "processor": X86, **compared(reference, artifact, job, x86, None)}]
    for processor in PROCESSORS:
        if format not in processor.formats:
            continue
        say(f"{artifact.path.name} on {processor.name}")
        row: Row = {**head, "processor": processor.name}
        try:
            # It also puts this processor's /proc/cpuinfo in place.
            emulator.probe(processor)
            found: Found = on_arm(work, emulator, processor, artifact, job)
            rows.append({**row, **compared(reference, artifact, job, found, x86)})
        except FoxEdgeError as error:
            rows.append({**row, **failed(error)})
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
