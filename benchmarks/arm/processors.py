"""The ARM processors that are emulated, what each can do by its own word, and which instructions were used.

Knows Linux's feature bits and the encodings of a few instructions; not how qemu is started (emulator.py).
Sources: arch/arm64/include/uapi/asm/hwcap.h of Linux for the bits, the Arm Architecture Reference Manual
(DDI 0487, C7.2) for the encodings.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

from fox_edge.quant import GGUF, ONNX, PTE

# Names in /proc/cpuinfo of AT_HWCAP's bits, from bit 0; 'asimddp' is dotprod.
_HWCAP = (
    *("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp"),
    *("cpuid", "asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512"),
    *("sve", "asimdfhm", "dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)
# Of AT_HWCAP2's.
_HWCAP2 = (
    *("dcpodp", "sve2", "sveaes", "svepmull", "svebitperm", "svesha3", "svesm4", "flagm2", "frint"),
    *("svei8mm", "svef32mm", "svef64mm", "svebf16", "i8mm", "bf16", "dgh", "rng", "bti", "mte", "ecv"),
    *("afp", "rpres", "mte3", "sme"),
)
_DOTPROD, _I8MM = "asimddp", "i8mm"


@dataclass(frozen=True)
class Processor:
    """One to emulate: what rows call it, qemu's -cpu, and llama.cpp's -march on a phone with it.

    `dotprod` and `i8mm` are what it must and must not have; the check fails where its own word differs.
    `formats` are those of the exports that are run on it.
    """

    name: str
    qemu: str
    march: str
    dotprod: bool
    i8mm: bool
    formats: tuple[str, ...] = (GGUF, ONNX, PTE)


# As llama.cpp's own builds for Android divide phones: Armv8.0, Armv8.2 with dotprod and FP16, Armv8.6 with
# i8mm. qemu's `max` has everything that it can emulate; few phones let programs use SVE, so it is off.
# ExecuTorch's wheel for Linux does not start on Armv8.0: its libraries have Armv8.1's atomic instructions
# (LSE). Of qemu's processors the A64FX alone has these and no dotprod.
PROCESSORS = (
    Processor("cortex-a53", "cortex-a53", "armv8-a", False, False, (GGUF, ONNX)),
    Processor("a64fx", "a64fx", "armv8.2-a", False, False, (PTE,)),
    Processor("cortex-a76", "cortex-a76", "armv8.2-a+dotprod+fp16", True, False),
    Processor("armv8.6", "max,sve=off,pauth-impdef=on", "armv8.6-a+fp16+i8mm", True, True),
)

# Instruction -> (mask, value) of its 32 bits. Vectors of int8 to int32; "by element" has its own encoding.
_ENCODINGS = {
    "sdot": ((0xBFE0FC00, 0x0E809400), (0xBFC0F400, 0x0F80E000)),
    "udot": ((0xBFE0FC00, 0x2E809400), (0xBFC0F400, 0x2F80E000)),
    "smmla": ((0xFFE0FC00, 0x4E80A400),),
    "ummla": ((0xFFE0FC00, 0x6E80A400),),
    "usmmla": ((0xFFE0FC00, 0x4E80AC00),),
}
DOTPROD_INSTRUCTIONS, I8MM_INSTRUCTIONS = ("sdot", "udot"), ("smmla", "ummla", "usmmla")
# A line of qemu's in_asm log: address, the instruction's 32 bits, and what its disassembler makes of them. Of
# what it does not know it shows the four bytes as they lie in memory, and these count: the bits beside them
# are sometimes turned round, and a call may look like one of these then. What cannot be one is left out here.
_LINE = re.compile(
    rb"^0x[0-9a-f]+:  (?:([0246][ef][89ab][0-9a-f]{5})  +(?!\.byte)|[0-9a-f]{8}  +\.byte +"
    rb"0x([0-9a-f]{2}), 0x([0-9a-f]{2}), 0x([89ab][0-9a-f]), 0x([0246][ef])\b)",
    re.MULTILINE,
)
_READ_BYTES = 1 << 20


def features(hwcap: int, hwcap2: int) -> list[str]:
    """Names of the features that Linux tells a program of, as /proc/cpuinfo has them."""
    found = [name for bit, name in enumerate(_HWCAP) if hwcap >> bit & 1]
    return found + [name for bit, name in enumerate(_HWCAP2) if hwcap2 >> bit & 1]


def cpuinfo(midr: int, names: list[str], count: int) -> str:
    """/proc/cpuinfo as Linux on ARM writes it for `count` processors of one kind.

    `midr` is the register that identifies the kind: implementer, variant, part and revision.
    """
    return "".join(
        f"processor\t: {n}\nBogoMIPS\t: 100.00\nFeatures\t: {' '.join(names)}\n"
        f"CPU implementer\t: {midr >> 24 & 0xFF:#04x}\nCPU architecture: 8\n"
        f"CPU variant\t: {midr >> 20 & 0xF:#x}\nCPU part\t: {midr >> 4 & 0xFFF:#05x}\n"
        f"CPU revision\t: {midr & 0xF}\n\n"
        for n in range(count)
    )


def instruction_name(word: int) -> str | None:
    """Which of the instructions in question 32 bits are, if any."""
    for name, encodings in _ENCODINGS.items():
        if any(word & mask == value for mask, value in encodings):
            return name
    return None


def count_instructions(log: BinaryIO) -> dict[str, int]:
    """How many places of the code that was translated are such instructions; `log` is read to its end.

    Every block of code is translated when it is first run, so a place that never runs does not count.
    """
    found: Counter[str] = Counter()
    rest = b""
    while data := log.read(_READ_BYTES):
        lines, newline, rest = (rest + data).rpartition(b"\n")
        for word, *stored in _LINE.findall(lines + newline):
            if name := instruction_name(int(word or b"".join(reversed(stored)), 16)):
                found[name] += 1
    return dict(sorted(found.items()))


def deviation(processor: Processor, probe: dict[str, object]) -> str:
    """What a probe (probe.py) says that the processor should not be; '' when all is as it is named."""
    runs, names = probe["runs"], probe["features"]
    assert isinstance(runs, dict) and isinstance(names, list)
    for what, due, bit, instruction in (
        ("dotprod", processor.dotprod, _DOTPROD, "sdot"),
        ("i8mm", processor.i8mm, _I8MM, "smmla"),
    ):
        told, ran = bit in names, bool(runs[instruction])
        if (told, ran) != (due, due):
            return (
                f"{what} should be {_on(due)}, but Linux's bits say {_on(told)}, and {instruction} "
                f"{'runs' if ran else 'is illegal'}"
            )
    return ""


def _on(value: bool) -> str:
    return "on" if value else "off"
