"""Feature bits and encodings against hand-read and assembled ones; what qemu logs, counted."""

from __future__ import annotations

import io

import pytest

from benchmarks.arm.processors import (
    PROCESSORS,
    count_instructions,
    cpuinfo,
    deviation,
    features,
    instruction_name,
)
from fox_edge.quant import PTE
from runtimes.base import RUNTIMES

# As GNU as encodes them: the oracle of the masks.
ASSEMBLED = [
    ("sdot v0.4s, v1.16b, v2.16b", 0x4E829420, "sdot"),
    ("sdot v31.2s, v30.8b, v29.8b", 0x0E9D97DF, "sdot"),
    ("sdot v3.4s, v14.16b, v15.4b[3]", 0x4FAFE9C3, "sdot"),
    ("udot v3.4s, v4.16b, v5.16b", 0x6E859483, "udot"),
    ("udot v3.2s, v4.8b, v5.4b[1]", 0x2FA5E083, "udot"),
    ("smmla v9.4s, v8.16b, v7.16b", 0x4E87A509, "smmla"),
    ("ummla v9.4s, v8.16b, v31.16b", 0x6E9FA509, "ummla"),
    ("usmmla v9.4s, v8.16b, v7.16b", 0x4E87AD09, "usmmla"),
    ("add v0.4s, v1.4s, v2.4s", 0x4EA28420, None),
    ("fmla v0.4s, v1.4s, v2.4s", 0x4E22CC20, None),
    ("fmla v0.4s, v1.4s, v2.s[1]", 0x4FA21020, None),
    ("smlal v0.4s, v1.4h, v2.4h", 0x0E628020, None),
    ("smull v0.4s, v1.4h, v2.h[1]", 0x0F52A020, None),
    ("bfmmla v0.4s, v1.8h, v2.8h", 0x6E42EC20, None),
    ("mla v0.4s, v1.4s, v2.s[2]", 0x6F820820, None),
]


@pytest.mark.parametrize(("text", "word", "name"), ASSEMBLED, ids=[text for text, _, _ in ASSEMBLED])
def test_instructions_are_told_by_their_bits(text: str, word: int, name: str | None) -> None:
    assert instruction_name(word) == name


class Trickle(io.BytesIO):
    """A pipe that gives a few bytes at a time, so that lines are cut anywhere."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(7)


def test_what_qemu_translated_is_counted_wherever_the_log_is_cut() -> None:
    log = b"----------------\nIN: \n"
    for n, (text, word, _) in enumerate(ASSEMBLED * 3):
        # What qemu's disassembler does not know, it shows byte by byte.
        stored = b", ".join(b"0x%02x" % byte for byte in word.to_bytes(4, "little"))
        said = b".byte    " + stored if n % 2 else text.encode()
        log += b"0x%010x:  %08x  %s\n" % (0x5500810000 + 4 * n, word, said)
    # bl, as it was seen: its bits turned round are those of smmla.
    log += b"0x7f6b85f77148:  4e87a497  .byte    0x4e, 0x87, 0xa4, 0x97\n"
    log += b"0x5500820000:  4e829420  and not ended"
    due = {"sdot": 9, "smmla": 3, "udot": 6, "ummla": 3, "usmmla": 3}
    assert count_instructions(Trickle(log)) == count_instructions(io.BytesIO(log)) == due


def test_bits_have_the_names_of_proc_cpuinfo() -> None:
    # What qemu's cortex-a53 says: 0x8fb.
    assert features(0x8FB, 0) == ["fp", "asimd", "aes", "pmull", "sha1", "sha2", "crc32", "cpuid"]
    assert features(1 << 20, 1 << 13 | 1 << 14) == ["asimddp", "i8mm", "bf16"]
    assert features(1 << 22, 1 << 1 | 1 << 23) == ["sve", "sve2", "sme"]


def test_cpuinfo_is_written_as_linux_writes_it() -> None:
    # A Cortex-A76 r4p1: MIDR_EL1 0x414fd0b1.
    text = cpuinfo(0x414FD0B1, ["fp", "asimd"], 2)
    blocks = text.split("\n\n")
    assert blocks[2] == "" and blocks[0].replace("processor\t: 0", "processor\t: 1") == blocks[1]
    assert blocks[0].splitlines()[2:] == [
        "Features\t: fp asimd",
        "CPU implementer\t: 0x41",
        "CPU architecture: 8",
        "CPU variant\t: 0x4",
        "CPU part\t: 0xd0b",
        "CPU revision\t: 1",
    ]


A53, A64FX, A76, NEWEST = PROCESSORS


def probe(sdot: bool, smmla: bool, *names: str) -> dict[str, object]:
    return {"runs": {"sdot": sdot, "smmla": smmla}, "features": list(names)}


def test_a_processor_that_is_what_it_should_be() -> None:
    assert deviation(A53, probe(False, False, "asimd")) == ""
    assert deviation(A76, probe(True, False, "asimddp")) == ""
    assert deviation(NEWEST, probe(True, True, "asimddp", "i8mm")) == ""


def test_a_processor_that_is_not() -> None:
    said = deviation(A53, probe(True, False, "asimddp"))
    assert said == "dotprod should be off, but Linux's bits say on, and sdot runs"
    said = deviation(NEWEST, probe(True, False, "asimddp", "i8mm"))
    assert said == "i8mm should be on, but Linux's bits say on, and smmla is illegal"


def test_the_processors_differ_in_what_the_check_is_about() -> None:
    for format in RUNTIMES:
        kinds = [(p.dotprod, p.i8mm) for p in PROCESSORS if format in p.formats]
        assert kinds == [(False, False), (True, False), (True, True)]
    assert A64FX.formats == (PTE,)
