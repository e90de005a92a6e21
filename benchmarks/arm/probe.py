"""What a processor is, by its own word: run inside the emulator, with the standard library alone.

Prints one JSON object: the feature bits that Linux hands to programs, the register that names the kind, and
which of two instructions run rather than being illegal. Knows machine code; not what it is asked for.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform

_AT_HWCAP, _AT_HWCAP2 = 16, 26
_RET = 0xD65F03C0
_MRS_X0_MIDR = 0xD5380000
# sdot v0.4s, v1.16b, v2.16b and smmla v0.4s, v1.16b, v2.16b
INSTRUCTIONS = {"sdot": 0x4E829420, "smmla": 0x4E82A420}


def execute(*words: int) -> int:
    """Call machine code without arguments; what it leaves in x0.

    Good under an emulator: a real processor would have to be told that instructions have changed.
    """
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(b"".join(word.to_bytes(4, "little") for word in words))
        view = ctypes.c_char.from_buffer(page)
        found: int = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(view))()
        del view  # or the page could not be closed
    return found


def runs(word: int) -> bool:
    """Whether an instruction runs: a child tries it, and may die of it."""
    child = os.fork()
    if not child:
        execute(word, _RET)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    """Print what was found."""
    auxiliary = ctypes.CDLL(None).getauxval
    auxiliary.restype, auxiliary.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    print(
        json.dumps(
            {
                "machine": platform.machine(),
                "hwcap": auxiliary(_AT_HWCAP),
                "hwcap2": auxiliary(_AT_HWCAP2),
                "midr": execute(_MRS_X0_MIDR, _RET),
                "runs": {name: runs(word) for name, word in INSTRUCTIONS.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
